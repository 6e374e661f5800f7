"""When waiting jobs will be done, as far as the past tells: pure estimates from values.

A run costs a start (a process, loading, tokenising, the first step, evaluating, saving) and its tokens. Both are learned
from finished jobs, so that jobs of a few rows, which are nearly all start, say nothing wrong of a large one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median

from daemon.job import Job, seconds_between

JOBS_MEASURED = 10  # whose pace counts
COMPARABLE = 0.25  # of the largest one's tokens, for a run to say how fast runs are


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long runs take here."""

    start_seconds: float
    tokens_per_second: float
    tokens_per_byte: float  # of a dataset's content, one epoch

    def seconds(self, job: Job) -> float:
        """About how long a job that waits will run."""
        if job.dataset is None:
            return self.start_seconds
        tokens = self.tokens_per_byte * _bytes_trained(job)
        if (longest := _setting(job, "data", "max_length")) is not None:
            tokens = min(tokens, job.dataset.rows * longest * _passes(job))
        return self.start_seconds + tokens / self.tokens_per_second

    def seconds_left(self, job: Job, now: str) -> float | None:
        """The same of a job that runs, to its end; None when it is not known when it began. `now`: UTC ISO 8601."""
        spent = seconds_between(job.started_at, now)
        return None if spent is None else round(max(0.0, self.seconds(job) - spent), 1)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What one finished run measured."""

    tokens: int
    tokens_per_second: float
    seconds: float  # from its launch to its end
    bytes_trained: float


def measure_pace(finished: Sequence[Job]) -> Pace | None:
    """Learn from the newest jobs that trained, `finished` being newest first; None when none did.

    The fastest of those about as large as the largest gives the speed: short runs end before a device is as fast as it
    gets, and whatever else a machine does makes runs slower only.
    """
    runs = list(_runs(finished))[:JOBS_MEASURED]
    if not runs:
        return None
    most = max(run.tokens for run in runs)
    fastest = max(run.tokens_per_second for run in runs if run.tokens >= COMPARABLE * most)
    return Pace(
        start_seconds=median(max(0.0, run.seconds - run.tokens / run.tokens_per_second) for run in runs),
        tokens_per_second=fastest,
        tokens_per_byte=sum(run.tokens for run in runs) / sum(run.bytes_trained for run in runs),
    )


def _runs(finished: Sequence[Job]) -> Iterator[_Run]:
    for job in finished:
        result = job.result
        # Of a job that was begun several times only the last part is known.
        if (
            result is None
            or job.attempt != 1
            or result.start_step
            or not result.tokens_trained
            or not result.tokens_per_second
        ):
            continue
        if bytes_trained := _bytes_trained(job):
            yield _Run(
                tokens=result.tokens_trained,
                tokens_per_second=result.steady_tokens_per_second or result.tokens_per_second,
                seconds=seconds_between(job.started_at, job.finished_at) or result.wall_seconds,
                bytes_trained=bytes_trained,
            )


def _bytes_trained(job: Job) -> float:
    """Bytes of content over all passes."""
    if job.dataset is None:
        return 0.0
    return (job.dataset.content_bytes or job.dataset.size_bytes) * _passes(job)


def _passes(job: Job) -> float:
    """How often each row is trained; where the steps are set, they count and not the epochs."""
    steps = _setting(job, "training", "max_steps")
    if steps is None or job.dataset is None or not job.dataset.rows:
        return _setting(job, "training", "num_train_epochs") or 1.0
    parts = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes")
    return steps * prod(_setting(job, "training", part) or 1.0 for part in parts) / job.dataset.rows


def _setting(job: Job, table: str, key: str) -> float | None:
    """A number of the recipe that the job was queued with."""
    value = ((job.recipe or {}).get(table) or {}).get(key)
    return float(value) if isinstance(value, int | float) and value > 0 else None


def queue_etas(queue: Sequence[Job], pace: Pace | None, running_left: float | None) -> dict[str, float]:
    """Seconds until each queued job is done, by its id; empty when the pace is not known.

    `queue` is in the order in which jobs will run; `running_left` are the running job's seconds to its end.
    """
    if pace is None:
        return {}
    total = running_left or 0.0
    etas = {}
    for job in queue:
        total += pace.seconds(job)
        etas[job.id] = round(total, 1)
    return etas


def format_duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`, `12 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 48 * 3600:
        return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} days"
