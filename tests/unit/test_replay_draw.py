"""How many rows of which earlier datasets a run takes, and which rows a new dataset replaces: pure decisions."""

from __future__ import annotations

import random

import pytest

from daemon.memory.replay import Budget, draw, is_new_edition, replaced_rows
from daemon.memory.sample import choose_kept, fair_level, shares
from daemon.memory.store import StoredRow
from daemon.recipe import ReplaySettings

SETTINGS = ReplaySettings()


def spent(pools: list[list[int]], taken: list[int]) -> list[int]:
    return [sum(pool[:count]) for pool, count in zip(pools, taken, strict=True)]


def test_a_large_file_takes_its_share_of_tokens_equally_of_each_dataset() -> None:
    pools = [[10] * 1000, [100] * 1000, [37] * 1000]
    budget = Budget.of(90_000, SETTINGS)
    tokens = spent(pools, draw(pools, budget, min_rows=16))
    assert sum(tokens) == pytest.approx(10_000, rel=0.02)
    assert sum(tokens) / (90_000 + sum(tokens)) == pytest.approx(0.1, abs=0.002)
    assert max(tokens) - min(tokens) <= 100


def test_what_a_small_memory_cannot_give_the_others_give() -> None:
    pools = [[10] * 20, [10] * 1000, [10] * 1000]
    tokens = spent(pools, draw(pools, Budget.of(90_000, SETTINGS), min_rows=16))
    assert tokens[0] == 200
    assert sum(tokens) == pytest.approx(10_000, rel=0.01)


def test_of_small_files_each_dataset_has_sixteen_rows_as_long_as_a_quarter_is_enough() -> None:
    pools = [[10] * 100] * 2
    assert draw(pools, Budget.of(1000, SETTINGS), min_rows=16) == [16, 16]


def test_where_a_quarter_is_not_enough_for_all_each_has_fewer_rows_alike() -> None:
    """However long the rows of one are: none is starved for being the last."""
    # A quarter of the whole is a third of the new tokens: 333, which is 33 rows; those rehearsed longest ago have one more.
    assert draw([[10] * 100] * 5, Budget.of(1000, SETTINGS), min_rows=16) == [7, 7, 7, 6, 6]
    # Facts, dates, and JSON with long rows: each of the others has no more than one row more.
    assert draw([[12] * 100, [8] * 100, [45] * 100], Budget.of(1800, SETTINGS), min_rows=16) == [10, 9, 9]
    assert draw([[10] * 100] * 50, Budget.of(1000, SETTINGS), min_rows=16) == [1] * 33 + [0] * 17
    # One that has few rows, or one that is too long, leaves the room to the others.
    assert draw([[10] * 2, [10, 900], [10] * 100], Budget.of(600, SETTINGS), min_rows=16) == [2, 1, 16]
    assert draw([[10] * 2, [10] * 100, [10] * 100], Budget.of(600, SETTINGS), min_rows=16) == [2, 9, 9]


@pytest.mark.parametrize("new_tokens", [0, 1, 7, 100, 10_000, 1_000_000])
def test_never_more_than_max_share_nor_than_there_is(new_tokens: int) -> None:
    chance = random.Random(new_tokens)
    for _ in range(50):
        pools = [[chance.randint(1, 300) for _ in range(chance.randint(0, 60))] for _ in range(chance.randint(0, 60))]
        budget = Budget.of(new_tokens, SETTINGS)
        taken = draw(pools, budget, min_rows=16)
        assert all(0 <= count <= len(pool) for count, pool in zip(taken, pools, strict=True))
        assert sum(spent(pools, taken)) <= budget.most


def test_a_share_of_nothing_takes_nothing() -> None:
    off = ReplaySettings(share=0.0)
    assert draw([[10] * 100] * 3, Budget.of(1000, off), min_rows=16) == [0, 0, 0]


def row(digest: str, prompt: str) -> StoredRow:
    return StoredRow(digest=digest, asks=prompt, line=b"")


def test_a_new_answer_to_an_old_question_replaces_it_and_nothing_else_does() -> None:
    old = [row("a1", "a"), row("b1", "b"), row("c1", "c"), row("c2", "c"), row("text", "")]
    answers = {"a": {"a9"}, "b": {"b1"}, "c": {"c9"}, "": {"x"}}
    assert replaced_rows(old, answers, is_edition=False, recurring={"b1"}) == {"a1"}
    # A prompt with several answers is an invitation, not a question.
    assert replaced_rows(old, {"a": {"a8", "a9"}}, is_edition=False, recurring=set()) == set()


def test_of_an_earlier_edition_what_does_not_come_again_is_gone() -> None:
    old = [row(f"r{n}", f"p{n}") for n in range(10)]
    again = {f"r{n}" for n in range(5)}
    assert is_new_edition(old, set(), again)
    assert not is_new_edition(old, set(), again - {"r0"})
    assert is_new_edition(old, {"p9"}, again - {"r0"})
    assert replaced_rows(old, {}, is_edition=True, recurring=again) == {f"r{n}" for n in range(5, 10)}


def test_what_is_kept_is_a_uniform_sample_in_any_order_whose_beginning_is_one_too() -> None:
    digests = [f"{n:032x}" for n in range(500)]
    kept = choose_kept(digests, 50, b"k" * 32)
    shuffled = random.Random(1).sample(digests, 500)
    assert choose_kept([*shuffled, *shuffled[:9]], 50, b"k" * 32) == kept
    assert choose_kept(digests, 10, b"k" * 32) == kept[:10]
    assert choose_kept(digests, 50, b"K" * 32) != kept


def test_of_memories_that_are_too_large_together_the_largest_shrink_first() -> None:
    assert shares({"a": 10, "b": 100, "c": 300}, 1000) == {}
    assert shares({"a": 10, "b": 100, "c": 300}, 210) == {"c": 100}
    assert shares({"a": 10, "b": 100, "c": 300}, 110) == {"b": 50, "c": 50}
    assert fair_level([1, 2, 3], 100) == float("inf")
