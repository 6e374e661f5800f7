"""Which rows of a dataset are held out: decided by the rows' own digests, whatever their order and spelling."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from daemon.recipe import DataSettings

MIN_MEASURED_ROWS = (
    25  # of fewer, a handful would be held out: too few to tell a loss from chance, too many to do without
)
LARGEST_SHARE = 5  # held_out_min_rows takes at most one row in so many


def held_out_count(rows: int, data: DataSettings) -> int:
    """How many of `rows` different rows are held out.

    The fraction, but at least held_out_min_rows where that is at most a fifth; never more than held_out_max_rows; none of a
    file too small to measure.
    """
    if rows < MIN_MEASURED_ROWS or data.held_out_fraction == 0:
        return 0
    least = min(data.held_out_min_rows, rows // LARGEST_SHARE)
    return min(max(int(data.held_out_fraction * rows), least), data.held_out_max_rows)


def choose_held_out(digests: Collection[str], data: DataSettings) -> frozenset[str]:
    """Choose the rows with the smallest digests: the same ones again wherever most of them are dropped together."""
    different = set(digests)
    return frozenset(sorted(different)[: held_out_count(len(different), data)])


def too_small(rows: int, data: DataSettings) -> str:
    """Say that a dataset cannot be measured; empty when it can, and where nobody wants it measured."""
    if rows >= MIN_MEASURED_ROWS or data.held_out_fraction == 0:
        return ""
    different = "one row" if rows == 1 else f"{rows} different rows"
    return f"too small to measure: {different}, and rows are held out of {MIN_MEASURED_ROWS} or more"
