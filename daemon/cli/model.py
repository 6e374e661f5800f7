"""Commands about the model directory: versions, rollback, merge, guard."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from daemon import version_pruning, versions
from daemon.base_identity import BaseChange, base_change, find_base, identify_base, recorded_base, remembered
from daemon.cli import completion, render
from daemon.cli.account import require_own_account
from daemon.cli.app import MODEL, JsonFlag, app, print_json
from daemon.cli.app import out as out_console
from daemon.cli.gate import change_version, show_matrix
from daemon.config import Settings
from daemon.errors import ConfigError, DropforgeError
from daemon.lineage import read_lineage
from daemon.processes import child_environment
from daemon.text import escape

versions_app = typer.Typer(help="List finished adapters; move old ones aside.")
app.add_typer(versions_app, name="versions", rich_help_panel=MODEL)


@versions_app.callback(invoke_without_command=True)
def show_versions(
    context: typer.Context,
    *,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="What each version scored on each dataset's held-out rows.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="With --matrix: a .png, .svg or .pdf file; it is replaced."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """List finished adapters, oldest first: what each continued, its dataset, its held-out loss before and after.

    Example: dropforge versions --json
    """
    if context.invoked_subcommand is not None:
        return
    model_dir = context.obj.settings.model_dir
    if output is not None and (as_json or not matrix):
        cause = "--json and --output are two ways out" if as_json else "--output draws the matrix alone"
        raise ConfigError(operation="list versions", cause=cause, hint="`dropforge versions --matrix -o matrix.svg`")
    if matrix:
        show_matrix(context.obj.settings, as_json=as_json, output=output)
        return
    held = read_lineage(model_dir).held()
    found = versions.list_versions(model_dir)
    current = versions.current_version(model_dir)
    if as_json:
        listed = [
            {
                **version.record,
                "version": version.name,
                "path": str(version.path),
                "current": version == current,
                "held": version.name in held,
            }
            for version in found
        ]
        print_json({"versions": listed})
    elif found:
        out_console.print(render.version_list(found, current, held, _history(model_dir)))
    else:
        out_console.print("no versions yet: nothing has been trained to its end")


def _history(model_dir: Path) -> list[str]:
    """What a list of versions does not show: a rollback that still counts, and versions that were moved aside."""
    said = []
    rolled_back = read_lineage(model_dir).rolled_back
    if rolled_back is not None:
        replaced, at = str(rolled_back.get("replaced") or ""), render.clock(str(rolled_back.get("at", "")))
        back = (
            f" from {escape(replaced)}; `dropforge rollback {escape(replaced.lstrip('0'))}` returns" if replaced else ""
        )
        said.append(f"rolled back at {escape(at)}{back}")
    if aside := version_pruning.list_pruned(model_dir):
        named = (
            f"version {aside[0].name} is"
            if len(aside) == 1
            else f"{len(aside)} versions, {aside[0].name} to {aside[-1].name}, are"
        )
        said.append(f"{named} moved aside; `dropforge rollback N` brings one back")
    return said


@app.command("merge", rich_help_panel=MODEL)
def merge_version(
    context: typer.Context,
    version: Annotated[str, typer.Argument(help="A version's number, or `latest`.", autocompletion=completion.version)],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
) -> None:
    """Write a version merged into its base model, in bfloat16, for programs that know no adapters.

    Example: dropforge merge latest merged
    """
    settings = context.obj.settings
    found = versions.current_version(settings.model_dir) if version == "latest" else None
    found = found or versions.find_version(settings.model_dir, version)
    if damage := versions.damage(found):
        raise DropforgeError(
            operation="merge",
            subject=f"version {found.name}",
            cause="; ".join(damage),
            hint="bring the version back from a backup, or merge another one",
        )
    # In a process of its own: only the trainer's package imports torch.
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "daemon.trainer.merge"),
            *(str(found.path), str(out.absolute()), settings.recipe.model.model_dump_json()),
            *(str(settings.root), str(settings.state_dir)),
        ],
        capture_output=True,
        text=True,
        env=child_environment(),
        check=False,
    )
    try:
        reply = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        reply = {"error": (done.stderr.strip().splitlines() or ["it ended without a word"])[-1], "hint": ""}
    if "error" in reply:
        raise DropforgeError(
            operation="merge", subject=f"version {found.name}", cause=reply["error"], hint=reply.get("hint", "")
        )
    out_size = f"{reply['parameters']:,} parameters, {reply['size_bytes'] / 1e6:,.1f} MB"
    probe = reply["probe"]
    for warning in reply["warnings"]:
        out_console.print(f"warning: {escape(warning, most=1000)}", markup=False)
    out_console.print(f"version {found.name} merged into {out}: {out_size}", markup=False)
    out_console.print(
        f"checked against base and adapter: in bfloat16 logits differ by at most {probe['largest_difference']:.3g}"
        f" (the largest is {probe['largest_logit']:.3g}), the best token is the same at {probe['same_best_token']:.1%}",
        markup=False,
    )


@app.command("rollback", rich_help_panel=MODEL)
def roll_back(
    context: typer.Context,
    version: Annotated[str, typer.Argument(help="An earlier version: 0003, or 3.", autocompletion=completion.version)],
    after_job: Annotated[bool, typer.Option("--after-job", help="Wait until the running job has ended.")] = False,
) -> None:
    """Make an earlier version the current one. The next dataset continues from it; nothing is deleted.

    Example: dropforge rollback 3 --after-job
    """
    settings: Settings = context.obj.settings
    found = version_pruning.find_any_version(settings.model_dir, version)  # before any waiting

    def bring_back_and_roll_back() -> versions.Version:
        version_pruning.bring_back(settings.model_dir, found.name)
        return versions.rollback(settings.model_dir, found.name, after_job=after_job)

    done = change_version(settings, "roll back", bring_back_and_roll_back, after_job=after_job)
    out_console.print(
        f"version {done.name} is current now: {escape(str(done.record.get('dataset', '')))}", markup=False
    )
    rolled_back = read_lineage(settings.model_dir).rolled_back or {}
    if rolled_back.get("version") == done.name and (replaced := str(rolled_back.get("replaced") or "")):
        back = escape(replaced.lstrip("0"))
        out_console.print(f"it replaced version {escape(replaced)}; `dropforge rollback {back}` returns", markup=False)
    if (change := _base_change(settings, done)) is not None:
        out_console.print(f"warning: {change.message}; the queue is held for it: {change.hint}", markup=False)


@app.command(rich_help_panel=MODEL)
def adopt(context: typer.Context) -> None:
    """Say that what lies in state/, current_model/ and inbox/ now is meant, after the queue was held for it.

    For example after `current_model` was emptied on purpose: `dropforge adopt`. Nothing is deleted or moved.

    Example: dropforge adopt
    """
    from daemon import root_identity

    settings: Settings = context.obj.settings
    for change in root_identity.adopt(settings) or ["the parts of this root belong together: nothing to adopt"]:
        out_console.print(change, markup=False)


def _base_change(settings: Settings, version: versions.Version) -> BaseChange | None:
    """How the configured base differs from the one that a version was trained on; None where it does not, or where nothing tells."""
    base, recorded = find_base(settings.recipe.model, settings.root), recorded_base(versions.promotion_record(version))
    if base is None or recorded is None:
        return None
    return base_change(version.name, recorded, identify_base(base, remembered(settings.state_dir)))


@app.command(
    "guard",
    rich_help_panel=MODEL,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def guard_command(context: typer.Context) -> None:
    """Fingerprints, verdicts, seals and clearing by hand: fingerprint | check | verify | clear | purge | seal.

    Example: dropforge guard verify current_model
    """
    from guard.cli import OwnModel
    from guard.cli import main as guard_main

    settings: Settings = context.obj.settings
    if {"clear", "purge", "seal"} & set(context.args):
        require_own_account(settings)
    policy = settings.guard
    own = OwnModel(
        model_dir=settings.model_dir,
        key_file=settings.root / policy.key_file if policy.key_file else None,
        keep_sets=policy.keep_cleared_sets,
        keep_days=policy.keep_cleared_days,
        keep_bytes=policy.keep_cleared_bytes,
    )
    raise typer.Exit(guard_main(context.args, prog="dropforge guard", own=own))
