"""Forgetting: a dataset's kept rows are deleted, and no open run goes on with them. Weights are not changed by that."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from daemon.errors import DropforgeError, NotFound
from daemon.job import ReplayedDataset
from daemon.memory.replay import rehearses, thaw
from daemon.memory.store import (
    DatasetMemory,
    DatasetMeta,
    Discarded,
    MemoryDamaged,
    dataset_dir,
    discard_rows,
    list_memories,
    memory_dir_of,
    read_memory,
)
from daemon.run_dir import RUNS_NAME
from daemon.text import escape

FORGOTTEN_KEY = "memory_forgotten"  # of the store's controls: {"at", "digest"} of what was forgotten last
LIST_HINT = "`dropforge memory` lists them"


def find_memories(state_dir: Path, name: str) -> list[DatasetMemory]:
    """Return the memories of the datasets of a name, or of the one whose digest begins so.

    Raises NotFound, DropforgeError when a digest's beginning fits several, OSError.
    """
    memories, _ = list_memories(memory_dir_of(state_dir))
    if named := [memory for memory in memories if memory.meta.name == name]:
        return named
    begins = [memory for memory in memories if len(name) >= 4 and memory.meta.digest.startswith(name.lower())]
    if len(begins) > 1:
        raise DropforgeError(
            operation="find the memory of",
            subject=escape(name),
            cause=f"{len(begins)} digests begin so",
            hint="name more of its digits",
        )
    if not begins:
        raise NotFound(operation="find the memory of", subject=escape(name), cause="there is none", hint=LIST_HINT)
    return begins


def forget(state_dir: Path, memory: DatasetMemory, why: Discarded) -> list[str]:
    """Delete a dataset's kept rows, and those that runs have drawn of it; returns the ids of those runs' jobs.

    The memory's meta.json says so first: from then on nothing draws them. Can be repeated. Raises OSError.
    """
    discard_rows(memory, why)
    drawn = [folder for folder in _run_dirs(state_dir) if rehearses(folder, memory.meta.digest)]
    for folder in drawn:
        thaw(folder)
    return [folder.name for folder in drawn]


def shared_rows(state_dir: Path, memory: DatasetMemory) -> list[tuple[DatasetMeta, int]]:
    """Return the other datasets of which some of a dataset's rows are kept too, and how many. Raises OSError."""
    own = _digests(memory)
    others = [found for found in list_memories(memory_dir_of(state_dir))[0] if found.meta.digest != memory.meta.digest]
    counts = [(found.meta, len(own & _digests(found))) for found in others]
    return [(meta, count) for meta, count in counts if count]


def _digests(memory: DatasetMemory) -> set[str]:
    """The rows that are kept of a dataset, as far as they can be read."""
    try:
        return {row.digest for row in (*memory.rows(), *memory.held_out())}
    except (MemoryDamaged, OSError):
        return set()


def forgotten(state_dir: Path, replayed: Iterable[ReplayedDataset]) -> list[str]:
    """Return the names of the datasets that somebody had forgotten since a run drew rows of them, as far as can be told."""
    found = []
    for dataset in replayed:
        try:
            memory = read_memory(dataset_dir(memory_dir_of(state_dir), dataset.digest))
        except (ValueError, OSError):
            continue  # nobody asked for that
        if memory is not None and memory.meta.discarded is Discarded.FORGOTTEN:
            found.append(dataset.name)
    return found


def delete_file_memory(state_dir: Path, digest: str) -> bool:
    """Delete what is kept of a dataset whose file the settings have deleted; returns whether there was anything.

    Raises OSError.
    """
    try:
        memory = read_memory(dataset_dir(memory_dir_of(state_dir), digest))
    except ValueError:
        return False  # told wherever it is read
    if memory is None or not memory.is_kept:
        return False
    forget(state_dir, memory, Discarded.DELETED)
    return True


def sweep(state_dir: Path, is_orphan: Callable[[DatasetMemory], bool]) -> list[str]:
    """Finish what a crash cut short: delete rows that are discarded and lie there still, and memories of no version.

    Returns the names of the latter. Raises OSError.
    """
    removed = []
    memories, _ = list_memories(memory_dir_of(state_dir))
    for memory in memories:
        if not memory.is_kept:
            forget(state_dir, memory, memory.meta.discarded)
        elif is_orphan(memory):
            discard_rows(memory, Discarded.DELETED)
            shutil.rmtree(memory.path)
            removed.append(memory.meta.name)
    return removed


def _run_dirs(state_dir: Path) -> list[Path]:
    folder = state_dir / RUNS_NAME
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
