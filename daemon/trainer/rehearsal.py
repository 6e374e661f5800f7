"""The rows of earlier datasets that a run trains again: drawn at its first attempt, and the same ones at every other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from daemon.job import ReplayedDataset, RunSpec, claimed_on
from daemon.memory.replay import (
    Budget,
    draw,
    draw_order,
    freeze,
    frozen_line,
    is_new_edition,
    read_frozen,
    replaced_rows,
)
from daemon.memory.store import StoredRow, decode_row, digest_of
from daemon.recipe import Recipe
from daemon.trainer import distributed
from daemon.trainer.collate import Example, Examples
from daemon.trainer.memory import EarlierDataset, KnownDatasets
from daemon.trainer.tokenise import encode_rows

ROWS_AT_ONCE = 16  # of a dataset that are tokenised at a time, until its part is reached


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a run rehearses."""

    examples: list[Example]
    datasets: tuple[ReplayedDataset, ...] = ()
    wanted_tokens: int = 0  # trained ones, as the share says; fewer where the memories are small, more for min_rows
    digest: str | None = None  # of the rows, in their order; None: there are none

    @property
    def rows(self) -> int:
        """How many rows are rehearsed."""
        return sum(dataset.rows for dataset in self.datasets)

    @property
    def tokens(self) -> int:
        """How many of their tokens have a loss."""
        return sum(dataset.tokens for dataset in self.datasets)


def find_replaced(spec: RunSpec, recipe: Recipe, examples: Examples, known: KnownDatasets) -> set[str]:
    """Return the digests of earlier rows, held-out ones among them, that the run's dataset takes the place of."""
    replaced: set[str] = set()
    recurring = _recurring(examples, known.earlier)
    for dataset in known.earlier:
        old, meta = (*dataset.rows, *dataset.held_out), dataset.memory.meta
        same_name = meta.name == spec.dataset.name and meta.digest != spec.dataset.digest
        is_edition = meta.name in recipe.replay.supersedes or (
            same_name and is_new_edition(old, examples.answers.keys(), recurring)
        )
        replaced |= replaced_rows(old, examples.answers, is_edition=is_edition, recurring=recurring)
    return replaced


def replaced_for_all(spec: RunSpec, recipe: Recipe, examples: Examples, known: KnownDatasets) -> set[str]:
    """As `find_replaced`, but for what a sidecar alone says that its file supersedes: that is measured all the same."""
    supersedes = tuple(spec.root_recipe.get("replay", {}).get("supersedes", recipe.replay.supersedes))
    replay = recipe.replay.model_copy(update={"supersedes": supersedes})
    return find_replaced(spec, recipe.model_copy(update={"replay": replay}), examples, known)


def rehearse(
    spec: RunSpec,
    recipe: Recipe,
    tokenizer: Any,
    *,
    examples: Examples,
    known: KnownDatasets,
    replaced: AbstractSet[str],
) -> Replay:
    """Return what the run rehearses beside `examples`, as it was drawn at the first attempt.

    No row is rehearsed that is in the new file, held out anywhere, or in `replaced`. Drawn anew where that was for another parent, dataset or share, or the rows are not kept any more. Raises OSError.
    """
    if not recipe.replay.share or not known.earlier:
        return Replay(examples=[])
    run_dir, by_digest = Path(spec.run_dir), {dataset.memory.meta.digest: dataset for dataset in known.earlier}
    key = {
        "dataset": spec.dataset.digest,
        "line": sorted(by_digest),
        **recipe.replay.model_dump(mode="json", include={"share", "min_rows", "max_share", "supersedes"}),
    }
    budget = Budget.of(sum(example.trained_tokens for example in examples.train), recipe.replay)
    encoder = _Encoder(tokenizer=tokenizer, recipe=recipe, spec=spec)
    passed_over = {
        *known.held_out,
        *replaced,
        *_recurring(examples, known.earlier),
        *(example.content_digest for example in examples.held_out),
    }
    frozen = read_frozen(run_dir, key, lambda dataset, row: dataset in by_digest and row not in passed_over)
    lines = frozen if frozen is not None else _draw(encoder, budget, known.earlier, passed_over)
    rehearsed: list[Example] = []
    datasets = []
    for digest in dict.fromkeys(digest for digest, _ in lines):
        dataset = by_digest[digest]
        rows = encoder.encode([line for of, line in lines if of == digest], dataset)
        samples = [one for row in rows for one in row]
        tokens = sum(one.trained_tokens for one in samples)
        datasets.append(ReplayedDataset(name=dataset.memory.meta.name, digest=digest, rows=len(rows), tokens=tokens))
        rehearsed += samples
    if frozen is None and distributed.is_main_process():
        freeze(run_dir, key, datasets, [line for _, line in lines])
    return Replay(
        examples=rehearsed,
        datasets=tuple(datasets),
        wanted_tokens=round(budget.wanted),
        digest=digest_of(b"".join(line for _, line in lines)) if lines else None,
    )


@dataclass(frozen=True, kw_only=True)
class _Encoder:
    """Kept rows to samples, each under the `train_on` of its own dataset."""

    tokenizer: Any
    recipe: Recipe
    spec: RunSpec

    def encode(self, lines: Sequence[bytes], dataset: EarlierDataset) -> list[list[Example]]:
        """The samples of each row that have a trained token, without a line: they stand in no file of this run."""
        data = self.recipe.data.model_copy(update={"train_on": dataset.memory.meta.train_on})
        rows = encode_rows([decode_row(line) for line in lines], self.tokenizer, data, day=claimed_on(self.spec.job_id))
        return [[replace(one, line=0) for one in row] for row in rows]


def _draw(
    encoder: _Encoder, budget: Budget, earlier: Sequence[EarlierDataset], passed_over: AbstractSet[str]
) -> list[tuple[str, bytes]]:
    """Draw the rows to rehearse, none of them twice: datasets and lines."""
    seen = set(passed_over)
    pools: list[list[tuple[str, bytes, int]]] = []
    for dataset in earlier:
        usable = [row for row in dataset.rows if row.digest not in seen]
        seen |= {row.digest for row in usable}  # the same row may be kept of two datasets
        pools.append(list(_sized(draw_order(usable, encoder.spec.dataset.digest), dataset, encoder, budget)))
    counts = draw([[size for _, _, size in pool] for pool in pools], budget, min_rows=encoder.recipe.replay.min_rows)
    return [(digest, line) for pool, count in zip(pools, counts, strict=True) for digest, line, _ in pool[:count]]


def _sized(
    rows: Sequence[StoredRow], dataset: EarlierDataset, encoder: _Encoder, budget: Budget
) -> Iterator[tuple[str, bytes, int]]:
    """Dataset, line and trained tokens of the rows that may be taken; of no more than the whole budget could hold.

    A row of which nothing would be learned now is passed over.
    """
    digest, total = dataset.memory.meta.digest, 0
    for at in range(0, len(rows), ROWS_AT_ONCE):
        if total > max(budget.wanted, budget.most):
            return
        part = rows[at : at + ROWS_AT_ONCE]
        for row, samples in zip(part, encoder.encode([row.line for row in part], dataset), strict=True):
            if samples:
                size = sum(one.trained_tokens for one in samples)
                total += size
                yield digest, frozen_line(row, digest), size


def _recurring(examples: Examples, earlier: Sequence[EarlierDataset]) -> set[str]:
    """Digests of earlier rows that are in the new file, trained or held out."""
    old = {row.digest for dataset in earlier for row in (*dataset.rows, *dataset.held_out)}
    new = (example.content_digest for part in (examples.train, examples.held_out) for example in part)
    return {digest for digest in new if digest in old}
