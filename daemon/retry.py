"""What follows from the end of an attempt: a pure decision from values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from daemon.config import QueueSettings
from daemon.executors.base import Exit
from daemon.job import LONGEST_BACKOFF_SECONDS, FailureKind, Job, JobState, Outcome, RunResult

# The same rows, settings or numbers would fail again: a person has to act first.
FINAL_FAILURES = frozenset({FailureKind.BAD_DATA, FailureKind.CONFIG, FailureKind.DIVERGED})


ONE_ROW_HINT = (
    "one row at a time is too much already: lower max_length under [data], choose a smaller base model, or set"
    " load_in_4bit under [model]"
)


class StopReason(StrEnum):
    """Why we asked a trainer to leave."""

    STOP = "the daemon stops"
    PAUSE = "the queue was paused"
    CANCEL = "a person cancelled the job"
    STALL = "no progress within stall_timeout"
    TIMEOUT = "it took longer than job_timeout"


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """Where a job goes after an attempt."""

    to: JobState
    reason: str
    failure: FailureKind | None = None
    not_before: float = 0.0  # seconds since the epoch
    attempts_without_progress: int = 0  # attempts in a row without a new sealed step
    halve_batch: bool = False  # try again with half the rows a forward pass, and twice the passes a step


def conclude(
    *,
    job: Job,
    result: RunResult | None,
    ended: Exit,
    asked: StopReason | None,
    progressed: bool,
    queue: QueueSettings,
    now: float,
) -> Conclusion:
    """Decide from the trainer's own result first, from its exit only when it left none.

    A success is believed only if every planned step ran. `progressed`: the attempt sealed a step that no earlier one
    had.
    """
    if result is not None and result.outcome is Outcome.SUCCEEDED:
        if result.steps_run == result.steps_planned and result.steps_run >= 1 and result.candidate:
            return Conclusion(to=JobState.SUCCEEDED, reason=f"{result.steps_run} of {result.steps_planned} steps")
        return Conclusion(
            to=JobState.FAILED,
            reason=f"only {result.steps_run} of {result.steps_planned} planned steps ran; nothing was promoted",
            failure=FailureKind.INTERNAL,
        )
    kind, reason = _why(result, ended, asked, job)
    if asked is StopReason.CANCEL:
        return Conclusion(to=JobState.CANCELLED, reason=asked.value)
    if asked is StopReason.TIMEOUT:
        return Conclusion(to=JobState.FAILED, reason=asked.value, failure=FailureKind.STALLED)
    if kind is None:
        return Conclusion(to=JobState.QUEUED, reason=reason, attempts_without_progress=job.attempts_without_progress)
    if kind in FINAL_FAILURES:
        return Conclusion(to=JobState.FAILED, reason=reason, failure=kind)
    if kind is FailureKind.NO_SPACE:
        # Not the job's fault and not its attempt: it waits until there is room.
        return Conclusion(
            to=JobState.QUEUED,
            reason=f"{reason}; waits for free space",
            failure=kind,
            not_before=now + queue.retry_seconds,
            attempts_without_progress=job.attempts_without_progress,
        )
    attempts_without_progress = 0 if progressed else job.attempts_without_progress + 1
    if kind is FailureKind.OUT_OF_MEMORY and not can_halve(job):
        return Conclusion(
            to=JobState.FAILED,
            reason=f"{reason}; {ONE_ROW_HINT}",
            failure=kind,
            attempts_without_progress=attempts_without_progress,
        )
    if attempts_without_progress >= queue.max_attempts:
        return Conclusion(
            to=JobState.FAILED,
            reason=f"{reason}; {attempts_without_progress} attempts in a row made no progress",
            failure=kind,
            attempts_without_progress=attempts_without_progress,
        )
    return Conclusion(
        to=JobState.QUEUED,
        reason=f"{reason}; will be tried again",
        failure=kind,
        not_before=now + min(queue.retry_seconds * 2 ** max(0, attempts_without_progress - 1), LONGEST_BACKOFF_SECONDS),
        attempts_without_progress=attempts_without_progress,
        halve_batch=kind is FailureKind.OUT_OF_MEMORY,
    )


def _why(result: RunResult | None, ended: Exit, asked: StopReason | None, job: Job) -> tuple[FailureKind | None, str]:
    """The failure's kind, None for an interruption that we wanted, and its sentence."""
    if asked is StopReason.STALL:
        return FailureKind.STALLED, asked.value
    if result is not None and result.outcome is Outcome.INTERRUPTED:
        return None, f"interrupted: {asked.value if asked else result.message}"
    if result is not None and result.failure is not None:
        return result.failure, result.message
    if asked is not None:
        return None, f"interrupted: {asked.value}; the trainer had to be ended ({ended})"
    if ended.out_of_memory:
        return FailureKind.OUT_OF_MEMORY, "the kernel ran out of memory and killed the trainer"
    return FailureKind.LOST, f"the trainer was lost ({ended}) at step {job.max_step} or later"


def can_halve(job: Job) -> bool:
    """Whether a forward pass has more than one row."""
    training = (job.recipe or {}).get("training", {})
    return int(training.get("per_device_train_batch_size", 1)) > 1


def halved(recipe: dict[str, object]) -> dict[str, object]:
    """`recipe` with half the rows a forward pass and twice the passes a step: the same global batch.

    An odd number of rows is divided by its smallest factor instead (9 x 2 becomes 3 x 6), so that nothing is lost.
    """
    training = dict(recipe["training"])  # type: ignore[call-overload]  # a recipe's tables are mappings
    rows = training["per_device_train_batch_size"]
    factor = next(factor for factor in range(2, rows + 1) if rows % factor == 0)
    training["per_device_train_batch_size"] = rows // factor
    training["gradient_accumulation_steps"] *= factor
    return {**recipe, "training": training}
