"""When waiting jobs will be done, as far as the past tells: a pure estimate from values."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from daemon.job import Job

RECENT_JOBS = 10  # whose pace counts


def seconds_per_row(finished: Sequence[Job]) -> float | None:
    """Median pace of the newest jobs that trained; None when none did. `finished` is newest first."""
    paces = [
        job.result.wall_seconds / job.result.rows
        for job in finished
        if job.result is not None and job.result.rows and job.result.wall_seconds and job.attempt == 1
    ]
    return median(paces[:RECENT_JOBS]) if paces else None


def queue_etas(queue: Sequence[Job], pace: float | None, running_left: float | None) -> dict[str, float]:
    """Seconds until each queued job is done, by its id; empty when the pace is not known.

    `queue` is in the order in which jobs will run; `running_left` are the running job's seconds to its end.
    """
    if pace is None:
        return {}
    total = running_left or 0.0
    etas = {}
    for job in queue:
        total += pace * (job.dataset.rows if job.dataset else 0)
        etas[job.id] = round(total, 1)
    return etas


def spell(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
