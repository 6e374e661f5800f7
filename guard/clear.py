"""Clearing: stale checkpoints are moved out of the way, into `.cleared/<time>-<reason>/`, never deleted.

First a plan, which changes nothing and prints itself; then `execute`, once. What may be planned follows from
the verdict: of a run that can be resumed only what it skipped, everything when nothing can be resumed.
Only folders named `checkpoint-<number>` and what is left in `.staging/` are ever planned, so a promoted
version is out of reach.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

from .atomic import PathLike, append_line_durable, fsync_dir, write_atomic
from .checkpoints import Stray, list_checkpoints, scan_checkpoints, verify_checkpoint
from .errors import ClearRefused, GuardError, NotFound, UsageError, explain_os_error, hint_for, storage_errors
from .layout import CLEARED_NAME, STAGING_NAME, TRASH_PREFIX, ensure_own_folder, ensure_staging, unused_name
from .lock import require_lock
from .metadata import load_raw_metadata, read_metadata, require_known_form
from .seal import list_tree
from .verdict import Verdict, VerdictCause, VerdictKind, decide, explain_skipped

SET_NAME: Final = re.compile(r"\d{8}T\d{6}Z-[a-z0-9-]+")
SET_RECORD: Final = "clear.json"
JOURNAL_NAME: Final = "journal.jsonl"


def cleared_at(set_name: str) -> datetime | None:
    """Read from a set's name when it was cleared; None for a name that no set has."""
    if SET_NAME.fullmatch(set_name) is None:
        return None
    with suppress(ValueError):  # digits that are no moment
        return datetime.strptime(set_name[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return None


class Logger(Protocol):
    """What a standard logger and a structlog logger have in common."""

    def info(self, event: str, /) -> object: ...


@dataclass(frozen=True, kw_only=True)
class Move:
    """One rename of a plan.

    `source` is relative to the model directory, `target` to the set. `identity` is (device, inode).
    """

    source: str
    target: str
    size_bytes: int
    is_checkpoint: bool
    identity: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ClearResult:
    """`cleared` counts checkpoint folders; leftovers of `.staging/` are in `size_bytes` but not in it."""

    set_path: Path | None
    cleared: int
    size_bytes: int


@dataclass(kw_only=True)
class ClearPlan:
    """What would be moved, why, how many bytes, where to. `execute` runs it once."""

    model_dir: Path
    set_path: Path
    reason: str
    why: tuple[str, ...]
    moves: tuple[Move, ...]
    ignored: tuple[Stray, ...]
    trash: tuple[Path, ...]
    protected: Path | None
    cleared_at: str
    _executed: bool = field(default=False, init=False)

    @property
    def size_bytes(self) -> int:
        """Bytes of everything that is moved."""
        return sum(move.size_bytes for move in self.moves)

    @property
    def cleared(self) -> int:
        """How many checkpoints are moved, leftovers of `.staging/` not counted."""
        return sum(move.is_checkpoint for move in self.moves)

    def __str__(self) -> str:
        if not self.moves:
            lines = [f"nothing to clear in {self.model_dir}"]
        else:
            width = max(len(move.source) for move in self.moves)
            lines = [f"clear {self.model_dir} ({self.reason})"]
            lines += [f"  {move.source:<{width}}  {move.size_bytes:>15,} bytes" for move in self.moves]
            lines += [f"to {self.set_path} ({len(self.moves)} folders, {self.size_bytes:,} bytes)"]
        lines += [f"because {why}" for why in self.why]
        if self.protected is not None:
            lines.append(f"kept: {self.protected.name}, the newest intact checkpoint of the run in progress")
        lines += [f"left alone: {stray.path.name}: {stray.reason}" for stray in self.ignored]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The plan as `--json` and the set's record have it."""
        return {
            "model_dir": str(self.model_dir),
            "set": self.set_path.name if self.moves else None,
            "reason": self.reason,
            "why": list(self.why),
            "moves": [{"from": move.source, "to": move.target, "size_bytes": move.size_bytes} for move in self.moves],
            "cleared": self.cleared,
            "size_bytes": self.size_bytes,
            "kept": str(self.protected) if self.protected is not None else None,
            "left_alone": [{"path": str(stray.path), "reason": stray.reason} for stray in self.ignored],
        }

    def execute(self, logger: Logger | None = None) -> ClearResult:
        """Move everything, under the model lock; all or nothing unless the process is killed.

        Raises ClearRefused, with everything as it was, when something changed since the plan, does not belong
        to us, or the file system says no; also the second time.
        """
        require_lock(self.model_dir, "clear")
        if self._executed:
            raise self._refusal("this plan was executed already", "plan again")
        self._executed = True
        for path in self.trash:
            with storage_errors("remove", path):
                _remove(path)
        if not self.moves:
            return ClearResult(set_path=None, cleared=0, size_bytes=0)
        for move in self.moves:
            self._require_movable(move)
        self._move_all()
        if logger is not None:
            summary = f"cleared {self.cleared} checkpoints ({self.size_bytes:,} bytes) to {self.set_path}"
            logger.info(summary)
        return ClearResult(set_path=self.set_path, cleared=self.cleared, size_bytes=self.size_bytes)

    def _refusal(self, cause: str, hint: str = "") -> ClearRefused:
        return ClearRefused(operation="clear", path=self.model_dir, cause=cause, hint=hint)

    def _require_movable(self, move: Move) -> None:
        source = self.model_dir / move.source
        if self.protected is not None and source == self.protected:
            raise self._refusal(f"{move.source} is the last intact checkpoint of the run in progress")
        try:
            status = source.lstat()
        except OSError as exc:
            raise self._refusal(f"{move.source} changed since the plan: {explain_os_error(exc)}", "plan again") from exc
        if (status.st_dev, status.st_ino) != move.identity:
            raise self._refusal(f"{move.source} is not what it was when this was planned", "plan again")
        if os.geteuid() not in (0, status.st_uid):
            hint = "clear as that user, or as root"
            raise self._refusal(f"{move.source} belongs to user {status.st_uid}, and we are {os.geteuid()}", hint)
        # A folder that changes its parent must be writable itself: its ".." is rewritten.
        for folder in {source.parent, source} if stat.S_ISDIR(status.st_mode) else {source.parent}:
            if not os.access(folder, os.W_OK | os.X_OK):
                raise self._refusal(f"{folder} is not writable", "check who owns it, and its permissions")

    def _move_all(self) -> None:
        cleared_root = self.model_dir / CLEARED_NAME
        root_existed = os.path.lexists(cleared_root)
        journal = cleared_root / JOURNAL_NAME
        journal_existed = os.path.lexists(journal)
        moved: list[tuple[Path, Path]] = []
        set_made = False
        try:
            ensure_own_folder(self.model_dir, CLEARED_NAME)
            self.set_path.mkdir()
            set_made = True
            record = {
                **self.to_json(),
                "cleared_at": self.cleared_at,
                "stamp": load_raw_metadata(self.model_dir),
            }
            # A crash must leave no temporary file in the set: those have a place of their own.
            staging = ensure_staging(self.model_dir)
            write_atomic(self.set_path / SET_RECORD, json.dumps(record, indent=1) + "\n", temp_dir=staging)
            _note(journal, event="clear.begun", set=self.set_path.name, reason=self.reason, at=self.cleared_at)
            for move in self.moves:
                source, target = self.model_dir / move.source, self.set_path / move.target
                target.parent.mkdir(exist_ok=True)
                source.rename(target)
                moved.append((source, target))
            sync_folders([folder for pair in moved for folder in (pair[1].parent, pair[0].parent)])
            fsync_dir(cleared_root)
            _note(
                journal, event="clear.done", set=self.set_path.name,
                cleared=self.cleared, size_bytes=self.size_bytes,
            )  # fmt: skip
        except (OSError, GuardError) as exc:
            _undo(moved)
            if set_made:
                _drop_set(self.set_path)
            if not journal_existed:
                with suppress(OSError):
                    journal.unlink()
            elif set_made:
                with suppress(OSError):
                    _note(journal, event="clear.undone", set=self.set_path.name)
            if not root_existed:
                with suppress(OSError):
                    cleared_root.rmdir()
            if isinstance(exc, GuardError):
                raise self._refusal(exc.cause, exc.hint) from exc
            raise self._refusal(explain_os_error(exc), hint_for(exc)) from exc


def _note(journal: Path, **entry: Any) -> None:
    append_line_durable(journal, json.dumps(entry))


def sync_folders(folders: Iterable[Path]) -> None:
    """Make the entries of each folder durable, once each."""
    for folder in dict.fromkeys(folders):
        fsync_dir(folder)


def _undo(moved: list[tuple[Path, Path]]) -> None:
    for source, target in reversed(moved):
        with suppress(OSError):  # what cannot be moved back stays in the set, whole, and can be restored from there
            target.rename(source)


def _drop_set(set_path: Path) -> None:
    """Remove a set that came to nothing; one that still holds something stays."""
    with suppress(OSError):
        (set_path / "staging").rmdir()
    with suppress(OSError):
        if {entry.name for entry in set_path.iterdir()} <= {SET_RECORD}:
            (set_path / SET_RECORD).unlink(missing_ok=True)
            set_path.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def plan_clear(
    model_dir: PathLike,
    *,
    verdict: Verdict | None = None,
    reason: str | None = None,
    key: bytes | None = None,
    now: datetime | None = None,
) -> ClearPlan:
    """Plan what to move out of the way; changes nothing.

    STALE: every checkpoint. RESUME: what was skipped. FRESH: none. Leftovers of `.staging/` in any case.
    Without a `verdict` the metadata speaks for the run in progress: if that can be resumed, whatever is not
    intact and its own is planned; otherwise everything. Raises NotFound, MetadataTooNew, StorageError, and
    UsageError when that cannot be judged without the key that the seals were made with.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise NotFound(operation="clear", path=folder, cause="there is no such folder")
    require_known_form(folder, read_metadata(folder))
    listed, strays = list_checkpoints(folder)
    why: tuple[str, ...] = verdict.reasons if verdict is not None else ()
    if verdict is None:
        verdict, sources, why = _judge_run_in_progress(folder, key)
    elif verdict.kind is VerdictKind.STALE:
        sources = [path for _, path in listed]
    else:
        sources = [checkpoint.path for checkpoint in verdict.skipped]
    protected = verdict.checkpoint.path if verdict.checkpoint is not None else None
    moment = now if now is not None else datetime.now(UTC)
    reason = reason if reason is not None else reason_of(verdict)
    cleared_root = folder / CLEARED_NAME
    name = f"{moment.astimezone(UTC):%Y%m%dT%H%M%SZ}-{_slug(reason)}"
    with storage_errors("plan a clear of", folder):
        moves = [_plan_move(folder, path, path.name, is_checkpoint=True) for path in sources if path != protected]
        leftovers, trash = _staging_leftovers(folder)
        moves += [_plan_move(folder, path, f"staging/{path.name}", is_checkpoint=False) for path in leftovers]
    return ClearPlan(
        model_dir=folder,
        set_path=cleared_root / unused_name(cleared_root, name),
        reason=reason,
        why=why if moves else (),
        moves=tuple(moves),
        ignored=tuple(strays),
        trash=tuple(trash),
        protected=protected,
        cleared_at=moment.astimezone(UTC).isoformat(timespec="seconds"),
    )


def _judge_run_in_progress(folder: Path, key: bytes | None) -> tuple[Verdict, list[Path], tuple[str, ...]]:
    """The verdict for the run of the metadata itself, what to clear beside it, and why."""
    reading = read_metadata(folder)
    checkpoints = scan_checkpoints(folder, key=key)
    if keyed := [item.path.name for item in checkpoints if item.needs_key]:
        cause = f"{keyed[-1]} is sealed with a key, and none was given"
        raise UsageError(operation="clear", path=folder, cause=cause, hint="name the key file that sealed it")
    recorded = reading.run.fingerprint if reading.run is not None else None
    if recorded is None:
        reasons = (f"whose checkpoints these are is not known: {reading.reason}",) if checkpoints else ()
        cause = VerdictCause.METADATA_UNKNOWN if checkpoints else VerdictCause.NO_CHECKPOINTS
        return Verdict(cause=cause, reasons=reasons), [item.path for item in checkpoints], reasons
    # What is protected must be worth it: of this run's own, the digests are taken as well.
    checked = [verify_checkpoint(item.path, key=key) if item.belongs_to(recorded) else item for item in checkpoints]
    verdict = decide(metadata=reading, fingerprint=recorded, checkpoints=checked)
    if verdict.kind is not VerdictKind.RESUME:
        return verdict, [item.path for item in checked], verdict.reasons
    others = [item for item in checked if not item.belongs_to(recorded)]
    return (
        verdict,
        [item.path for item in others],
        tuple(explain_skipped(item, recorded) for item in others),
    )


def _plan_move(model_dir: Path, path: Path, target: str, *, is_checkpoint: bool) -> Move:
    status = path.lstat()
    is_folder = stat.S_ISDIR(status.st_mode)
    return Move(
        source=path.relative_to(model_dir).as_posix(),
        target=target,
        size_bytes=list_tree(path).size_bytes if is_folder else status.st_size,
        is_checkpoint=is_checkpoint,
        identity=(status.st_dev, status.st_ino),
    )


def _staging_leftovers(model_dir: Path) -> tuple[list[Path], list[Path]]:
    """What a crash left in `.staging/`: to keep, and what was given up on purpose before."""
    staging = model_dir / STAGING_NAME
    if staging.is_symlink():
        raise OSError(errno.ELOOP, "the staging folder is a symbolic link", str(staging))
    if not staging.is_dir():
        return [], []
    entries = sorted(staging.iterdir())
    trash = [path for path in entries if path.name.startswith(TRASH_PREFIX)]
    return [path for path in entries if path not in trash], trash


def reason_of(verdict: Verdict) -> str:
    """Two or three words for the name of the set."""
    if verdict.kind is VerdictKind.RESUME:
        return "not of this run"
    if verdict.kind is VerdictKind.FRESH:
        return "torn staging"
    if verdict.changed:
        name = verdict.changed[0]
        return "dataset changed" if name.startswith("dataset.") else f"{name} changed"
    return verdict.cause.value


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].rstrip("-") or "cleared"
