"""Which rows share a step and which a pass: by seed and lengths alone, every row once, within the budget."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.trainer.batches import StepBatches, flat_passes, group_rows, padded_passes, share_rows
from daemon.trainer.collate import IGNORE, Collator, Example

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=70)


def steps(lengths: list[int], rows: int, seed: int, epoch: int, *, grouped: bool = True) -> list[list[int]]:
    torch.manual_seed(epoch * 7 + seed)  # the process's own random state must not matter
    batches = StepBatches(lengths, rows_a_step=rows, seed=seed, grouped=grouped)
    batches.set_epoch(epoch)
    assert len(batches) == len(list(batches))
    return list(batches)


def lognormal(count: int) -> list[int]:
    return [max(4, int(random.Random(at).lognormvariate(5, 0.8))) for at in range(count)]


@given(LENGTHS, st.integers(1, 12), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_row_comes_once_an_epoch_in_steps_of_one_size(lengths: list[int], rows: int, grouped: bool) -> None:
    found = steps(lengths, rows, 3, 1, grouped=grouped)
    assert sorted(index for step in found for index in step) == list(range(len(lengths)))
    assert all(len(step) == rows for step in found[:-1])
    assert found == steps(lengths, rows, 3, 1, grouped=grouped)


def test_order_differs_by_seed_and_by_epoch() -> None:
    lengths = lognormal(100)
    assert len({str(steps(lengths, 8, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_steps_are_of_all_lengths_in_random_order_and_their_groups_of_similar_ones() -> None:
    lengths = lognormal(1600)
    found = steps(lengths, 8, 1, 0)
    group = group_rows(8)
    spread = [
        max(part) / min(part)
        for step in found
        for part in [[lengths[at] for at in step[start : start + group]] for start in range(0, 8, group)]
    ]
    assert sorted(spread)[len(spread) // 2] < 1.2
    # The first half of an epoch is a fair sample: its mean is the whole's, which sorted rows would miss by far.
    means = [sum(lengths[at] for at in step) / len(step) for step in found]
    half = means[: len(means) // 2]
    assert abs(sum(half) / len(half) / (sum(lengths) / len(lengths)) - 1) < 0.15
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)


@pytest.mark.parametrize(("rows", "group"), [(1, 1), (2, 1), (4, 2), (6, 3), (7, 1), (8, 4), (16, 8), (64, 8)])
def test_a_group_divides_a_step_and_leaves_room_for_another(rows: int, group: int) -> None:
    assert group_rows(rows) == group


@given(LENGTHS, st.integers(50, 1000), st.integers(0, 200))
@settings(max_examples=80, deadline=None)
def test_passes_hold_every_row_once_within_the_budget(lengths: list[int], budget: int, price: int) -> None:
    padded = padded_passes(lengths, budget_tokens=budget, pass_tokens=price)
    flat = flat_passes(lengths, budget_tokens=budget)
    for passes, size in ((padded, lambda part: max(part) * len(part)), (flat, sum)):
        assert sorted(at for rows in passes for at in rows) == list(range(len(lengths)))
        assert all(len(rows) == 1 or size([lengths[at] for at in rows]) <= budget for rows in passes)


def test_padding_is_avoided_when_it_costs_more_than_a_pass() -> None:
    lengths = [100, 10, 100, 10, 10, 10]
    assert [sorted(rows) for rows in padded_passes(lengths, budget_tokens=10_000, pass_tokens=50)] == [
        [0, 2],
        [1, 3, 4, 5],
    ]
    assert len(padded_passes(lengths, budget_tokens=10_000, pass_tokens=5000)) == 1


@given(LENGTHS, st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_processes_share_a_steps_rows_evenly(lengths: list[int], processes: int) -> None:
    shares = share_rows(lengths, processes)
    assert sorted(at for share in shares for at in share) == list(range(len(lengths)))
    loads = [sum(lengths[at] for at in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)


def test_processes_together_learn_what_one_would_and_one_without_rows_learns_nothing() -> None:
    examples = [Example(input_ids=[1] * size, learned=((0, size),), line=size, content_digest="") for size in (7, 3)]
    for flat in (False, True):
        parts = [
            Collator(pad_token_id=0, budget_tokens=100, flat=flat, rank=rank, world_size=3)(examples)
            for rank in range(3)
        ]
        assert {part["trained_tokens"] for part in parts} == {8}
        counted = [sum(int((one["labels"][..., 1:] != IGNORE).sum()) for one in part["passes"]) for part in parts]
        assert sorted(counted) == [0, 2, 6]


def test_a_pass_may_be_exactly_as_large_as_the_budget() -> None:
    assert flat_passes([60, 40, 50, 50, 1], budget_tokens=100) == [[0, 1], [2, 3], [4]]
    assert flat_passes([60, 40], budget_tokens=99) == [[0], [1]]
    assert padded_passes([50, 50, 50], budget_tokens=150, pass_tokens=1) == [[0, 1, 2]]
    assert [len(rows) for rows in padded_passes([50, 50, 50], budget_tokens=149, pass_tokens=1)] in ([2, 1], [1, 2])
    assert padded_passes([200], budget_tokens=100, pass_tokens=1) == [[0]]
    assert flat_passes([200, 90], budget_tokens=100) == [[0], [1]]


def test_the_longest_pass_comes_first_so_that_a_lack_of_memory_shows_at_once() -> None:
    lengths = [10, 300, 20, 310, 15]
    passes = padded_passes(lengths, budget_tokens=700, pass_tokens=12)
    assert passes == [[1, 3], [0, 4, 2]]
    assert flat_passes([10, 300, 20], budget_tokens=300) == [[1], [2, 0]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(20, 120), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_no_division_of_neighbours_by_length_costs_less(lengths: list[int], budget: int, price: int) -> None:
    """Against every way to cut the sorted rows, at the same price of a pass."""

    def cost(passes: list[list[int]]) -> int:
        return sum(max(part) * len(part) + price for part in passes)

    ordered = sorted(lengths)
    cheapest = min(
        cost(parts)
        for cuts in range(2 ** (len(ordered) - 1))
        for parts in [_cut(ordered, cuts)]
        if all(len(part) == 1 or max(part) * len(part) <= budget for part in parts)
    )
    found = padded_passes(lengths, budget_tokens=budget, pass_tokens=price)
    assert cost([[lengths[at] for at in rows] for rows in found]) == cheapest


def _cut(rows: list[int], cuts: int) -> list[list[int]]:
    """Cut behind row n where bit n is set."""
    parts: list[list[int]] = [[]]
    for at, row in enumerate(rows):
        parts[-1].append(row)
        if cuts >> at & 1 and at < len(rows) - 1:
            parts.append([])
    return parts


def test_each_row_goes_to_the_process_with_the_least_to_do_longest_first() -> None:
    assert share_rows([10, 30, 20, 30], 2) == [[1, 2], [3, 0]]
    assert share_rows([5, 5, 5], 2) == [[0, 2], [1]]
    assert share_rows([], 2) == [[], []]


def test_an_epoch_has_as_many_steps_as_its_rows_need_and_the_last_is_the_short_one() -> None:
    for rows, count in ((8, 2), (7, 3), (16, 1), (5, 4)):
        batches = StepBatches(lognormal(16), rows_a_step=rows, seed=0, grouped=True)
        assert (len(batches), len(list(batches))) == (count, count)
        assert [len(step) for step in batches][:-1] == [rows] * (count - 1)


def test_the_groups_of_a_step_have_nothing_to_do_with_each_other_and_ungrouped_rows_neither() -> None:
    lengths = [length for length in range(1, 257) for _ in range(2)]
    grouped, single = steps(lengths, 4, 1, 0), steps(lengths, 4, 1, 0, grouped=False)
    for found in (grouped, single):
        spread = sorted(max(lengths[at] for at in step) - min(lengths[at] for at in step) for step in found)
        assert spread[len(spread) // 2] > 20
    near = [abs(lengths[step[at]] - lengths[step[at + 1]]) for step in grouped for at in (0, 2)]
    far = [abs(lengths[step[at]] - lengths[step[at + 1]]) for step in single for at in (0, 2)]
    assert sum(near) < sum(far) / 5
