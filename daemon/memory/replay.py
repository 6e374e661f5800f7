"""Which rows of earlier datasets a run trains again beside its own, decided once a run and then frozen.

The arithmetic: with n trained tokens of new rows and a share s, s / (1 - s) * n trained tokens are rehearsed, divided equally
among the datasets that the parent has learned. A dataset without enough leaves its part to the others. Of small files each
dataset has at least min_rows rows, as long as the whole stays within max_share; where that is not enough for all, each has
fewer rows alike, and those that were rehearsed longest ago have the one more. No row comes twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from daemon.job import ReplayedDataset, from_json, to_json
from daemon.memory.sample import fair_level
from daemon.memory.store import StoredRow, digest_of
from daemon.recipe import ReplaySettings
from guard.atomic import write_atomic

ROWS_NAME = "replay.jsonl"
MANIFEST_NAME = "replay.json"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many trained tokens of earlier datasets a run takes."""

    wanted: float
    most: float

    @classmethod
    def of(cls, new_tokens: int, replay: ReplaySettings) -> Budget:
        """The budget beside so many trained tokens of new rows."""
        wanted = new_tokens * replay.share / (1 - replay.share)
        return cls(wanted=wanted, most=new_tokens * replay.max_share / (1 - replay.max_share) if replay.share else 0.0)


def draw(pools: Sequence[Sequence[int]], budget: Budget, *, min_rows: int) -> list[int]:
    """How many rows of each pool are taken, from its first on.

    `pools`: the trained tokens of each dataset's rows, in the order in which they are taken; the dataset that was rehearsed
    longest ago comes first.
    """
    totals = [[0, *accumulate(pool)] for pool in pools]  # tokens of the first n rows
    taken = [0] * len(pools)
    spent = 0
    # A row of each at a time, so that where max_share ends it no dataset has gone without for another.
    for rows in range(1, min(min_rows, max(map(len, pools), default=0)) + 1):
        for at, total in enumerate(totals):
            if taken[at] == rows - 1 and rows < len(total) and spent + total[rows] - total[rows - 1] <= budget.most:
                taken[at], spent = rows, spent + total[rows] - total[rows - 1]
    level = fair_level([total[-1] for total in totals], budget.wanted)
    for at, total in enumerate(totals):
        while taken[at] < len(total) - 1:
            after = total[taken[at] + 1]
            # Up to the row that comes nearest to the dataset's part.
            if after - level > level - total[taken[at]] or spent + after - total[taken[at]] > budget.most:
                break
            spent += after - total[taken[at]]
            taken[at] += 1
    return taken


def draw_order(rows: Iterable[StoredRow], dataset_digest: str) -> list[StoredRow]:
    """The order in which rows are taken for a run over a dataset: another one for each dataset."""
    return sorted(rows, key=lambda row: blake3(f"{dataset_digest} {row.digest}".encode()).digest())


# -- what a new dataset replaces


def replaced_rows(
    old: Sequence[StoredRow], answers: Mapping[str, AbstractSet[str]], *, is_edition: bool, recurring: AbstractSet[str]
) -> set[str]:
    """Digests of a dataset's rows that a new dataset takes the place of.

    `answers`: what the new dataset trains as answers to prompts of old rows, as digests of rows. A prompt with one answer then
    and another one now has the new one. Where one side has several, it is no question with one answer, and nothing is
    replaced. Of an earlier edition of the same file, rows that do not come again are gone: `recurring` are those that do.
    """
    asked: dict[str, set[str]] = {}
    for row in old:
        asked.setdefault(row.asks, set()).add(row.digest)
    replaced = {
        next(iter(digests))
        for prompt, digests in asked.items()
        if prompt and len(digests) == 1 and len(now := answers.get(prompt, frozenset())) == 1 and digests != now
    }
    return replaced | ({row.digest for row in old} - recurring if is_edition else set())


def is_new_edition(old: Sequence[StoredRow], answers: AbstractSet[str], recurring: AbstractSet[str]) -> bool:
    """Whether a file of the same name is the same file anew: at least half of the old rows come again or are answered."""
    again = sum(row.digest in recurring or row.asks in answers for row in old)
    return bool(old) and 2 * again >= len(old)


# -- frozen for the run


@dataclass(frozen=True, kw_only=True)
class FrozenReplay:
    """The rows that every attempt of a run rehearses: `replay.jsonl`, and `replay.json`, which is written last."""

    key: Mapping[str, Any]  # what they were drawn for; of anything else they are drawn anew
    datasets: tuple[ReplayedDataset, ...] = ()
    digest: str = ""  # of replay.jsonl


def read_frozen(
    run_dir: Path, key: Mapping[str, Any], may_be_trained: Callable[[str, str], bool]
) -> list[tuple[str, bytes]] | None:
    """Return the frozen rows, with their datasets' digests; None when they have to be drawn.

    That is at the first attempt, when they were drawn for something else, are damaged, or one may not be trained any more, by
    its dataset's digest and its own. Raises OSError.
    """
    try:
        frozen = from_json((run_dir / MANIFEST_NAME).read_bytes(), FrozenReplay)
        data = (run_dir / ROWS_NAME).read_bytes()
    except (FileNotFoundError, ValueError):
        return None
    if dict(frozen.key) != dict(key) or digest_of(data) != frozen.digest:
        return None
    try:
        rows = [(msgspec.json.decode(line, type=_Frozen), line) for line in data.splitlines(keepends=True)]
    except msgspec.MsgspecError:  # of another version of Dropforge
        return None
    if not all(may_be_trained(row.dataset, row.digest) for row, _ in rows):
        return None
    return [(row.dataset, line) for row, line in rows]


def freeze(run_dir: Path, key: Mapping[str, Any], datasets: Iterable[ReplayedDataset], rows: Iterable[bytes]) -> None:
    """Write the rows that a run rehearses, durably. Raises OSError."""
    data = b"".join(rows)
    (run_dir / MANIFEST_NAME).unlink(missing_ok=True)
    write_atomic(run_dir / ROWS_NAME, data, mode=0o600)
    frozen = FrozenReplay(key=key, datasets=tuple(datasets), digest=digest_of(data))
    write_atomic(run_dir / MANIFEST_NAME, to_json(frozen, indent=1), mode=0o600)


def frozen_line(row: StoredRow, dataset_digest: str) -> bytes:
    """Return a row as a line of replay.jsonl."""
    return json.dumps({"dataset": dataset_digest, **json.loads(row.line)}).encode() + b"\n"


def rehearses(run_dir: Path, dataset_digest: str) -> bool:
    """Whether a run's frozen rows are of a dataset, as far as they can be read."""
    try:
        frozen = from_json((run_dir / MANIFEST_NAME).read_bytes(), FrozenReplay)
    except FileNotFoundError:
        return (run_dir / ROWS_NAME).exists()  # torn by a crash: whose rows they are is not known
    except (OSError, ValueError):
        return True
    return any(dataset.digest == dataset_digest for dataset in frozen.datasets)


def thaw(run_dir: Path) -> None:
    """Delete a run's frozen rows; its next attempt draws them anew. Raises OSError."""
    (run_dir / ROWS_NAME).unlink(missing_ok=True)
    (run_dir / MANIFEST_NAME).unlink(missing_ok=True)


class _Frozen(msgspec.Struct):
    dataset: str
    digest: str
