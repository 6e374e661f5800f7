"""What a run takes from the memory of earlier datasets, and what it leaves there of its own."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from daemon.dataset.rows import Row, RowReader
from daemon.job import Plan, RunSpec, utc_now
from daemon.memory.sample import choose_kept
from daemon.memory.store import (
    MEMORY_NAME,
    DatasetMemory,
    DatasetMeta,
    encode_row,
    held_out_registry,
    keyed_hash,
    list_memories,
    memory_dir_of,
    readable_index,
    root_key,
    write_memory,
)
from daemon.recipe import Recipe
from daemon.trainer.collate import Examples


@dataclass(frozen=True, kw_only=True)
class KnownDatasets:
    """The memories of this root as a run finds them."""

    memories: tuple[DatasetMemory, ...] = ()
    held_out: Mapping[str, str] = field(default_factory=dict)  # digest of a row that is held out -> its dataset's name
    problems: tuple[str, ...] = ()  # what cannot be read, a sentence each

    def held_out_of(self, digest: str) -> set[str]:
        """Digests of the rows that an earlier run over the same file held out."""
        same = (memory for memory in self.memories if memory.meta.digest == digest)
        return {row for memory in same for row in readable_index(memory)[0]}


def read_known(spec: RunSpec) -> KnownDatasets:
    """Read what earlier datasets left; nothing for a run without a root. Raises OSError."""
    if not spec.state_dir:
        return KnownDatasets()
    memories, unreadable = list_memories(memory_dir_of(Path(spec.state_dir)))
    held_out, damaged = held_out_registry(memories)
    return KnownDatasets(memories=tuple(memories), held_out=held_out, problems=(*unreadable, *damaged))


def leave_memory(
    spec: RunSpec, recipe: Recipe, *, reader: RowReader, examples: Examples, plan: Plan, known: KnownDatasets
) -> None:
    """Write what is kept of the run's dataset into its run directory; the promotion moves it. Raises OSError."""
    if not spec.state_dir:
        return
    key = root_key(memory_dir_of(Path(spec.state_dir)))
    first_lines: dict[str, int] = {}
    for example in reversed(examples.train):
        first_lines[example.content_digest] = example.line
    kept = set(choose_kept(first_lines, recipe.replay.memory_rows, key))
    held_out_lines: dict[str, int] = {}
    for example in reversed(examples.held_out):
        held_out_lines[example.content_digest] = example.line
    wanted = {line for digest, line in first_lines.items() if digest in kept} | set(held_out_lines.values())
    trained, held_out = _encode(
        _read_lines(reader, wanted), held_out_lines.keys(), key=key, most_bytes=recipe.replay.memory_bytes
    )
    meta = DatasetMeta(
        name=spec.dataset.name,
        digest=spec.dataset.digest,
        job=spec.job_id,
        trained_rows=examples.train_rows,
        trained_tokens=plan.trained_tokens,
        train_on=recipe.data.train_on,
        created_at=utc_now(),
    )
    write_memory(Path(spec.run_dir) / MEMORY_NAME, meta, rows=trained, held_out=held_out, retired=examples.released)


def _read_lines(reader: RowReader, wanted: set[int]) -> Iterable[Row]:
    """The rows on some lines of a file."""
    for line in reader.lines():
        if line[0] in wanted and (row := reader.row(line)) is not None:
            yield row


def _encode(
    rows: Iterable[Row], held_out: Iterable[str], *, key: bytes, most_bytes: int
) -> tuple[list[bytes], list[tuple[str, bytes]]]:
    """Lines of the trained rows, smallest keyed hash first and at most so many bytes of them, and of the held-out ones."""
    apart = set(held_out)
    kept: list[tuple[bytes, bytes]] = []  # a heap: the largest hash on top, which goes first
    size = 0
    measured = []
    for row in rows:
        line = encode_row(row)
        if row.content_digest in apart:
            measured.append((row.content_digest, line))
            continue
        place = keyed_hash(key, row.content_digest)
        heapq.heappush(kept, (bytes(255 - byte for byte in place), line))
        size += len(line)
        while size > most_bytes and kept:
            size -= len(heapq.heappop(kept)[1])
    return [line for _, line in sorted(kept, reverse=True)], sorted(measured)
