"""A dataset's rows to tokenised examples, split and counted; and examples to batches of tensors."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from daemon.job import FailureKind, Plan
from daemon.recipe import DataSettings, TrainingSettings
from daemon.rows import Row
from daemon.trainer.batches import flat_passes, padded_passes, share_rows
from daemon.trainer.encode import IGNORE, Encoder, truncate
from daemon.trainer.failure import RunFailure
from daemon.trainer.session import die_with_parent

ROWS_A_CHUNK = 128
# Below this many rows, starting processes costs more than they save.
ROWS_WORTH_A_PROCESS = 1000
# What a forward and backward pass costs besides its tokens, in tokens: launches of kernels, mostly.
PASS_TOKENS = {"cpu": 48, "cuda": 1024}


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row, ready for the model."""

    input_ids: Sequence[int]  # (T,)
    labels: Sequence[int]  # (T,), IGNORE where nothing is learned
    line: int
    content_digest: str

    @property
    def trained_tokens(self) -> int:
        """Labels that count after the model's shift by one: the first position predicts nothing."""
        rest = self.labels[1:]
        return len(rest) - rest.count(IGNORE)


@dataclass(frozen=True, kw_only=True)
class Examples:
    """A dataset, tokenised and split."""

    train: list[Example]
    held_out: list[Example]
    dropped_lines: tuple[int, ...]  # rows without a trained token
    truncated_rows: int
    truncated_lines: tuple[int, ...] = ()  # of them, those that lost trained tokens
    control_lines: tuple[int, ...] = ()  # rows whose messages hold the text of a control token, learned as text


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    example: Example
    truncated: bool
    lost_trained: bool
    control: bool


def tokenise(rows: Iterable[Row], tokenizer: Any, data: DataSettings, *, processes: int = 1) -> Examples:
    """Turn every row into an Example and split off the held-out ones by their content.

    A row stays on its side of the split whatever else the file holds. When all rows fall on the held-out side (a file
    of one or two rows), they are trained and nothing is held out. More than one process only before CUDA starts: they
    are forks of this one. Raises RunFailure(BAD_DATA) when no row has a trained token, RunFailure(CONFIG) when the
    tokenizer lacks what the rows need.
    """
    train: list[Example] = []
    held_out: list[Example] = []
    dropped: list[int] = []
    truncated, lost, control = 0, [], []
    for encoded in _encode_all(rows, tokenizer, data, processes):
        example = encoded.example
        truncated += encoded.truncated
        if encoded.lost_trained:
            lost.append(example.line)
        if encoded.control:
            control.append(example.line)
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
        truncated_rows=truncated,
        truncated_lines=tuple(lost),
        control_lines=tuple(control),
    )


def worker_processes(rows: int) -> int:
    """How many processes tokenise: the cores we may use, but none without enough to do."""
    return max(1, min(len(os.sched_getaffinity(0)), rows // ROWS_WORTH_A_PROCESS))


def _encode_all(rows: Iterable[Row], tokenizer: Any, data: DataSettings, processes: int) -> Iterator[_Encoded]:
    encoder = Encoder(tokenizer, data)
    bos = tokenizer.bos_token_id
    if processes == 1:
        for row in rows:
            yield _encode_one(row, encoder, data.max_length, bos)
        return
    if torch.cuda.is_initialized():
        raise RuntimeError("a process that has started CUDA cannot be forked to tokenise")
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, _begin_worker, (encoder, data.max_length, bos)) as pool:
        for chunk in pool.imap(_encode_chunk, _chunks(rows), chunksize=1):
            yield from chunk


_worker: tuple[Encoder, int, int | None] | None = None  # of a tokenising process: what it inherited by its fork


def _begin_worker(encoder: Encoder, max_length: int, bos: int | None) -> None:
    global _worker  # noqa: PLW0603  a pool hands its workers their state in no other way
    die_with_parent(hard=True)
    _worker = (encoder, max_length, bos)


def _encode_chunk(rows: list[Row]) -> list[_Encoded]:
    assert _worker is not None  # noqa: S101  set before the first chunk
    return [_encode_one(row, *_worker) for row in rows]


def _encode_one(row: Row, encoder: Encoder, max_length: int, bos: int | None) -> _Encoded:
    ids, labels = encoder.encode(row)
    trained = len(labels) - labels.count(IGNORE)
    kept_ids, kept_labels = truncate(ids, labels, max_length, bos)
    return _Encoded(
        example=Example(input_ids=kept_ids, labels=kept_labels, line=row.line, content_digest=row.content_digest),
        truncated=len(kept_ids) < len(ids),
        lost_trained=len(kept_labels) - kept_labels.count(IGNORE) < trained,
        control=encoder.spells_control_tokens(row),
    )


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    source = iter(rows)
    while chunk := list(islice(source, ROWS_A_CHUNK)):
        yield chunk


def held_out_rank(content_digest: str) -> float:
    """A row's place in [0, 1), from its content alone."""
    return int(content_digest[:13], 16) / 16**13


def plan(examples: Examples, training: TrainingSettings) -> Plan:
    """The run's arithmetic, the same as the Trainer's own."""
    rows = len(examples.train)
    global_batch_size = rows_a_step(training)
    steps_per_epoch = max(math.ceil(rows / global_batch_size), 1)
    total = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * steps_per_epoch)
    return Plan(
        rows=rows,
        held_out_rows=len(examples.held_out),
        dropped_rows=len(examples.dropped_lines),
        tokens=sum(len(example.input_ids) for example in examples.train),
        trained_tokens=sum(example.trained_tokens for example in examples.train),
        global_batch_size=global_batch_size,
        steps_per_epoch=steps_per_epoch,
        epochs=total / steps_per_epoch if training.max_steps > 0 else training.num_train_epochs,
        total_steps=total,
        warmup_steps=warmup(training.warmup_steps, total),
    )


