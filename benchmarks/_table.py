"""Timing several ways of doing one thing, side by side, and printing the medians.

The arms take turns within each round, so that a slow moment of the machine meets all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of doing it. `before` runs untimed before each round."""

    name: str
    run: Callable[[], object]
    before: Callable[[], object] | None = None


def measure(arms: Sequence[Arm], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, by the arm's name. One untimed round comes first, to warm caches."""
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for number in range(rounds + 1):
        for arm in arms:
            if arm.before is not None:
                arm.before()
            start = time.perf_counter()
            arm.run()
            spent = time.perf_counter() - start
            if number > 0:
                seconds[arm.name].append(spent)
    return seconds


def print_table(
    title: str,
    seconds: Mapping[str, Sequence[float]],
    *,
    relative_to: Sequence[str],
    size_bytes: int | None = None,
) -> None:
    """A line an arm: median, spread, GB/s when `size_bytes` is given, and speed relative to the named
    arms.
    """
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    header = [
        "",
        "median",
        "min",
        "max",
        *(["GB/s"] if size_bytes else []),
        *(f"x {name}" for name in relative_to),
    ]
    rows = [header]
    for name, values in seconds.items():
        rate = [f"{size_bytes / 1e9 / medians[name]:.2f}"] if size_bytes else []
        ratios = [f"{medians[other] / medians[name]:.2f}" for other in relative_to]
        rows.append(
            [name, *(_spell(value) for value in (medians[name], min(values), max(values))), *rate, *ratios]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    print(f"\n{title} ({len(next(iter(seconds.values())))} rounds, interleaved)")
    for row in rows:
        first, *rest = row
        print(
            f"  {first:<{widths[0]}}",
            *(f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)),
            sep="  ",
        )


def _spell(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def print_goal(
    text: str, *, value: float, at_least: float | None = None, at_most: float | None = None
) -> None:
    """What was aimed at and whether it was reached; a benchmark never fails."""
    reached = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    bound = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}"
    print(f"  goal: {text}: {value:.2f} ({bound}): {'reached' if reached else 'MISSED'}")
