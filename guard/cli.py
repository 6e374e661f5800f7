"""The guard's command: fingerprint, check, verify, clear, purge, seal.

Exit codes: 0 done (check: fresh or resume), 1 failed or damage found, 2 usage, 3 stale, 4 not found, 5 the
model directory is in use, 130 interrupted. Results go to stdout, errors to stderr; with --json both are one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoints import (
    CHECKPOINT_NAME,
    Checkpoint,
    CheckpointState,
    list_checkpoints,
    scan_checkpoints,
    seal_checkpoint,
    verify_checkpoint,
)
from .clear import ClearPlan, plan_clear
from .cleared_sets import plan_purge, restore_set
from .completeness import recorded_step, why_incomplete
from .errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_STALE,
    EXIT_USAGE,
    GuardError,
    NotFound,
    SealBroken,
    UsageError,
    storage_errors,
)
from .fingerprint import Fingerprint, fingerprint_dataset
from .lock import ModelLock
from .metadata import MetadataKind, read_metadata, require_known_form, write_metadata
from .prepare import assess, make_metadata
from .recipe import proposed_run
from .seal import load_key
from .verdict import VerdictKind


@dataclass(frozen=True, kw_only=True)
class OwnModel:
    """A model directory whose settings the caller knows.

    They stand in for options that are not given.
    """

    model_dir: Path
    key_file: Path | None = None
    keep_sets: int | None = None
    keep_days: float | None = None
    keep_bytes: int | None = None

    def holds(self, folder: Path) -> bool:
        """Whether `folder` is this model directory, or a checkpoint in it."""
        own, folder = self.model_dir.resolve(), folder.resolve()
        return own in (folder, folder.parent)


def main(argv: list[str] | None = None, *, prog: str = "guard", own: OwnModel | None = None) -> int:
    """Run one command, print its result, and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names may hold any bytes, and characters that the terminal has not.
        is_utf8 = sys.stdout.encoding.lower() in ("utf-8", "utf8")
        sys.stdout.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")
    try:
        options = _parser(prog).parse_args(argv)
        options.own = own
    except SystemExit as exc:  # --help, or a wrong argument, which argparse has explained on stderr
        return exc.code if isinstance(exc.code, int) else EXIT_USAGE
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        code = command(options)
        sys.stdout.flush()
    except GuardError as exc:
        if options.json:
            error = {"operation": exc.operation, "path": exc.path, "cause": exc.cause, "hint": exc.hint}
            _print_json({"error": error, "exit_code": exc.exit_code})
        else:
            print(exc, file=sys.stderr)
        return exc.exit_code
    except BrokenPipeError:
        # The reader (head, less) had enough. Without this the interpreter complains once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return code


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="No run continues from a checkpoint that is not its own.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=command)
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        return sub

    sub = add("fingerprint", _fingerprint, "print the content digest of datasets, as b3sum does")
    sub.add_argument("files", nargs="+", type=Path, metavar="FILE")
    sub.add_argument(
        "--mode", choices=["content", "name_size"], default="content", help="name_size does not read the file"
    )

    sub = add(
        "check",
        _check,
        "say whether a run over this dataset starts fresh, resumes, or finds stale checkpoints",
    )
    sub.add_argument("model_dir", type=Path, metavar="MODEL_DIR")
    sub.add_argument("--dataset", type=Path, required=True, metavar="FILE")
    _add_recipe(sub)
    _add_key(sub)
    sub.add_argument("--no-digests", action="store_true", help="trust file sizes; do not read the checkpoint")

    sub = add("verify", _verify, "compare every checkpoint with its seal")
    sub.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="a model directory or one checkpoint")
    _add_key(sub)
    sub.add_argument("--no-digests", action="store_true", help="names and sizes only")

    sub = add("clear", _clear, "move stale checkpoints into .cleared/, or bring a set back")
    sub.add_argument("model_dir", type=Path, metavar="MODEL_DIR")
    choice = sub.add_mutually_exclusive_group()
    choice.add_argument("--dry-run", action="store_true", help="show the plan and change nothing")
    choice.add_argument("--restore", metavar="SET", help="bring back what was cleared into this set")
    sub.add_argument("--dataset", type=Path, metavar="FILE", help="clear for a run over this (default: as recorded)")
    _add_recipe(sub)
    _add_key(sub)

    sub = add("purge", _purge, "delete cleared sets for good; the newest is always kept")
    sub.add_argument("model_dir", type=Path, metavar="MODEL_DIR")
    sub.add_argument("--dry-run", action="store_true", help="show the plan and change nothing")
    sub.add_argument("--keep-sets", type=int, metavar="N", help="keep at most so many")
    sub.add_argument("--keep-days", type=float, metavar="DAYS", help="keep none that is older")
    sub.add_argument("--keep-bytes", type=int, metavar="BYTES", help="keep no more than this together")

    sub = add("seal", _seal, "seal a checkpoint that a script left, so that it can be verified and resumed from")
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    sub.add_argument("--dataset", type=Path, metavar="FILE", help="what it was trained on (default: as recorded)")
    _add_recipe(sub)
    _add_key(sub)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    text = "components in JSON or TOML (default: as recorded)"
    parser.add_argument("--recipe", type=Path, metavar="FILE", help=text)


