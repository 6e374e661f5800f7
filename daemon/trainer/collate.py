"""A dataset as examples: the arithmetic of a run over them, and the tensors of its passes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from daemon.job import Plan
from daemon.recipe import TrainingSettings
from daemon.trainer.batches import flat_passes, padded_passes, share_rows
from daemon.trainer.chat import Note
from daemon.trainer.encode import RefusedRow, trained_tokens

IGNORE = -100  # transformers' losses skip this label
# What a forward and backward pass costs besides its tokens, in tokens: launches of kernels, mostly.
PASS_TOKENS = {"cpu": 48, "cuda": 1024}


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sample of a row, ready for the model; a row has more than one where its chat template needs them."""

    input_ids: Sequence[int]  # (T,)
    learned: tuple[tuple[int, int], ...]  # spans of tokens, in order and apart
    line: int
    content_digest: str

    @property
    def labels(self) -> list[int]:
        """(T,): the token itself where it is learned, else IGNORE."""
        labels = [IGNORE] * len(self.input_ids)
        for begin, end in self.learned:
            labels[begin:end] = self.input_ids[begin:end]
        return labels

    @property
    def trained_tokens(self) -> int:
        """Labels that count after the model's shift by one."""
        return trained_tokens(self.learned)


@dataclass(frozen=True, kw_only=True)
class Examples:
    """A dataset, tokenised and split; a row's samples are all on one side."""

    train: list[Example]
    held_out: list[Example]  # what is evaluated: rows of an earlier dataset's holdout among them, if they come again
    train_rows: int
    held_out_rows: int  # those that are held out for the first time
    dropped_lines: tuple[int, ...]  # rows without a trained token
    replay: list[Example] = field(default_factory=list)  # rows of earlier datasets, which are trained as well
    replay_rows: int = 0
    answers: Mapping[str, frozenset[str]] = field(default_factory=dict)  # known prompt -> digests of trained rows
    withheld: Mapping[str, int] = field(default_factory=dict)  # earlier dataset -> rows that are held out of it
    released: frozenset[str] = (
        frozenset()
    )  # digests of rows that were held out, and are trained because that was forced
    unmeasured: str = ""  # why no row is held out
    refused: tuple[RefusedRow, ...] = ()  # rows at fault, left out under on_bad_rows = "skip"
    truncated_rows: int = 0
    truncated_lines: tuple[int, ...] = ()  # of them, those that lost trained tokens
    special_token_lines: tuple[int, ...] = ()  # rows whose messages hold the text of a special token, learned as text
    notes: Mapping[Note, tuple[int, ...]] = field(default_factory=dict)  # what a person should know, and the lines
    end_ids: frozenset[int] = frozenset()  # the tokens that the model learns to stop with
    whole_sizes: Sequence[int] = ()  # tokens of each sample before truncation

    @property
    def trained(self) -> list[Example]:
        """Everything that is trained, in the order that `StepBatches` counts by."""
        return [*self.train, *self.replay]

    @property
    def rows(self) -> int:
        """All rows that were read."""
        return self.trainable_rows + len(self.dropped_lines) + len(self.refused)

    @property
    def trainable_rows(self) -> int:
        """Rows with a trained token, whether they are trained or not."""
        return self.train_rows + self.held_out_rows + self.withheld_rows

    @property
    def withheld_rows(self) -> int:
        """Rows that are held out of an earlier dataset, and so not trained."""
        return sum(self.withheld.values())


def in_order(examples: Iterable[Example]) -> list[Example]:
    """Return examples in an order that does not depend on that of the file."""
    return sorted(examples, key=lambda example: (example.content_digest, example.line))


