"""Curves of a run, read from what its trainer said: losses, learning rate and speed by step, over all attempts.

The run directory keeps them for as long as the job is kept, however it ended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.run_dir import read_events, step_in

Points = tuple[tuple[int, float], ...]  # (step, value), ascending by step


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What is known of one run by step; a curve without points was not recorded."""

    total_steps: int = 0  # planned; 0: not known
    loss: Points = ()  # mean over the steps since the point before
    held_out_loss: Points = ()
    learning_rate: Points = ()
    tokens_per_second: Points = ()  # padding not counted, since the point before

    def __bool__(self) -> bool:
        return any(self.all())

    def all(self) -> tuple[Points, ...]:
        """Return every curve, also those without points."""
        return self.loss, self.held_out_loss, self.learning_rate, self.tokens_per_second


@dataclass(kw_only=True)
class _Builder:
    """Points by curve and step while events are read."""

    total_steps: int = 0
    first_loss: dict[int, float] = field(default_factory=dict)  # of one step, where none is logged with it
    points: dict[str, dict[int, float]] = field(default_factory=dict)

    def add(self, curve: str, step: int, value: object) -> None:
        number = _number(value)
        if number is not None:
            self.points.setdefault(curve, {})[step] = number

    def begin_at(self, step: int) -> None:
        """Take back what came after `step`: an attempt began there again."""
        for points in (self.first_loss, *self.points.values()):
            for later in [at for at in points if at > step]:
                del points[later]

    def curve(self, name: str) -> Points:
        found = self.points.get(name, {})
        if name == "loss":
            found = {**self.first_loss, **found}
        return tuple(sorted(found.items()))


def read_curves(run_dir: Path, *, last_bytes: int | None = None) -> Curves:
    """Return the curves of a run; without points where nothing can be read.

    A run that began again at an earlier step takes back what came after it. `last_bytes` reads no more of the events, from
    their end. What a trainer of another version wrote, and no number, is passed over.
    """
    built = _Builder()
    for name, data in read_events(run_dir, last_bytes=last_bytes):
        if name == "run.planned":
            built.total_steps = step_in(data, "total_steps")
        elif name == "run.started":
            built.begin_at(step_in(data, "start_step"))
        elif name == "run.first_step" and (loss := _number(data.get("loss"))) is not None:
            built.first_loss[step_in(data, "step")] = loss
        elif name == "run.stepped":
            step = step_in(data, "step")
            for curve in ("loss", "learning_rate", "tokens_per_second"):
                built.add(curve, step, data.get(curve))
        elif name == "run.evaluated":
            built.add("held_out_loss", _evaluated_step(data, built.total_steps), data.get("held_out_loss"))
    return Curves(
        total_steps=built.total_steps,
        loss=built.curve("loss"),
        held_out_loss=built.curve("held_out_loss"),
        learning_rate=built.curve("learning_rate"),
        tokens_per_second=built.curve("tokens_per_second"),
    )


def _evaluated_step(data: Mapping[str, Any], total_steps: int) -> int:
    """At which step rows held out were evaluated: said, or before the first and after the last."""
    if "step" in data:
        return step_in(data, "step")
    return 0 if data.get("when") == "before" else total_steps


def _number(value: object) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)