def rows_a_step(training: TrainingSettings) -> int:
    """The global batch: rows of one optimizer step, over all passes and processes."""
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * training.num_processes


def warmup(wanted: float, total_steps: int) -> int:
    """Warm-up in whole steps: a number of them, or below 1 a share of all, rounded down; never the whole run.

    The learning rate of the first warm-up step is zero. Rounded up, as the Trainer does it, a run of one step would be
    all warm-up, and train nothing.
    """
    steps = int(wanted) if wanted >= 1 else int(wanted * total_steps)
    return min(steps, max(total_steps - 1, 0))


@dataclass(frozen=True, kw_only=True)
class Collator:
    """A step's Examples to the passes that compute it, on one of `processes` processes."""

    pad_token_id: int
    budget_tokens: int  # of one pass, padding included
    flat: bool = False  # rows end to end without padding; needs `daemon.trainer.attention`
    pass_tokens: int = PASS_TOKENS["cpu"]
    process: int = 0
    processes: int = 1

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """`passes` of this process, `trained_tokens` and `tokens` of the whole step, and the `examples` themselves."""
        return {
            "passes": self.passes(examples),
            "trained_tokens": sum(example.trained_tokens for example in examples),
            "tokens": sum(len(example.input_ids) for example in examples),
            "examples": examples,
        }

    def passes(self, examples: Sequence[Example], *, budget_tokens: int | None = None) -> list[dict[str, Any]]:
        """Tensors of each pass, `with_targets`. A process without a row of its own computes one with nothing to learn."""
        budget = budget_tokens or self.budget_tokens
        mine = list(examples)
        if self.processes > 1:
            shares = share_rows([len(example.input_ids) for example in examples], self.processes)
            mine = [examples[at] for at in shares[self.process]]
            if not mine:
                return [with_targets(pad([examples[-1]], self.pad_token_id, silent=True))]
        lengths = [len(example.input_ids) for example in mine]
        if self.flat:
            divided = flat_passes(lengths, budget_tokens=budget)
            return [with_targets(flatten([mine[at] for at in rows])) for rows in divided]
        divided = padded_passes(lengths, budget_tokens=budget, pass_tokens=self.pass_tokens)
        return [with_targets(pad([mine[at] for at in rows], self.pad_token_id)) for rows in divided]


def pad(examples: Sequence[Example], pad_token_id: int, *, silent: bool = False) -> dict[str, Any]:
    """input_ids, attention_mask and labels, all int64 (B, T), T the longest row's length; padding is IGNOREd.

    `silent`: no label counts.
    """
    length = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad_token_id, dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORE, dtype=torch.long)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    for at, example in enumerate(examples):
        size = len(example.input_ids)
        input_ids[at, :size] = _tensor(example.input_ids)
        if not silent:
            labels[at, :size] = _tensor(example.labels)
        mask[at, :size] = 1
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def flatten(examples: Sequence[Example]) -> dict[str, Any]:
    """Rows end to end: input_ids, position_ids (from 0 in each row) and labels, all int64 (1, T), and the rows' seams.

    Nothing predicts a row's first token, so it has no label. cu_seq_lens_q and _k, int32 (rows + 1,), are where rows
    begin and end; max_length_q and _k the longest row's length, as transformers names them.
    """
    sizes = [len(example.input_ids) for example in examples]
    input_ids = torch.cat([_tensor(example.input_ids) for example in examples])
    labels = torch.cat([_tensor(example.labels) for example in examples])
    seams = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    labels[seams[:-1].long()] = IGNORE
    positions = torch.cat([torch.arange(size) for size in sizes])
    return {
        "input_ids": input_ids[None],
        "labels": labels[None],
        "position_ids": positions[None],
        "cu_seq_lens_q": seams,
        "cu_seq_lens_k": seams,
        "max_length_q": max(sizes),
        "max_length_k": max(sizes),
    }


def with_targets(one: dict[str, Any]) -> dict[str, Any]:
    """A pass, and where it learns: `trained_at`, int64 (N,), positions of B x T that predict a trained token, and that
    token, `targets`, int64 (1, N). A pass with nothing to learn has one position, whose target is IGNOREd."""
    following = torch.full_like(one["labels"], IGNORE)
    following[:, :-1] = one["labels"][:, 1:]
    trained_at = (following.flatten() != IGNORE).nonzero()[:, 0]
    if not len(trained_at):
        trained_at = torch.zeros(1, dtype=torch.long)
    return {**one, "trained_at": trained_at, "targets": following.flatten()[trained_at][None]}


def _tensor(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)
