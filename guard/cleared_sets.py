"""What was cleared: list the sets under `.cleared/`, bring one back, delete old ones.

Purging is the only place where cleared checkpoints are deleted: by count, age and size. The newest set is always kept.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .atomic import PathLike, append_line_durable, fsync_dir, rename_durable
from .checkpoints import CHECKPOINT_NAME, list_checkpoints
from .clear import JOURNAL_NAME, SET_RECORD, cleared_at, sync_folders
from .errors import ClearRefused, NotFound, storage_errors
from .json_text import parse_json
from .layout import CLEARED_NAME, unused_name
from .lock import require_lock
from .metadata import RunMetadata, parse_metadata, read_metadata, require_known_form, write_metadata
from .seal import list_tree

# A set is renamed before it is deleted: a half-deleted one must not be offered for restoring.
_PURGING_PREFIX = ".purging-"


@dataclass(frozen=True, kw_only=True)
class RestoreResult:
    """What came back into the model directory."""

    restored: tuple[Path, ...]
    metadata_restored: bool


def list_cleared_sets(model_dir: PathLike) -> list[Path]:
    """List the sets under `.cleared/`, oldest first.

    Anything that is not named like a set is not one.
    """
    root = Path(model_dir, CLEARED_NAME)
    if root.is_symlink() or not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if cleared_at(path.name) and path.is_dir() and not path.is_symlink())


def restore_set(model_dir: PathLike, set_name: str) -> RestoreResult:
    """Move a set's checkpoints back with their metadata; under the model lock.

    Raises NotFound, and ClearRefused, with everything as it was, when a name is taken or checkpoints of
    another run are there. A crash half way is finished by calling it again.
    """
    folder = Path(model_dir)
    require_lock(folder, "restore")
    sets = list_cleared_sets(folder)
    source = Path(folder, CLEARED_NAME, set_name)
    if source not in sets:
        known = ", ".join(path.name for path in sets) or "none"
        raise NotFound(operation="restore", path=source, cause="there is no such set", hint=f"there are: {known}")

    with storage_errors("restore", source):
        members = [path for path in sorted(source.iterdir()) if CHECKPOINT_NAME.fullmatch(path.name)]
        metadata = _metadata_of(source)
        present = read_metadata(folder)
        require_known_form(folder, present)
        same_run = present.run is not None and metadata is not None and present.run.to_json() == metadata.to_json()
        # Without members a crash came right before the end, and only the empty set is left to remove.
        if members and list_checkpoints(folder)[0] and not same_run:
            raise _refusal(source, "the model directory holds checkpoints of another run", "clear those first")
        for path in members:
            if os.path.lexists(folder / path.name):
                raise _refusal(source, f"{path.name} exists", "clear it first")
        # The metadata first: a crash in between leaves metadata without checkpoints, which reads as FRESH.
        if members and metadata is not None and not same_run:
            write_metadata(folder, metadata)
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
        metadata_restored=bool(members) and metadata is not None and not same_run,
    )


def _metadata_of(set_path: Path) -> RunMetadata | None:
    """The metadata that the set's checkpoints had; None when it was missing or could not be read."""
    record: Any = None
    with suppress(OSError, ValueError):
        record = parse_json((set_path / SET_RECORD).read_bytes())
    raw = record.get("stamp") if isinstance(record, dict) else None
    return parse_metadata(raw).run if isinstance(raw, dict) else None


def _refusal(path: Path, cause: str, hint: str) -> ClearRefused:
    return ClearRefused(operation="restore", path=path, cause=cause, hint=hint)


@dataclass(frozen=True, kw_only=True)
class SetToPurge:
    """A set that is to be deleted, and why."""

    path: Path
    size_bytes: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class PurgeResult:
    """The names of the sets that were deleted, and their bytes."""

    purged: tuple[str, ...]
    size_bytes: int


