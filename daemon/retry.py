"""What follows from the end of an attempt: a pure decision from values."""

from __future__ import annotations

from dataclasses import dataclass

from daemon.config import QueueSettings
from daemon.executors.base import Exit
from daemon.job import FailureKind, Job, JobState, Outcome, RunResult

# The same rows, settings or numbers would fail again: a person has to act first.
FINAL_FAILURES = frozenset({FailureKind.BAD_DATA, FailureKind.CONFIG, FailureKind.DIVERGED})


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """Where a job goes after an attempt."""

    to: JobState
    reason: str
    failure: FailureKind | None = None
    not_before: float = 0.0  # seconds since the epoch
    fruitless: int = 0  # attempts in a row without a new sealed step


def conclude(
    *,
    job: Job,
    result: RunResult | None,
    ended: Exit,
    asked: bool,
    progressed: bool,
    queue: QueueSettings,
    now: float,
) -> Conclusion:
    """Decide from the trainer's own result first, from its exit only when it left none.

    A success is believed only if every planned step ran. `asked`: we had asked the trainer to leave, which burns no
    attempt. `progressed`: the attempt sealed a step that no earlier one had.
    """
    if result is not None and result.outcome is Outcome.SUCCEEDED:
        if result.steps_run == result.steps_planned and result.steps_run >= 1 and result.candidate:
            return Conclusion(to=JobState.SUCCEEDED, reason=f"{result.steps_run} of {result.steps_planned} steps")
        return Conclusion(
            to=JobState.FAILED,
            reason=f"only {result.steps_run} of {result.steps_planned} planned steps ran; nothing was promoted",
            failure=FailureKind.INTERNAL,
        )
    if result is not None and result.outcome is Outcome.INTERRUPTED:
        return Conclusion(to=JobState.QUEUED, reason=f"interrupted: {result.message}", fruitless=job.fruitless)
    if result is not None and result.failure is not None:
        kind, reason = result.failure, result.message
    else:
        kind, reason = FailureKind.LOST, f"the trainer was lost ({ended}) at step {job.max_step} or later"
        if asked:
            return Conclusion(to=JobState.QUEUED, reason=reason, fruitless=job.fruitless)
    if kind in FINAL_FAILURES:
        return Conclusion(to=JobState.FAILED, reason=reason, failure=kind)
    fruitless = 0 if progressed else job.fruitless + 1
    if fruitless >= queue.max_attempts:
        return Conclusion(
            to=JobState.FAILED,
            reason=f"{reason}; {fruitless} attempts in a row made no progress",
            failure=kind,
            fruitless=fruitless,
        )
    return Conclusion(
        to=JobState.QUEUED,
        reason=f"{reason}; will be tried again",
        failure=kind,
        not_before=now + queue.retry_seconds * 2 ** max(0, fruitless - 1),
        fruitless=fruitless,
    )
