"""Versions that the gate holds: made current by a person, or given up. The caller holds the model lock."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from daemon import versions
from daemon.errors import DropforgeError
from daemon.job import utc_now
from daemon.lineage import DISCARDED, HELD, PROMOTED, Lineage, read_lineage
from daemon.memory.forgetting import forget
from daemon.memory.store import Discarded, dataset_dir, memory_dir_of, read_memory
from daemon.versions import Version
from guard.atomic import fsync_dir
from guard.lock import require_lock

LIST_HINT = "`dropforge versions` says which versions are held"


def promote_held(model_dir: Path, name: str, *, force: bool = False) -> Version:
    """Make a held version the current one. Can be repeated after a crash: the lineage is written first.

    Raises NotFound, DropforgeError when it is not held, is damaged, or (without `force`) does not continue the current version.
    """
    require_lock(model_dir, "promote")
    version = versions.find_version(model_dir, name)
    lineage = read_lineage(model_dir)
    if version.name == lineage.current:
        versions.point_latest(model_dir, version)  # a crash may have come in between
        return version
    _require_held(version, lineage, operation="promote")
    if found := versions.damage(version):
        raise DropforgeError(
            operation="promote",
            subject=f"version {version.name}",
            cause="; ".join(found),
            hint=f"bring it back from a backup, or `dropforge discard {int(version.name)}`",
        )
    parent = lineage.recorded()[version.name].get("parent")
    if parent != lineage.current and not force:
        raise DropforgeError(
            operation="promote",
            subject=f"version {version.name}",
            cause=f"it continues version {parent}, and {lineage.current} is current: what was learned since would be lost",
            hint="--force makes it current all the same; dropping its file again trains it on top of the current version",
        )
    versions.record_event(model_dir, PROMOTED, version, promoted_by="person", promoted_at=utc_now())
    versions.point_latest(model_dir, version)
    return version


def discard_held(model_dir: Path, state_dir: Path, name: str) -> Mapping[str, Any]:
    """Delete a held version, and what is kept of its dataset where no other version has learned it; returns its record.

    Can be repeated after a crash: the lineage is written first. Raises NotFound, DropforgeError when it is not held, OSError.
    """
    require_lock(model_dir, "discard")
    number = f"{int(name):04d}" if name.isdecimal() else name
    if number not in read_lineage(model_dir).discarded():
        version = versions.find_version(model_dir, name)
        _require_held(version, read_lineage(model_dir), operation="discard")
        versions.record_event(model_dir, DISCARDED, version, discarded_at=utc_now())
    remove_discarded(model_dir)
    record = read_lineage(model_dir).discarded()[number]
    dataset = str(record.get("dataset_digest") or "")
    if dataset and not versions.learned_by(model_dir, dataset):
        _delete_memory(state_dir, dataset)
    return record


def remove_discarded(model_dir: Path) -> list[str]:
    """Delete the folders of discarded versions; returns their names. Raises OSError."""
    gone = read_lineage(model_dir).discarded()
    removed = [version for version in versions.list_versions(model_dir) if version.name in gone]
    for version in removed:
        # Out of the way by one rename: half a folder is no version.
        doomed = version.path.with_name(f".discarded-{version.name}")
        version.path.rename(doomed)
        fsync_dir(version.path.parent)
        shutil.rmtree(doomed)
    for leftover in (model_dir / versions.VERSIONS).glob(".discarded-*"):
        shutil.rmtree(leftover)
    return [version.name for version in removed]


def _require_held(version: Version, lineage: Lineage, *, operation: str) -> None:
    if lineage.recorded().get(version.name, {}).get("event") == HELD:
        return
    raise DropforgeError(
        operation=operation,
        subject=f"version {version.name}",
        cause="it is current now" if version.name == lineage.current else "the gate does not hold it",
        hint=f"`dropforge rollback {int(version.name)}` makes it current" if operation == "promote" else LIST_HINT,
    )


def _delete_memory(state_dir: Path, dataset: str) -> None:
    """Delete what is kept of a dataset, its folder as well; also what an earlier call left of it. Raises OSError."""
    folder = dataset_dir(memory_dir_of(state_dir), dataset)
    with suppress(ValueError):  # damaged: it goes all the same
        if (memory := read_memory(folder)) is not None:
            forget(state_dir, memory, Discarded.DELETED)
    if folder.is_dir():
        shutil.rmtree(folder)
