"""What a run takes from the memory of earlier datasets, and what it leaves there of its own."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.dataset.rows import Row, RowReader
from daemon.job import Plan, RunSpec, utc_now
from daemon.memory.sample import choose_kept
from daemon.memory.store import (
    MEMORY_NAME,
    DatasetMemory,
    DatasetMeta,
    MemoryDamaged,
    StoredRow,
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
from daemon.versions import Version, line_of


@dataclass(frozen=True, kw_only=True)
class EarlierDataset:
    """A dataset that the run's parent has learned."""

    memory: DatasetMemory
    rows: tuple[StoredRow, ...]
    held_out: tuple[StoredRow, ...]


@dataclass(frozen=True, kw_only=True)
class KnownDatasets:
    """The memories of this root as a run finds them."""

    memories: tuple[DatasetMemory, ...] = ()
    held_out: Mapping[str, str] = field(default_factory=dict)  # digest of a row that is held out -> its dataset's name
    earlier: tuple[EarlierDataset, ...] = ()  # of the parent's line; the one that was rehearsed longest ago first
    problems: tuple[str, ...] = ()  # what cannot be read, a sentence each

    def held_out_of(self, digest: str) -> set[str]:
        """Digests of the rows that an earlier run over the same file held out."""
        same = (memory for memory in self.memories if memory.meta.digest == digest)
        return {row for memory in same for row in readable_index(memory)[0]}

    def without(self, replaced: AbstractSet[str]) -> tuple[EarlierDataset, ...]:
        """The earlier datasets without some rows, by their digests."""
        return tuple(
            EarlierDataset(
                memory=dataset.memory,
                rows=tuple(row for row in dataset.rows if row.digest not in replaced),
                held_out=tuple(row for row in dataset.held_out if row.digest not in replaced),
            )
            for dataset in self.earlier
        )

    @property
    def prompts(self) -> frozenset[str]:
        """What earlier datasets ask."""
        asked = {row.asks for dataset in self.earlier for row in (*dataset.rows, *dataset.held_out)}
        return frozenset(asked - {""})


def read_known(spec: RunSpec, parent: Version | None) -> KnownDatasets:
    """Read what earlier datasets left; nothing for a run without a root.

    Of datasets of the parent's line, the rows that no later one of that line took the place of. Raises OSError.
    """
    if not spec.state_dir:
        return KnownDatasets()
    memories, unreadable = list_memories(memory_dir_of(Path(spec.state_dir)))
    held_out, damaged = held_out_registry(memories)
    line, broken = line_of(parent)
    by_digest = {memory.meta.digest: memory for memory in memories if memory.is_kept}
    of_line = [by_digest[digest] for digest in last_trained(line) if digest in by_digest]
    problems = [*unreadable, *damaged, *([broken] if broken else [])]
    found = []
    retired: set[str] = set()
    for memory in of_line:
        try:
            found.append((memory, memory.rows(), memory.held_out()))
            retired |= memory.retired()
        except MemoryDamaged as error:
            problems.append(f"{error.sentence}; nothing of it is rehearsed, {error.hint}")
    earlier = tuple(
        EarlierDataset(
            memory=memory,
            rows=tuple(row for row in rows if row.digest not in retired),
            held_out=tuple(row for row in apart if row.digest not in retired),
        )
        for memory, rows, apart in found
    )
    return KnownDatasets(memories=tuple(memories), held_out=held_out, earlier=earlier, problems=tuple(problems))


def last_trained(line: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the datasets of a line of versions, newest version first, by when they were trained or rehearsed last.

    The one that was left alone for longest comes first, of several the one that was learned first.
    """
    last: dict[str, int] = {}
    learned: dict[str, int] = {}
    for age, record in enumerate(line):
        own = str(record.get("dataset_digest") or "")
        for digest in (own, *(record.get("replayed") or ())):
            last.setdefault(digest, age)
        learned[own] = age
    return sorted((digest for digest in learned if digest), key=lambda digest: (-last[digest], -learned[digest]))


def leave_memory(
    spec: RunSpec,
    recipe: Recipe,
    *,
    reader: RowReader,
    examples: Examples,
    plan: Plan,
    known: KnownDatasets,
    replaced: AbstractSet[str],
) -> None:
    """Write what is kept of the run's dataset into its run directory; the promotion moves it. Raises OSError.

    `replaced`: digests of earlier rows that it takes the place of.
    """
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
        trained_tokens=plan.trained_tokens - plan.replayed_tokens,
        train_on=recipe.data.train_on,
        created_at=utc_now(),
    )
    write_memory(
        Path(spec.run_dir) / MEMORY_NAME,
        meta,
        rows=trained,
        held_out=held_out,
        held_out_before=known.held_out_of(spec.dataset.digest) - examples.released,
        retired=examples.released | replaced,
    )


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
