"""Evaluations during a run: when they are due, which was best, and when the run has stopped learning. Pure.

They are kept where transformers keeps them, in the state's `log_history`, which every checkpoint carries: a resumed run knows
those of its earlier attempts, and decides as one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from daemon.job import HeldOutPoint
from daemon.recipe import TrainingSettings

EVAL_LOSS = "eval_loss"  # transformers' name for it in log_history
MOST_POINTS = 100  # that a result or a status carries


@dataclass(frozen=True, kw_only=True)
class Selection:
    """When a run's held-out rows are evaluated, and what follows from it."""

    every: int = 0  # steps; 0: not during the run
    total_steps: int
    load_best: bool = False
    patience: int = 0  # evaluations without improvement after which the run ends; 0: it never does
    threshold: float = 0.0  # nats that count as an improvement

    @classmethod
    def of(cls, training: TrainingSettings, *, total_steps: int, measured: bool) -> Selection:
        """Return what the settings ask for; without rows that are held out, nothing is evaluated."""
        if not training.eval_steps or not measured:
            return cls(total_steps=total_steps)
        share = training.eval_steps < 1
        return cls(
            every=max(1, int(training.eval_steps * total_steps) if share else int(training.eval_steps)),
            total_steps=total_steps,
            load_best=training.load_best_model_at_end,
            patience=training.early_stopping_patience,
            threshold=training.early_stopping_threshold,
        )

    def is_due(self, step: int) -> bool:
        """Whether the held-out rows are evaluated after a step: every so many, and after the last."""
        return self.every > 0 and step > 0 and (step % self.every == 0 or step >= self.total_steps)

    def is_exhausted(self, points: Sequence[HeldOutPoint]) -> bool:
        """Whether the newest evaluations, `patience` of them, have each improved on nothing before them."""
        if not self.patience or not points:
            return False
        best, fruitless = points[0].loss, 0
        for point in points[1:]:
            fruitless = 0 if point.loss < best - self.threshold else fruitless + 1
            best = min(best, point.loss)
        return fruitless >= self.patience


def best_point(points: Sequence[HeldOutPoint]) -> HeldOutPoint | None:
    """Return the lowest loss, of equal ones the first; None before the first evaluation."""
    return min(points, key=lambda point: (point.loss, point.step), default=None)


def points_of(log_history: Sequence[Mapping[str, Any]]) -> list[HeldOutPoint]:
    """Return the evaluations of a Trainer's history, ascending by step."""
    found = {int(entry["step"]): float(entry[EVAL_LOSS]) for entry in log_history if EVAL_LOSS in entry}
    return [HeldOutPoint(step=step, loss=loss) for step, loss in sorted(found.items())]


def thinned(points: Sequence[HeldOutPoint], most: int = MOST_POINTS) -> tuple[HeldOutPoint, ...]:
    """Return at most so many points, evenly over the run, the first, the last and the best always among them."""
    if len(points) <= most:
        return tuple(points)
    places = {round(at * (len(points) - 1) / (most - 2)) for at in range(most - 1)}
    best = best_point(points)
    return tuple(point for at, point in enumerate(points) if at in places or point is best)
