"""What the killed process was doing; see tests/fault/guard/scenarios.py."""

from __future__ import annotations

from pathlib import Path

import guard
from daemon import config, held_versions, recovery, version_pruning, versions
from daemon.backup.create import back_up
from daemon.backup.plan import Options
from daemon.backup.restore import execute, plan_restore
from daemon.errors import DropforgeError


def promote(model_dir: str) -> None:
    """What the scheduler does with a finished candidate."""
    folder = Path(model_dir)
    with guard.ModelLock(folder, owner="promotion"):
        version = versions.promote(folder, folder / ".staging" / "candidate-b", job_id="b", record={"rows": 2})
        guard.mark_finished(folder, version.name)


def set_aside(store: str) -> None:
    """What a start does with a store that it cannot read."""
    recovery.set_aside(Path(store))


def back_up_root(root: str, target: str) -> str:
    """A backup of a root on which no daemon runs; returns its path, or the error's sentence."""
    try:
        return str(back_up(config.load(Path(root)), Path(target), options=Options(checkpoints=True)).path)
    except DropforgeError as error:
        return f"error: {error.sentence}"


def restore_root(root: str, source: str) -> str:
    """A restore over what is there; returns the root's path, or the error's sentence."""
    try:
        return str(execute(plan_restore(Path(root), Path(source)), move_aside=True).plan.root)
    except DropforgeError as error:
        return f"error: {error.sentence}"


def keep_memory(state: str) -> str:
    """What a promotion does first with what its run left; returns the error's sentence."""
    from daemon.memory import promotion
    from daemon.recipe import ReplaySettings

    try:
        promotion.keep_memory(
            Path(state), Path(state) / "runs" / "job", ReplaySettings(memory_bytes=3000), file_is_deleted=False
        )
    except OSError as error:
        return f"error: {error}"
    return ""


def forget(state: str, name: str) -> str:
    """What `dropforge memory forget` does; returns the error's sentence."""
    from daemon.memory import forgetting
    from daemon.memory.store import Discarded

    try:
        for memory in forgetting.find_memories(Path(state), name):
            forgetting.forget(Path(state), memory, Discarded.FORGOTTEN)
    except OSError as error:
        return f"error: {error}"
    return ""


def hold(model_dir: str) -> None:
    """What the scheduler does with a finished candidate that the gate holds."""
    folder = Path(model_dir)
    record = {"rows": 2, "dataset_digest": "b" * 64, "held": ["a.jsonl 1 -> 4"]}
    with guard.ModelLock(folder, owner="promotion"):
        versions.promote(folder, folder / ".staging" / "candidate-b", job_id="b", record=record)


def promote_held(model_dir: str) -> None:
    """What `dropforge promote 2` does."""
    with guard.ModelLock(Path(model_dir), owner="promote"):
        held_versions.promote_held(Path(model_dir), "2")


def discard_held(model_dir: str) -> None:
    """What `dropforge discard 2` does."""
    with guard.ModelLock(Path(model_dir), owner="discard"):
        held_versions.discard_held(Path(model_dir), Path(model_dir).parent / "state", "2")


def prune(model_dir: str, days: float) -> None:
    """What a promotion does last under `[versions] keep = 1`."""
    folder = Path(model_dir)
    with guard.ModelLock(folder, owner="pruning"):
        version_pruning.execute_prune(folder, version_pruning.plan_prune(folder, keep=1))
        version_pruning.purge_pruned(folder, days=days)
