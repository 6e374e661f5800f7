"""Evaluations during a run: when they are due, which is best, when they end it, and what a status carries of them."""

from __future__ import annotations

from typing import Any

import pytest

from daemon.errors import ConfigError
from daemon.job import HeldOutPoint
from daemon.recipe import Recipe, TrainingSettings
from daemon.trainer.selection import Selection, best_point, points_of, thinned


def points(*losses: float) -> list[HeldOutPoint]:
    return [HeldOutPoint(step=10 * at, loss=loss) for at, loss in enumerate(losses, start=1)]


@pytest.mark.parametrize(
    ("eval_steps", "every", "due"),
    [(0, 0, []), (4, 4, [4, 8, 10]), (5, 5, [5, 10]), (0.3, 3, [3, 6, 9, 10]), (0.01, 1, [*range(1, 11)]), (99, 99, [10])],
)  # fmt: skip
def test_rows_are_evaluated_every_so_many_steps_and_after_the_last(
    eval_steps: float, every: int, due: list[int]
) -> None:
    selection = Selection.of(TrainingSettings(eval_steps=eval_steps), total_steps=10, measured=True)
    assert selection.every == every
    assert [step for step in range(11) if selection.is_due(step)] == due
    assert Selection.of(TrainingSettings(eval_steps=eval_steps), total_steps=10, measured=False).every == 0


@pytest.mark.parametrize(
    ("losses", "patience", "threshold", "exhausted"),
    [
        ([], 1, 0.0, False),
        ([3.0], 1, 0.0, False),
        ([3.0, 2.0], 1, 0.0, False),
        ([3.0, 3.0], 1, 0.0, True),
        ([3.0, 3.1, 2.9], 2, 0.0, False),
        ([3.0, 3.1, 3.2], 2, 0.0, True),
        ([3.0, 2.99, 2.98], 2, 0.1, True),
        ([3.0, 2.99, 2.85], 2, 0.1, False),
        ([3.0, 3.1, 3.2, 3.3], 0, 0.0, False),
    ],
)
def test_a_run_ends_after_so_many_evaluations_in_a_row_without_a_lower_loss(
    losses: list[float], patience: int, threshold: float, exhausted: bool
) -> None:
    selection = Selection(every=10, total_steps=100, patience=patience, threshold=threshold)
    assert selection.is_exhausted(points(*losses)) is exhausted


def test_the_best_is_the_lowest_loss_and_of_equal_ones_the_first() -> None:
    assert best_point([]) is None
    assert best_point(points(2.0, 1.0, 1.5, 1.0)) == HeldOutPoint(step=20, loss=1.0)


def test_the_trainers_history_gives_back_what_was_put_into_it() -> None:
    history: list[dict[str, Any]] = [
        {"loss": 1.0, "step": 10},
        {"eval_loss": 0.1 + 0.2, "step": 20, "epoch": 1.0},
        {"eval_loss": 2.0, "step": 10},
    ]
    assert points_of(history) == [HeldOutPoint(step=10, loss=2.0), HeldOutPoint(step=20, loss=0.1 + 0.2)]


def test_of_many_evaluations_the_first_the_last_and_the_best_always_travel() -> None:
    many = points(*(abs(at - 333) + 1.0 for at in range(1000)))
    few = thinned(many)
    assert len(few) <= 100
    assert few[0] == many[0]
    assert few[-1] == many[-1]
    assert best_point(few) == many[333]
    assert list(few) == sorted(few, key=lambda point: point.step)
    assert thinned(many[:100]) == tuple(many[:100])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"eval_steps": 2.5}, "eval_steps is a whole number"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs evaluations during the run: set eval_steps"),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs evaluations during the run"),
        ({"eval_steps": -1}, "eval_steps"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_what_is_missing(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        Recipe().with_overrides({"training": settings})
    assert "num_train_epochs" not in str(caught.value), "the whole table was printed"
