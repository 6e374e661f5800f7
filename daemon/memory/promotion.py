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
    FileMark,
    MemoryDamaged,
    digest_of,
    discard_rows,
    list_memories,
    memory_dir_of,
    place_memory,
    write_meta,
)
from daemon.recipe import ReplaySettings
from guard.atomic import fsync_file

FILE_DELETED = "its file is deleted after training, and [replay] keep_deleted is false"


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
    try:
        memory = place_memory(run_dir / MEMORY_NAME, memory_dir_of(state_dir))
    except ValueError as error:
        return Placed(problems=(f"the memory that the run left in {run_dir / MEMORY_NAME} is damaged: {error}",))
    if memory is not None and file_is_deleted and not replay.keep_deleted:
        memory = discard_rows(memory, FILE_DELETED)
    shrunk, problems = shrink(memory_dir_of(state_dir), replay.memory_bytes)
    return Placed(memory=memory, shrunk=shrunk, problems=problems)


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
