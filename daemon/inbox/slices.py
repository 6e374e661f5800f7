"""Long pieces of work over names, a slice at each tick, so that the main loop never stands for them."""

from __future__ import annotations

import time
from collections.abc import Iterator

SLICE_SECONDS = 0.05  # of a tick, for each piece of work
NAMES_A_PAUSE = 200  # names between two looks at the clock


def go_on(work: Iterator[object]) -> bool:
    """Take steps of a piece of work for SLICE_SECONDS, one at least; returns whether it has come to its end."""
    until = time.monotonic() + SLICE_SECONDS
    return all(time.monotonic() < until for _ in work)
