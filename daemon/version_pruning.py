"""Old versions that are no longer kept: planned as a value, moved aside, brought back or deleted after a while.

Moving is one rename within `versions/`, told in the lineage first; deleting is left to a later promotion. What a version
was made of stays known: its line in the lineage, its dataset's memory and its numbers are not touched.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import guard
from daemon import versions
from daemon.errors import DropforgeError, NotFound
from daemon.job import utc_now
from daemon.lineage import PRUNED, VERSION_NAME, Lineage, append_event, number_of, read_lineage
from daemon.versions import VERSIONS, Version
from guard.atomic import make_folder_durable, rename_durable
from guard.lock import require_lock
from guard.seal import list_tree

if TYPE_CHECKING:
    from daemon.config import Settings

PRUNED_NAME = ".pruned"  # under versions/
_PURGING_PREFIX = ".purging-"


@dataclass(frozen=True, kw_only=True)
class PrunedVersion:
    """A version that is to be moved aside, or has been."""

    name: str
    dataset: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """Which versions would be moved aside, oldest first, and why each of the others stays."""

    keep: int
    moved: tuple[PrunedVersion, ...]
    kept: Mapping[str, str]  # reason by version

    @property
    def size_bytes(self) -> int:
        """Bytes of what is moved."""
        return sum(version.size_bytes for version in self.moved)


def choose_kept(names: Sequence[str], lineage: Lineage, *, current: str | None, keep: int) -> dict[str, str]:
    """Return which of the versions `names`, oldest first, stay, each with the reason. Pure.

    `keep` is how many of the newest; 0: all. The current version stays and the one that it continues, to which a rollback
    leads; so do those that the gate holds, with what they continue.
    """
    kept = dict.fromkeys(names if keep == 0 else names[-keep:], "one of the newest")
    recorded = lineage.recorded()

    def stays(name: str | None, reason: str) -> None:
        if name in names and name is not None:
            kept[name] = reason

    def parent_of(name: str) -> str | None:
        parent = recorded.get(name, {}).get("parent")
        return None if parent is None else str(parent)

    for name in lineage.held():
        stays(parent_of(name), f"version {name}, which the gate holds, continues it")
        stays(name, "the gate holds it: `dropforge promote` or `discard`")
    if current is not None:
        stays(parent_of(current), "the current version continues it")
        stays(current, "the current version")
    return {name: kept[name] for name in names if name in kept}


def plan_prune(model_dir: Path, *, keep: int) -> PrunePlan:
    """Plan which versions to move aside; changes nothing.

    Raises DropforgeError when the current version cannot be told: then nothing may go. Raises OSError.
    """
    current = versions.current_version(model_dir)
    found = {version.name: version for version in versions.list_versions(model_dir)}
    kept = choose_kept(list(found), read_lineage(model_dir), current=current.name if current else None, keep=keep)
    if current is None:
        kept = dict.fromkeys(found, "no version is current")
    return PrunePlan(
        keep=keep,
        moved=tuple(_described(version) for name, version in found.items() if name not in kept),
        kept=kept,
    )


def execute_prune(model_dir: Path, plan: PrunePlan) -> tuple[PrunedVersion, ...]:
    """Move what the plan names aside; returns what was moved. The caller holds the model lock.

    What became current or was held since is left. The lineage is written first: after a crash in between the same plan is
    made again. Raises DropforgeError, OSError.
    """
    require_lock(model_dir, "prune")
    still = {version.name for version in plan_prune(model_dir, keep=plan.keep).moved}
    moved = tuple(version for version in plan.moved if version.name in still)
    if not moved:
        return ()
    names = [version.name for version in moved]
    append_event(
        model_dir,
        {"event": PRUNED, "pruned": names, "version": read_lineage(model_dir).current, "at": utc_now()},
    )
    aside = model_dir / VERSIONS / PRUNED_NAME
    make_folder_durable(aside)
    for name in names:
        rename_durable(model_dir / VERSIONS / name, aside / name)
    return moved


def list_pruned(model_dir: Path) -> list[Version]:
    """Return the versions that were moved aside and not deleted yet, oldest first."""
    aside = model_dir / VERSIONS / PRUNED_NAME
    names = (path.name for path in aside.iterdir()) if aside.is_dir() else ()
    return [versions.read_version(aside / name) for name in sorted(filter(VERSION_NAME.fullmatch, names), key=int)]


def find_any_version(model_dir: Path, name: str) -> Version:
    """Return the version called `name`, also one that was moved aside. Raises NotFound."""
    try:
        return versions.find_version(model_dir, name)
    except NotFound:
        for version in list_pruned(model_dir):
            if version.name.lstrip("0") == name.lstrip("0"):
                return version
        raise


def bring_back(model_dir: Path, name: str) -> None:
    """Move a version that was moved aside back to the others; the caller holds the model lock. Raises NotFound, OSError."""
    require_lock(model_dir, "bring back")
    version = find_any_version(model_dir, name)
    if version.path.parent.name == PRUNED_NAME:
        rename_durable(version.path, model_dir / VERSIONS / version.name)


def purge_pruned(model_dir: Path, *, days: float, now: datetime | None = None) -> list[PrunedVersion]:
    """Delete versions that were moved aside more than `days` ago; returns them. The caller holds the model lock.

    One whose moving the lineage does not tell is left. Raises OSError.
    """
    require_lock(model_dir, "purge")
    aside = model_dir / VERSIONS / PRUNED_NAME
    for leftover in aside.glob(_PURGING_PREFIX + "*"):
        shutil.rmtree(leftover)
    before = (now or datetime.now(UTC)) - timedelta(days=days)
    pruned_at = _pruned_at(read_lineage(model_dir))
    purged = []
    for version in list_pruned(model_dir):
        at = pruned_at.get(version.name)
        if at is None or at > before:
            continue
        purged.append(_described(version))
        doomed = aside / f"{_PURGING_PREFIX}{version.name}"  # half a folder is no version
        rename_durable(version.path, doomed)
        shutil.rmtree(doomed)
    return purged


def apply_policy(settings: Settings, log: Any) -> None:
    """Move aside and delete what `[versions]` no longer keeps; a failure is logged and changes nothing else."""
    model_dir, keep = settings.model_dir, settings.versions.keep
    try:
        with guard.ModelLock(model_dir, owner="pruning"):
            moved = execute_prune(model_dir, plan_prune(model_dir, keep=keep)) if keep else ()
            purged = purge_pruned(model_dir, days=settings.versions.keep_pruned_days)
    except (DropforgeError, guard.GuardError, OSError) as error:
        log.error("version.not_pruned", error=str(error))
        return
    for event, found in (("version.pruned", moved), ("version.purged", purged)):
        if found:
            size_bytes = sum(version.size_bytes for version in found)
            log.info(event, versions=[version.name for version in found], size_bytes=size_bytes)


def _described(version: Version) -> PrunedVersion:
    return PrunedVersion(
        name=version.name,
        dataset=str(version.record.get("dataset", "")),
        size_bytes=list_tree(version.path).size_bytes,
    )


def _pruned_at(lineage: Lineage) -> dict[str, datetime]:
    """When each version was moved aside last, as far as the lineage tells."""
    found: dict[str, datetime] = {}
    for event in lineage.events:
        names = event.get("pruned")
        if event.get("event") != PRUNED or not isinstance(names, list):
            continue
        try:
            at = datetime.fromisoformat(str(event.get("at")))
        except ValueError:
            continue
        if at.tzinfo is not None:
            found.update(dict.fromkeys((str(name) for name in names if number_of(name)), at))
    return found
