"""Which rows share a step, and which of them share a forward pass: decided from lengths alone.

A step always has the same number of rows, drawn by seed and epoch. How it is divided into passes changes its cost and, but
for the last bits of a float, nothing that it computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

# Rows are sorted by length inside windows of so many steps, so that an epoch's steps stay a random sample.
WINDOW_STEPS = 64
# Neighbours by length change from epoch to epoch: a row's length counts as up to so much more or less.
LENGTH_JITTER = 0.05
MAX_GROUP_ROWS = 8


class StepBatches(torch.utils.data.Sampler[list[int]]):  # type: ignore[misc]  # torch is not followed
    """Row indices of each optimizer step, in an order that depends on lengths, seed and epoch alone.

    Rows of similar length form groups, and groups in random order form steps; every row comes once an epoch. The order
    depends neither on the process's random state nor on the division into passes and devices, so that a resumed run, which
    sets the epoch and skips steps, sees the same rows in the same steps.
    """

    def __init__(self, lengths: Sequence[int], *, rows_a_step: int, seed: int, grouped: bool) -> None:
        self.batch_size = rows_a_step
        self.drop_last = False
        self.epoch = 0
        self._lengths = torch.tensor(lengths, dtype=torch.float64)
        self._seed = seed
        self._group = group_rows(rows_a_step) if grouped else 1

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def __len__(self) -> int:
        return math.ceil(len(self._lengths) / self.batch_size)

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed((self._seed << 20) + self.epoch)
        order = torch.randperm(len(self._lengths), generator=generator)
        if self._group == 1:
            return order.tolist()  # type: ignore[no-any-return]
        jitter = 1 + LENGTH_JITTER * (2 * torch.rand(len(order), generator=generator, dtype=torch.float64) - 1)
        lengths = self._lengths[order] * jitter
        window = self.batch_size * WINDOW_STEPS
        by_length = torch.cat(
            [
                order[start : start + window][torch.argsort(lengths[start : start + window], stable=True)]
                for start in range(0, len(order), window)
            ]
        )
        # The last group may be short; it stays last, so that only the last step of an epoch is short.
        whole = len(by_length) // self._group
        groups = by_length[: whole * self._group].view(whole, self._group)
        groups = groups[torch.randperm(whole, generator=generator)]
        return [*groups.flatten().tolist(), *by_length[whole * self._group :].tolist()]


def group_rows(rows_a_step: int) -> int:
    """Return how many rows of similar length stay together: the largest divisor of a step's rows that leaves two groups."""
    most = max(1, min(MAX_GROUP_ROWS, rows_a_step // 2))
    return next(size for size in range(most, 0, -1) if rows_a_step % size == 0)


def padded_passes(lengths: Sequence[int], *, budget_tokens: int, pass_tokens: int) -> list[list[int]]:
    """Divide rows into passes of similar lengths at the least cost, each within the budget once padded.

    A pass costs its padded tokens plus `pass_tokens`. A row longer than the budget has a pass of its own. Returns indices
    into `lengths`, longest pass first, so that running out of memory shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda at: (lengths[at], at))
    best: list[tuple[float, int]] = [(0.0, 0)]  # of the first n rows: least cost, and where the last pass begins
    for end in range(1, len(order) + 1):
        longest, waste = lengths[order[end - 1]], 0
        cheapest = (math.inf, end - 1)
        for start in range(end - 1, -1, -1):
            rows = end - start
            waste += longest - lengths[order[start]]
            # Further back the rows are shorter still: padding only grows, past what passes of their own would cost.
            if rows > 1 and (rows * longest > budget_tokens or waste > 2 * pass_tokens * rows):
                break
            cost = best[start][0] + rows * longest + pass_tokens
            if cost < cheapest[0]:
                cheapest = (cost, start)
        best.append(cheapest)
    passes, end = [], len(order)
    while end:
        start = best[end][1]
        passes.append(order[start:end])
        end = start
    return passes


def flat_passes(lengths: Sequence[int], *, budget_tokens: int) -> list[list[int]]:
    """Divide rows into as few passes as the budget allows, without padding: longest rows first, each where it fits."""
    passes: list[tuple[int, list[int]]] = []
    for at in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        size = lengths[at]
        for number, (used, rows) in enumerate(passes):
            if used + size <= budget_tokens:
                passes[number] = (used + size, [*rows, at])
                break
        else:
            passes.append((size, [at]))
    return [rows for _, rows in passes]


def share_rows(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Divide a step's rows among processes: longest first, each to the one with the least to do so far."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for at in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        least = min(range(world_size), key=lambda rank: (loads[rank], rank))
        shares[least].append(at)
        loads[least] += lengths[at]
    return shares
