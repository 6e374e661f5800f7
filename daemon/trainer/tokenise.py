"""A dataset's rows to examples, on several cores: split, counted, and what was left out named.

Processes get lines as they stand in the file and give back numbers, so that hardly anything is carried between them.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import chain
from typing import Any

import torch
from blake3 import blake3

from daemon.dataset.rows import Row
from daemon.job import FailureKind
from daemon.memory.holdout import choose_held_out, too_small
from daemon.processes import die_with_parent, oom_kills
from daemon.recipe import DataSettings
from daemon.text import escape
from daemon.trainer.chat import Note
from daemon.trainer.chat_template import Span
from daemon.trainer.collate import Example, Examples
from daemon.trainer.encode import EncodedRow, Encoder, Item, RefusedRow, chunks, trained_tokens, truncate
from daemon.trainer.errors import RunFailure

CHUNKS_AHEAD = 4  # for each process
# Below this many rows, starting processes costs more than they save.
ROWS_WORTH_A_PROCESS = 1000


@dataclass(kw_only=True)
class _Chunk:
    """Neighbouring rows as numbers."""

    ids: array[int] = field(default_factory=lambda: array("i"))  # of all its samples, end to end
    rows: list[_EncodedRow] = field(default_factory=list)
    refused: list[RefusedRow] = field(default_factory=list)
    truncated_rows: int = 0
    truncated_lines: list[int] = field(default_factory=list)  # as in Examples
    special_token_lines: list[int] = field(default_factory=list)
    notes: dict[Note, list[int]] = field(default_factory=dict)
    end_ids: set[int] = field(default_factory=set)
    whole_sizes: array[int] = field(default_factory=lambda: array("i"))

    def examples(self) -> Iterator[tuple[_EncodedRow, list[Example]]]:
        """Each row, and its samples that have a trained token."""
        begin = 0
        for row in self.rows:
            found = []
            for tokens, learned in row.samples:
                ids = self.ids[begin : begin + tokens]
                begin += tokens
                found.append(Example(input_ids=ids, learned=learned, line=row.line, content_digest=row.content_digest))
            yield row, [example for example in found if example.trained_tokens]


@dataclass(frozen=True, kw_only=True)
class _EncodedRow:
    """A row of a chunk; what its samples hold stands in the chunk."""

    line: int
    content_digest: str
    prompt_digest: str
    samples: tuple[tuple[int, tuple[Span, ...]], ...]  # tokens, and the learned spans of them


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
        for row, encoded in zip(rows, self.encoder.encode(rows), strict=True):
            if isinstance(encoded, RefusedRow):
                chunk.refused.append(encoded)
            else:
                self._add(chunk, row, encoded)
        return chunk

    def _add(self, chunk: _Chunk, row: Row, encoded: EncodedRow) -> None:
        samples = [truncate(whole, self.max_length, self.bos) for whole in encoded.samples]
        for sample in samples:
            chunk.ids.extend(sample.ids)
        chunk.rows.append(
            _EncodedRow(
                line=row.line,
                content_digest=row.content_digest,
                prompt_digest=row.prompt_digest,
                samples=tuple((len(sample.ids), sample.learned) for sample in samples),
            )
        )
        cut = [(sample, whole) for sample, whole in zip(samples, encoded.samples, strict=True) if sample is not whole]
        chunk.truncated_rows += bool(cut)
        if any(trained_tokens(sample.learned) < trained_tokens(whole.learned) for sample, whole in cut):
            chunk.truncated_lines.append(row.line)
        if any(sample.spells_special for sample in samples):
            chunk.special_token_lines.append(row.line)
        for note in encoded.notes:
            chunk.notes.setdefault(note, []).append(row.line)
        chunk.end_ids |= encoded.end_ids
        chunk.whole_sizes.extend(len(whole.ids) for whole in encoded.samples)


@dataclass(kw_only=True)
class _Tally:
    """What is known of the chunks so far."""

    prompts: AbstractSet[str]  # whose answers are looked for
    answers: dict[str, set[str]] = field(default_factory=dict)  # prompt -> digests of rows that answer it
    kept: list[list[Example]] = field(default_factory=list)  # of each row with a trained token
    dropped: list[int] = field(default_factory=list)
    refused: list[RefusedRow] = field(default_factory=list)
    truncated_rows: int = 0
    truncated_lines: list[int] = field(default_factory=list)
    special_token_lines: list[int] = field(default_factory=list)
    notes: dict[Note, list[int]] = field(default_factory=dict)
    end_ids: set[int] = field(default_factory=set)
    whole_sizes: array[int] = field(default_factory=lambda: array("i"))

    def add(self, chunk: _Chunk) -> None:
        self.refused += chunk.refused
        self.truncated_rows += chunk.truncated_rows
        self.truncated_lines += chunk.truncated_lines
        self.special_token_lines += chunk.special_token_lines
        self.end_ids |= chunk.end_ids
        self.whole_sizes += chunk.whole_sizes
        for note, lines in chunk.notes.items():
            self.notes.setdefault(note, []).extend(lines)
        for row, examples in chunk.examples():
            if examples:
                self.kept.append(examples)
                if row.prompt_digest in self.prompts:
                    self.answers.setdefault(row.prompt_digest, set()).add(row.content_digest)
            else:
                self.dropped.append(row.line)

    def examples(
        self,
        data: DataSettings,
        held_out_before: Mapping[str, str],
        held_out_again: AbstractSet[str] = frozenset(),
        *,
        force: bool,
    ) -> Examples:
        """What is trained and what is held out."""
        of_digest = [row[0].content_digest for row in self.kept]
        chosen = choose_held_out(of_digest, data)
        own = chosen & held_out_again
        elsewhere = {digest for digest in of_digest if digest in held_out_before and digest not in own}
        withheld = Counter(held_out_before[digest] for digest in of_digest if digest in elsewhere)
        released: frozenset[str] = frozenset()
        if force and _are_most(withheld, len(self.kept)):
            released = frozenset(held_out_before.keys() & set(of_digest))
            withheld, held_out_before, elsewhere = Counter(), {}, set()
        train: list[Example] = []
        held_out: list[Example] = []
        train_rows = held_out_rows = 0
        for digest, row in zip(of_digest, self.kept, strict=True):
            if digest in chosen:
                held_out += row
                held_out_rows += digest not in elsewhere
            elif digest not in held_out_before:
                train += row
                train_rows += 1
        untrained = chosen | held_out_before.keys()
        return Examples(
            train=train,
            held_out=held_out,
            answers={prompt: frozenset(found) for prompt, rows in self.answers.items() if (found := rows - untrained)},
            train_rows=train_rows,
            held_out_rows=held_out_rows,
            dropped_lines=tuple(self.dropped),
            withheld=withheld,
            released=released,
            unmeasured=too_small(len(set(of_digest)), data),
            refused=tuple(self.refused),
            truncated_rows=self.truncated_rows,
            truncated_lines=tuple(self.truncated_lines),
            special_token_lines=tuple(self.special_token_lines),
            notes={note: tuple(lines) for note, lines in sorted(self.notes.items())},
            end_ids=frozenset(self.end_ids),
            whole_sizes=self.whole_sizes,
        )


def _are_most(withheld: Mapping[str, int], rows: int) -> bool:
    """Whether a file is for the greater part what earlier datasets held out."""
    return 0 < rows <= 2 * sum(withheld.values())


def tokenise(
    items: Iterable[Item],
    tokenizer: Any,
    data: DataSettings,
    *,
    read: Callable[[Item], Row | None],
    processes: int = 1,
    day: date | None = None,
    held_out_before: Mapping[str, str] | None = None,
    held_out_again: AbstractSet[str] = frozenset(),
    prompts: AbstractSet[str] = frozenset(),
    force: bool = False,
    keep_refused: bool = False,
) -> Examples:
    """Turn rows into Examples and split off the held-out ones by their content.

    `read` makes an item a row, or None of one that is to be skipped; `day` as in ChatTemplate. `held_out_before`: digests of
    rows that are held out of earlier datasets, whose names they map to; such a row is not trained. `held_out_again`:
    those of them that an earlier run over this very file held out, which are its own where they are chosen again. With `force`, a file that
    is for the greater part such rows is trained all the same, and they are `released`. `prompts`: those whose `answers` are
    told. More than one process only before CUDA starts: they are forks of this one. Raises what `read` raises, RunFailure(BAD_DATA) when no row has a trained token or one is at fault
    that may not be skipped, RunFailure(CONFIG) when the tokenizer lacks what the rows need. With `keep_refused` nothing of the
    first two kinds is raised: `require_trainable` does.
    """
    encoder = Encoder(tokenizer, data, day=day)
    work = _Work(read=read, encoder=encoder, max_length=data.max_length, bos=tokenizer.bos_token_id)
    tally = _Tally(prompts=prompts)
    for chunk in _encode_all(chunks(items), work, processes):
        tally.add(chunk)
        if not keep_refused and tally.refused and data.on_bad_rows == "reject":
            break
    examples = tally.examples(data, held_out_before or {}, held_out_again, force=force)
    if not keep_refused:
        require_trainable(examples, data)
    return examples


def encode_rows(
    rows: Sequence[Row], tokenizer: Any, data: DataSettings, *, day: date | None = None
) -> list[list[Example]]:
    """Return the samples of each row that have a trained token; none of a row that cannot be trained as it should."""
    work = _Work(
        read=_itself, encoder=Encoder(tokenizer, data, day=day), max_length=data.max_length, bos=tokenizer.bos_token_id
    )
    found: dict[int, list[Example]] = {}
    for part in chunks(replace(row, line=number) for number, row in enumerate(rows)):
        found |= {row.line: examples for row, examples in work.encode(part).examples()}
    return [found.get(number, []) for number in range(len(rows))]


def _itself(row: Row) -> Row:
    return row


def require_trainable(examples: Examples, data: DataSettings) -> None:
    """Raise RunFailure(BAD_DATA) when a row is at fault that may not be skipped, or when nothing would be learned."""
    refused, rows = examples.refused, examples.rows
    if refused and data.on_bad_rows == "reject":
        raise refused[0].failure()
    if len(refused) > data.max_bad_fraction * rows:
        raise RunFailure(
            FailureKind.BAD_DATA,
            f"{len(refused)} of {rows} rows cannot be trained as they should, more than max_bad_fraction ="
            f" {data.max_bad_fraction:g}; the first, line {refused[0].line}: {refused[0].reason}",
            hint=refused[0].hint,
        )
    if _are_most(examples.withheld, examples.trainable_rows):
        names = [escape(name) for name in examples.withheld]
        raise RunFailure(
            FailureKind.BAD_DATA,
            f"{examples.withheld_rows} of {examples.trainable_rows} rows are held-out rows of {names[0]}"
            f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}, which measure what was learned of it",
            hint="drop other rows; force = true in a sidecar trains these, and nothing is measured by them any more",
        )
    if examples.trainable_rows and not examples.train:
        raise RunFailure(
            FailureKind.BAD_DATA,
            f"all of {rows} rows are held out or without a token to train on, so nothing would be trained",
            hint="lower held_out_fraction under [data]",
        )
    if not examples.train:
        raise RunFailure(
            FailureKind.BAD_DATA,
            f"none of {rows} rows has a token to train on within max_length = {data.max_length}",
            hint="look at train_on and max_length under [data], at empty answers, and at messages with weight 0",
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
    gc.freeze()  # what was there before the fork is looked through no more, and so stays shared
    _work = work


def _encode_chunk(items: list[Any]) -> _Chunk:
    assert _work is not None  # noqa: S101  set before the first chunk
    return _work.encode(items)