def _add_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="the key that seals are made with (0600)")


def _key(options: argparse.Namespace, folder: Path) -> bytes | None:
    own: OwnModel | None = options.own
    key_file = options.key_file
    if key_file is None and own is not None and own.holds(folder):
        key_file = own.key_file
    return load_key(key_file) if key_file is not None else None


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))


def _require_folder(path: Path, operation: str) -> Path:
    with storage_errors(operation, path):
        is_folder = path.is_dir()
    if not is_folder:
        cause = "it is not a folder" if path.exists() else "there is no such folder"
        raise NotFound(operation=operation, path=path, cause=cause)
    return path


def _fingerprint(options: argparse.Namespace) -> int:
    results = []
    for path in options.files:
        found = fingerprint_dataset(path, mode=options.mode)
        results.append({"path": str(path), "name": found.name, "size_bytes": found.size_bytes, "digest": found.digest})
        if not options.json:
            print(_checksum_line(found.digest, str(path)), flush=True)
    if options.json:
        _print_json({"mode": options.mode, "files": results})
    return 0


def _checksum_line(digest: str, name: str) -> str:
    """As b3sum has it: a name with a newline or a backslash is escaped, and the line says so by its first character."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n")
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}"


def _check(options: argparse.Namespace) -> int:
    folder = _require_folder(options.model_dir, "check")
    reading = read_metadata(folder)
    require_known_form(folder, reading)
    run = proposed_run(dataset=options.dataset, recipe=options.recipe, metadata=reading)
    verdict = assess(folder, fingerprint=run, key=_key(options, folder), digests=not options.no_digests)
    strays = list_checkpoints(folder)[1]
    if options.json:
        ignored = [{"path": str(stray.path), "reason": stray.reason} for stray in strays]
        _print_json({**verdict.to_json(), "left_alone": ignored})
    else:
        print(verdict)
        for stray in strays:
            print(f"  {stray.path.name} is ignored: {stray.reason}")
        if verdict.kind is VerdictKind.STALE:
            print(f"hint: move them out of the way with: clear {folder} --dataset {options.dataset}")
    return EXIT_STALE if verdict.kind is VerdictKind.STALE else 0


def _verify(options: argparse.Namespace) -> int:
    folder = _require_folder(options.model_dir, "verify")
    key, digests = _key(options, folder), not options.no_digests
    if CHECKPOINT_NAME.fullmatch(folder.absolute().name):
        checkpoints: Sequence[Checkpoint] = [verify_checkpoint(folder, key=key, digests=digests)]
        strays = []
    else:
        checkpoints = scan_checkpoints(folder, key=key, digests=digests)
        strays = list_checkpoints(folder)[1]
    damaged = [c for c in checkpoints if c.state in (CheckpointState.TORN, CheckpointState.ALTERED)]
    if options.json:
        rows = [
            {
                "path": str(c.path),
                "step": c.step,
                "state": c.state.value,
                "size_bytes": c.size_bytes,
                "reason": c.reason,
            }
            for c in checkpoints
        ]
        ignored = [{"path": str(stray.path), "reason": stray.reason} for stray in strays]
        _print_json({"checkpoints": rows, "left_alone": ignored, "damaged": len(damaged)})
    elif not checkpoints and not strays:
        print(f"no checkpoints in {folder}")
    else:
        print(f"{'step':>10}  {'state':<9}{'bytes':>16}  why")
        for c in checkpoints:
            print(f"{c.step:>10}  {c.state.value:<9}{c.size_bytes:>16,}  {c.reason}".rstrip())
        for stray in strays:
            print(f"{'-':>10}  {'ignored':<9}{'-':>16}  {stray.path.name}: {stray.reason}")
    return EXIT_FAILED if damaged else 0


def _clear(options: argparse.Namespace) -> int:
    folder = _require_folder(options.model_dir, "clear")
    key = _key(options, folder)
    if options.dry_run:
        plan = _plan(folder, options, key)
        if options.json:
            _print_json({**plan.to_json(), "dry_run": True})
        else:
            print(plan)
        return 0
    with ModelLock(folder, owner="guard clear"):
        if options.restore is not None:
            result = restore_set(folder, options.restore)
            if options.json:
                paths = [str(path) for path in result.restored]
                _print_json({"restored": paths, "stamp_restored": result.metadata_restored})
            else:
                metadata = " and their metadata" if result.metadata_restored else ""
                print(f"restored {len(result.restored)} checkpoints{metadata} to {folder}")
            return 0
        plan = _plan(folder, options, key)
        if not options.json:
            print(plan)
        cleared = plan.execute()
        if options.json:
            _print_json({**plan.to_json(), "dry_run": False})
        elif cleared.set_path is not None:
            print(f"cleared; bring it back with: clear {folder} --restore {cleared.set_path.name}")
    return 0


def _plan(folder: Path, options: argparse.Namespace, key: bytes | None) -> ClearPlan:
    if options.dataset is None:
        return plan_clear(folder, key=key)
    reading = read_metadata(folder)
    require_known_form(folder, reading)
    run = proposed_run(dataset=options.dataset, recipe=options.recipe, metadata=reading)
    return plan_clear(folder, verdict=assess(folder, fingerprint=run, key=key), key=key)


def _purge(options: argparse.Namespace) -> int:
    folder = _require_folder(options.model_dir, "purge")
    own: OwnModel | None = options.own if options.own is not None and options.own.holds(folder) else None
    limits = {
        name: getattr(options, name) if getattr(options, name) is not None else getattr(own, name, None)
        for name in ("keep_sets", "keep_days", "keep_bytes")
    }
    if not any(limit is not None for limit in limits.values()):
        raise UsageError(
            operation="purge",
            path=folder,
            cause="nothing says what to keep",
            hint="--keep-sets N, --keep-days DAYS or --keep-bytes BYTES; the newest set is kept in any case",
        )
    with nullcontext() if options.dry_run else ModelLock(folder, owner="guard purge"):
        plan = plan_purge(folder, **limits)
        if not options.json:
            print(plan)
        if not options.dry_run:
            plan.execute()
        if options.json:
            _print_json({**plan.to_json(), "dry_run": options.dry_run})
    return 0


def _seal(options: argparse.Namespace) -> int:
    folder = _require_folder(options.checkpoint, "seal").absolute()
    model_dir, key = folder.parent, _key(options, folder)
    match = CHECKPOINT_NAME.fullmatch(folder.name)
    step = int(match[1]) if match else recorded_step(folder)
    if step is None:
        raise UsageError(
            operation="seal",
            path=folder,
            cause="neither its name nor trainer_state.json says its step",
            hint="name it checkpoint-<step>",
        )
    with ModelLock(model_dir, owner="guard seal"):
        with storage_errors("seal", folder):
            incomplete = why_incomplete(folder, step=step)
        if incomplete is not None:
            raise SealBroken(
                operation="seal", path=folder, cause=incomplete, hint="a torn checkpoint cannot be made whole"
            )
        run = _run_to_seal(model_dir, options)
        sealed = seal_checkpoint(folder, step=step, fingerprint=run, key=key)
        if match and read_metadata(model_dir).kind is MetadataKind.MISSING and options.dataset is not None:
            lora = {n.removeprefix("lora."): v for n, v in run.components.items() if n.startswith("lora.")}
            metadata = make_metadata(fingerprint=run, dataset_path=options.dataset, lora_config=lora)
            write_metadata(model_dir, metadata)
    if options.json:
        _print_json(
            {
                "path": str(sealed.path),
                "step": step,
                "size_bytes": sealed.size_bytes,
                "run": run.identity_digest,
            }
        )
    else:
        print(f"sealed {sealed.path} (step {step}, {sealed.size_bytes:,} bytes)")
    return 0


def _run_to_seal(model_dir: Path, options: argparse.Namespace) -> Fingerprint:
    """Whose checkpoint this is: as told, in agreement with the metadata, or else as recorded."""
    reading = read_metadata(model_dir)
    require_known_form(model_dir, reading)
    recorded = reading.run.fingerprint if reading.run is not None else None
    if options.dataset is None:
        if recorded is None or options.recipe is not None:
            raise UsageError(
                operation="seal",
                path=options.checkpoint,
                cause="what it was trained on is not known",
                hint="name the dataset: --dataset FILE [--recipe FILE]",
            )
        return recorded
    run = proposed_run(dataset=options.dataset, recipe=options.recipe, metadata=reading)
    if recorded is not None and not recorded.same_run(run):
        changes = "; ".join(recorded.explain_changes(run))
        raise SealBroken(
            operation="seal",
            path=options.checkpoint,
            cause=f"the metadata beside it is of another run: {changes}",
            hint="clear that run's checkpoints first, or name its dataset and recipe",
            exit_code=EXIT_STALE,
        )
    return run
