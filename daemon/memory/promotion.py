"""What becomes of a run's memory when its adapter is promoted, and of all memories when their room is short."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from daemon.memory.sample import fitting, shares
from daemon.memory.store import (
    MEMORY_NAME,
    ROWS_NAME,
    DatasetMemory,
    Discarded,
    FileMark,
    MemoryDamaged,
    dataset_dir,
    digest_of,
    discard_rows,
    list_memories,
    memory_dir_of,
    place_memory,
    read_memory,
    write_meta,
)
from daemon.recipe import ReplaySettings
from guard.atomic import fsync_file


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What a promotion did to the memories."""

    memory: DatasetMemory | None = None  # of the run's dataset; None: the run left none, or it was moved already
    shrunk: tuple[str, ...] = ()  # names of datasets of which fewer rows are kept now
    problems: tuple[str, ...] = ()  # a sentence each


def keep_memory(state_dir: Path, run_dir: Path, replay: ReplaySettings, *, file_is_deleted: bool) -> Placed:
    """Move what a run left to the memories, without its rows where the file is deleted, and keep all within memory_bytes.

    Before the version becomes current: a crash in between leaves a memory too many, never one too few. Can be repeated.
    Raises OSError.
    """
    target = memory_dir_of(state_dir)
    try:
        was_forgotten = _forgotten_since(run_dir / MEMORY_NAME, target)
        memory = place_memory(run_dir / MEMORY_NAME, target)
    except ValueError as error:
        return Placed(problems=(f"the memory that the run left in {run_dir / MEMORY_NAME} is damaged: {error}",))
    if memory is not None and (was_forgotten or (file_is_deleted and not replay.keep_deleted)):
        memory = discard_rows(memory, Discarded.FORGOTTEN if was_forgotten else Discarded.DELETED)
    shrunk, problems = shrink(target, replay.memory_bytes)
    return Placed(memory=memory, shrunk=shrunk, problems=problems)


def _forgotten_since(source: Path, memory_dir: Path) -> bool:
    """Whether somebody had the dataset forgotten after the run had written what it would keep of it."""
    written = read_memory(source)
    before = read_memory(dataset_dir(memory_dir, written.meta.digest)) if written is not None else None
    if written is None or before is None or before.meta.discarded is not Discarded.FORGOTTEN:
        return False
    return (before.meta.discarded_at or "") >= written.meta.created_at


def shrink(memory_dir: Path, most_bytes: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Drop the last rows of the largest memories until all have at most `most_bytes`; returns names, and problems.

    meta.json is written first, and holds for the beginning of the longer file as well. Raises OSError.
    """
    memories, _ = list_memories(memory_dir)
    by_digest = {memory.meta.digest: memory for memory in memories if memory.is_kept}
    sizes = {digest: memory.meta.mark(ROWS_NAME).size_bytes for digest, memory in by_digest.items()}
    shrunk, problems = [], []
    for digest, most in shares(sizes, most_bytes).items():
        memory = by_digest[digest]
        try:
            lines = memory.read(ROWS_NAME).splitlines(keepends=True)
        except MemoryDamaged as error:
            problems.append(error.sentence)
            continue
        kept = lines[: fitting(map(len, lines), most)]
        data = b"".join(kept)
        mark = FileMark(rows=len(kept), size_bytes=len(data), digest=digest_of(data))
        write_meta(memory.path, replace(memory.meta, files={**memory.meta.files, ROWS_NAME: mark}))
        os.truncate(memory.path / ROWS_NAME, len(data))
        fsync_file(memory.path / ROWS_NAME)
        shrunk.append(memory.meta.name)
    return tuple(shrunk), tuple(problems)