def plan(examples: Examples, training: TrainingSettings) -> Plan:
    """The run's arithmetic, the same as the Trainer's own."""
    trained = examples.trained
    samples = len(trained)
    global_batch_size = rows_a_step(training)
    steps_per_epoch = max(math.ceil(samples / global_batch_size), 1)
    total = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * steps_per_epoch)
    return Plan(
        rows=examples.train_rows,
        replayed_rows=examples.replay_rows,
        replayed_tokens=sum(example.trained_tokens for example in examples.replay),
        samples=samples,
        held_out_rows=examples.held_out_rows,
        withheld_rows=examples.withheld_rows,
        dropped_rows=len(examples.dropped_lines),
        tokens=sum(len(example.input_ids) for example in trained),
        trained_tokens=sum(example.trained_tokens for example in trained),
        global_batch_size=global_batch_size,
        steps_per_epoch=steps_per_epoch,
        epochs=total / steps_per_epoch if training.max_steps > 0 else training.num_train_epochs,
        total_steps=total,
        warmup_steps=warmup(training.warmup_steps, total),
    )


def rows_a_step(training: TrainingSettings) -> int:
    """The global batch: samples of one optimizer step, over all passes and processes."""
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
    """A step's Examples to the passes that compute it, on one of `world_size` processes."""

    pad_token_id: int
    budget_tokens: int  # of one pass, padding included
    flat: bool = False  # rows end to end without padding; needs `daemon.trainer.attention`
    pass_tokens: int = PASS_TOKENS["cpu"]
    rank: int = 0
    world_size: int = 1

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
        divided = [self.tensors(examples, rows) for rows in self.divide(examples, budget_tokens=budget_tokens)]
        return divided or [with_targets(pad([examples[-1]], self.pad_token_id, silent=True))]

    def divide(self, examples: Sequence[Example], *, budget_tokens: int | None = None) -> list[list[int]]:
        """Which examples each pass of this process has, by their places in `examples`."""
        budget, mine = budget_tokens or self.budget_tokens, list(range(len(examples)))
        if self.world_size > 1:
            mine = share_rows([len(example.input_ids) for example in examples], self.world_size)[self.rank]
        lengths = [len(examples[at].input_ids) for at in mine]
        if self.flat:
            divided = flat_passes(lengths, budget_tokens=budget)
        else:
            divided = padded_passes(lengths, budget_tokens=budget, pass_tokens=self.pass_tokens)
        return [[mine[at] for at in rows] for rows in divided]

    def tensors(self, examples: Sequence[Example], rows: Sequence[int]) -> dict[str, Any]:
        """The tensors of one pass over some of `examples`."""
        chosen = [examples[at] for at in rows]
        return with_targets(flatten(chosen) if self.flat else pad(chosen, self.pad_token_id))


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
        for begin, end in () if silent else example.learned:
            labels[at, begin:end] = input_ids[at, begin:end]
        mask[at, :size] = 1
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def flatten(examples: Sequence[Example]) -> dict[str, Any]:
    """Rows end to end: input_ids, position_ids (from 0 in each row) and labels, all int64 (1, T), and the rows' seams.

    Nothing predicts a row's first token, so it has no label. cu_seq_lens_q and _k, int32 (rows + 1,), are where rows
    begin and end; max_length_q and _k the longest row's length, as transformers names them.
    """
    sizes = [len(example.input_ids) for example in examples]
    input_ids = torch.cat([_tensor(example.input_ids) for example in examples])
    labels = torch.full_like(input_ids, IGNORE)
    for row, example in zip(accumulate(sizes, initial=0), examples, strict=False):
        for begin, end in example.learned:
            place = slice(row + max(begin, 1), row + end)
            labels[place] = input_ids[place]
    seams = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
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


def places_in_pass(one: Mapping[str, Any]) -> torch.Tensor:
    """Which row of a pass each of its `targets` belongs to, int64 (N,), counted from 0."""
    if "cu_seq_lens_q" in one:
        return torch.searchsorted(one["cu_seq_lens_q"][1:].long(), one["trained_at"], right=True)
    return one["trained_at"] // one["input_ids"].shape[1]


def _tensor(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)
