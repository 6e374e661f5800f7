"""A dataset's rows to examples, on several cores: split, counted, and what was left out named.

Processes get lines as they stand in the file and give back numbers, so that hardly anything is carried between them.
"""

from __future__ import annotations

import multiprocessing
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import date
from itertools import chain
from typing import Any

import torch
from blake3 import blake3

from daemon.dataset.rows import Row
from daemon.job import FailureKind
from daemon.processes import die_with_parent, oom_kills
from daemon.recipe import DataSettings
from daemon.trainer.chat import Span
from daemon.trainer.collate import Example, Examples
from daemon.trainer.encode import Encoder, Item, chunks, trained_tokens, truncate
from daemon.trainer.errors import RunFailure

CHUNKS_AHEAD = 4  # for each process
# Below this many rows, starting processes costs more than they save.
ROWS_WORTH_A_PROCESS = 1000


@dataclass(kw_only=True)
class _Chunk:
    """Neighbouring rows as numbers."""

    ids: array[int] = field(default_factory=lambda: array("i"))  # of all its rows, end to end
    rows: list[tuple[int, tuple[Span, ...], int, str]] = field(default_factory=list)  # tokens, learned, line, digest
    truncated_rows: int = 0
    truncated_lines: list[int] = field(default_factory=list)  # as in Examples
    control_lines: list[int] = field(default_factory=list)

    def examples(self) -> Iterator[Example]:
        begin = 0
        for tokens, learned, line, digest in self.rows:
            ids = self.ids[begin : begin + tokens]
            begin += tokens
            yield Example(input_ids=ids, learned=learned, line=line, content_digest=digest)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Items to a chunk; a process that tokenises inherits it by its fork."""

    read: Callable[[Any], Row | None]
    encoder: Encoder
    max_length: int
    bos: int | None

    def encode(self, items: Sequence[Any]) -> _Chunk:
        rows = [row for item in items if (row := self.read(item)) is not None]
        chunk = _Chunk()
        for row, whole in zip(rows, self.encoder.encode(rows), strict=True):
            tokens = truncate(whole, self.max_length, self.bos)
            chunk.ids.extend(tokens.ids)
            chunk.rows.append((len(tokens.ids), tokens.learned, row.line, row.content_digest))
            chunk.truncated_rows += tokens is not whole
            if trained_tokens(tokens.learned) < trained_tokens(whole.learned):
                chunk.truncated_lines.append(row.line)
            if tokens.spells_control:
                chunk.control_lines.append(row.line)
        return chunk


def tokenise(
    items: Iterable[Item],
    tokenizer: Any,
    data: DataSettings,
    *,
    read: Callable[[Item], Row | None],
    processes: int = 1,
    day: date | None = None,
) -> Examples:
    """Turn rows into Examples and split off the held-out ones by their content.

    `read` makes an item a row, or None of one that is to be skipped; `day` as in ChatTemplate. A row stays on its side
    of the split whatever else the file holds. When all rows fall on the held-out side (a file of one or two rows), they are trained and nothing is
    held out. More than one process only before CUDA starts: they are forks of this one. Raises what `read` raises,
    RunFailure(BAD_DATA) when no row has a trained token, RunFailure(CONFIG) when the tokenizer lacks what the rows need.
    """
    encoder = Encoder(tokenizer, data, day=day)
    work = _Work(read=read, encoder=encoder, max_length=data.max_length, bos=tokenizer.bos_token_id)
    train: list[Example] = []
    held_out: list[Example] = []
    dropped: list[int] = []
    cut, cut_lines, control_lines = 0, [], []
    for chunk in _encode_all(chunks(items), work, processes):
        cut += chunk.truncated_rows
        cut_lines += chunk.truncated_lines
        control_lines += chunk.control_lines
        for example in chunk.examples():
            if example.trained_tokens == 0:
                dropped.append(example.line)
            elif held_out_rank(example.content_digest) < data.held_out_fraction:
                held_out.append(example)
            else:
                train.append(example)
    if not train:
        train, held_out = held_out, []
    if not train:
        raise RunFailure(
            FailureKind.BAD_DATA,
            f"none of {len(dropped)} rows has a token to train on within max_length = {data.max_length}",
            hint="look at train_on and max_length under [data], at empty answers, and at messages with weight 0",
        )
    return Examples(
        train=train,
        held_out=held_out,
        dropped_lines=tuple(dropped),
        truncated_rows=cut,
        truncated_lines=tuple(cut_lines),
        control_lines=tuple(control_lines),
    )


def digest_tokens(examples: Iterable[Example]) -> str:
    """BLAKE3 of examples in their order: every token id, and which of them are learned."""
    digest = blake3()
    for example in examples:
        spans = array("q", chain.from_iterable(example.learned))
        digest.update(array("q", (len(example.input_ids), len(example.learned))).tobytes())
        digest.update(array("i", example.input_ids).tobytes() + spans.tobytes())
    return digest.hexdigest()


def worker_processes(rows: int) -> int:
    """How many processes tokenise: the cores we may use, but none without enough to do."""
    return max(1, min(len(os.sched_getaffinity(0)), rows // ROWS_WORTH_A_PROCESS))


def held_out_rank(content_digest: str) -> float:
    """A row's place in [0, 1), from its content alone."""
    return int(content_digest[:13], 16) / 16**13


def _encode_all(parts: Iterator[list[Any]], work: _Work, processes: int) -> Iterator[_Chunk]:
    """In order. A process that is killed is told at once: its work would never come back."""
    if processes == 1:
        yield from map(work.encode, parts)
        return
    if torch.cuda.is_initialized():
        raise RuntimeError("a process that has started CUDA cannot be forked to tokenise")
    starved_before = oom_kills()
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, mp_context=fork, initializer=_begin_worker, initargs=(work,))
    try:
        given: deque[Future[_Chunk]] = deque()
        for part in parts:
            given.append(pool.submit(_encode_chunk, part))
            if len(given) >= processes * CHUNKS_AHEAD:
                yield given.popleft().result()
        while given:
            yield given.popleft().result()
    except BrokenProcessPool as error:
        starved = oom_kills() > starved_before
        raise RunFailure(
            FailureKind.OUT_OF_MEMORY if starved else FailureKind.LOST,
            "a process that tokenised was killed" + (": the machine ran out of memory" if starved else ""),
            hint="free memory, or lower max_length under [data]" if starved else "see who killed it",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: _Work | None = None  # of a process that tokenises


def _begin_worker(work: _Work) -> None:
    global _work  # noqa: PLW0603  a pool hands its workers their state in no other way
    die_with_parent()
    _work = work


def _encode_chunk(items: list[Any]) -> _Chunk:
    assert _work is not None  # noqa: S101  set before the first chunk
    return _work.encode(items)
