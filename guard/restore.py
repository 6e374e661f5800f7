"""Bringing a cleared set back."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .atomic import PathLike, append_line_durable, fsync_dir
from .checkpoints import CHECKPOINT_NAME, list_checkpoints
from .clear import JOURNAL_NAME, SET_RECORD, cleared_at, sync_folders
from .errors import ClearRefused, NotFound, storage_errors
from .layout import CLEARED_NAME
from .lock import require_lock
from .metadata import Stamp, interpret_stamp, read_stamp, require_known_form, write_stamp


@dataclass(frozen=True, kw_only=True)
class RestoreResult:
    restored: tuple[Path, ...]
    stamp_restored: bool


def cleared_sets(model_dir: PathLike) -> list[Path]:
    """The sets under `.cleared/`, oldest first; anything that is not named like a set is not one."""
    root = Path(model_dir, CLEARED_NAME)
    if root.is_symlink() or not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if cleared_at(path.name) and path.is_dir() and not path.is_symlink())


def restore_set(model_dir: PathLike, set_name: str) -> RestoreResult:
    """Move the checkpoints of a set back, with the stamp that they had; under the model directory's lock.

    Raises NotFound, and ClearRefused, with everything as it was, when a name is taken or checkpoints of
    another run are there. A crash half way is finished by calling it again.
    """
    folder = Path(model_dir)
    require_lock(folder, "restore")
    sets = cleared_sets(folder)
    source = Path(folder, CLEARED_NAME, set_name)
    if source not in sets:
        known = ", ".join(path.name for path in sets) or "none"
        raise NotFound(operation="restore", path=source, cause="there is no such set", hint=f"there are: {known}")

    with storage_errors("restore", source):
        members = [path for path in sorted(source.iterdir()) if CHECKPOINT_NAME.fullmatch(path.name)]
        stamp = _stamp_of(source)
        present = read_stamp(folder)
        require_known_form(folder, present)
        same_run = present.stamp is not None and stamp is not None and present.stamp.to_json() == stamp.to_json()
        # Without members a crash came right before the end, and only the empty set is left to remove.
        if members and list_checkpoints(folder)[0] and not same_run:
            raise _refusal(source, "the model directory holds checkpoints of another run", "clear those first")
        for path in members:
            if os.path.lexists(folder / path.name):
                raise _refusal(source, f"{path.name} exists", "clear it first")
        # The stamp first: a crash in between leaves a stamp without checkpoints, which reads as FRESH.
        if members and stamp is not None and not same_run:
            write_stamp(folder, stamp)
        for path in members:
            path.rename(folder / path.name)
        sync_folders([folder, source])
        entry = {"event": "clear.restored", "set": set_name, "restored": [path.name for path in members]}
        append_line_durable(source.parent / JOURNAL_NAME, json.dumps(entry))
        if {path.name for path in source.iterdir()} <= {SET_RECORD}:
            (source / SET_RECORD).unlink(missing_ok=True)
            source.rmdir()
            fsync_dir(source.parent)
    return RestoreResult(
        restored=tuple(folder / path.name for path in members),
        stamp_restored=bool(members) and stamp is not None and not same_run,
    )


def _stamp_of(set_path: Path) -> Stamp | None:
    """The stamp that the set's checkpoints had; None when it was missing or could not be read."""
    record: Any = None
    with suppress(OSError, ValueError, RecursionError):
        record = json.loads((set_path / SET_RECORD).read_bytes())
    raw = record.get("stamp") if isinstance(record, dict) else None
    return interpret_stamp(raw).stamp if isinstance(raw, dict) else None


def _refusal(path: Path, cause: str, hint: str) -> ClearRefused:
    return ClearRefused(operation="restore", path=path, cause=cause, hint=hint)