@dataclass(kw_only=True)
class PurgePlan:
    """What would be deleted for good, and why. `execute` runs it once."""

    model_dir: Path
    sets: tuple[SetToPurge, ...]
    kept: tuple[Path, ...]
    leftovers: tuple[Path, ...]
    _executed: bool = field(default=False, init=False)

    @property
    def size_bytes(self) -> int:
        """Bytes of everything that is deleted."""
        return sum(item.size_bytes for item in self.sets)

    def __str__(self) -> str:
        if not self.sets and not self.leftovers:
            lines = [f"nothing to purge in {self.model_dir}"]
        else:
            width = max((len(item.path.name) for item in self.sets), default=0)
            lines = [f"delete {len(self.sets)} cleared sets of {self.model_dir} ({self.size_bytes:,} bytes)"]
            lines += [f"  {item.path.name:<{width}}  {item.size_bytes:>15,} bytes  {item.reason}" for item in self.sets]
            lines += [f"  {path.name} is left of a purge that was cut off" for path in self.leftovers]
        return "\n".join([*lines, f"kept: {len(self.kept)} sets"])

    def to_json(self) -> dict[str, Any]:
        """The plan as `--json` prints it."""
        return {
            "sets": [
                {"set": item.path.name, "size_bytes": item.size_bytes, "reason": item.reason} for item in self.sets
            ],
            "kept": [path.name for path in self.kept],
            "leftovers": [path.name for path in self.leftovers],
            "size_bytes": self.size_bytes,
        }

    def execute(self) -> PurgeResult:
        """Delete, under the model directory's lock. Raises ClearRefused the second time, StorageError."""
        require_lock(self.model_dir, "purge")
        if self._executed:
            raise ClearRefused(operation="purge", path=self.model_dir, cause="this plan was executed already")
        self._executed = True
        for path in self.leftovers:
            with storage_errors("purge", path):
                shutil.rmtree(path)
        for item in self.sets:
            with storage_errors("purge", item.path):
                root = item.path.parent
                entry = {"event": "clear.purged", "set": item.path.name, "size_bytes": item.size_bytes}
                append_line_durable(root / JOURNAL_NAME, json.dumps({**entry, "reason": item.reason}))
                trash = root / unused_name(root, _PURGING_PREFIX + item.path.name)
                rename_durable(item.path, trash)
                shutil.rmtree(trash)
        return PurgeResult(purged=tuple(item.path.name for item in self.sets), size_bytes=self.size_bytes)


def plan_purge(
    model_dir: PathLike,
    *,
    keep_sets: int | None = None,
    keep_days: float | None = None,
    keep_bytes: int | None = None,
    now: datetime | None = None,
) -> PurgePlan:
    """Plan which sets to delete; changes nothing.

    Kept are at most `keep_sets` sets, none older than `keep_days`, and no more than `keep_bytes` together,
    from the newest on. None is no limit. The newest set is always kept.
    """
    moment = (now if now is not None else datetime.now(UTC)).astimezone(UTC)
    to_purge: list[SetToPurge] = []
    kept: list[Path] = []
    kept_bytes = 0
    with storage_errors("plan a purge of", model_dir):
        for path in reversed(list_cleared_sets(model_dir)):
            size_bytes = list_tree(path).size_bytes
            days = (moment - (cleared_at(path.name) or moment)).total_seconds() / 86_400
            reason = None
            if kept and keep_sets is not None and len(kept) >= keep_sets:
                reason = f"more than {keep_sets} sets"
            elif kept and keep_days is not None and days > keep_days:
                reason = f"{days:.1f} days old, more than {keep_days:g}"
            elif kept and keep_bytes is not None and kept_bytes + size_bytes > keep_bytes:
                reason = f"more than {keep_bytes:,} bytes"
            if reason is None:
                kept.append(path)
                kept_bytes += size_bytes
            else:
                to_purge.append(SetToPurge(path=path, size_bytes=size_bytes, reason=reason))
        root = Path(model_dir, CLEARED_NAME)
        leftovers = sorted(root.glob(_PURGING_PREFIX + "*")) if root.is_dir() and not root.is_symlink() else []
    return PurgePlan(
        model_dir=Path(model_dir),
        sets=tuple(reversed(to_purge)),
        kept=tuple(kept),
        leftovers=tuple(leftovers),
    )


def purge_cleared(
    model_dir: PathLike,
    *,
    keep_sets: int | None = None,
    keep_days: float | None = None,
    keep_bytes: int | None = None,
    now: datetime | None = None,
) -> PurgeResult:
    """Plan and execute."""
    return plan_purge(model_dir, keep_sets=keep_sets, keep_days=keep_days, keep_bytes=keep_bytes, now=now).execute()
