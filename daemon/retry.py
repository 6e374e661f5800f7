"""What follows from the end of an attempt: pure decisions from values.

`decide` is the only place that decides about out-of-memory: the trainer reports what it tried by itself
(`RunResult.tried`), the phase says whether a smaller batch could matter, and the recipe has what is left to try.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from daemon.config import QueueSettings
from daemon.executors.base import Exit
from daemon.job import LONGEST_BACKOFF_SECONDS, FailureKind, Job, JobState, MemoryMeasure, Outcome, RunResult

# The same rows, settings or numbers would fail again: a person has to act first.
FINAL_FAILURES = frozenset({FailureKind.BAD_DATA, FailureKind.CONFIG, FailureKind.DIVERGED})
# What a trainer found wrong with what it begins from.
BASE_FAILURES = frozenset({FailureKind.IDENTITY, FailureKind.BASE})
# What is wrong concerns every job: the queue is held, and no attempt is counted.
HOLDING_FAILURES = BASE_FAILURES | {FailureKind.TRAINER}
# Before the first forward pass: nothing there depends on the rows a pass.
PHASES_BEFORE_PASSES = frozenset({"starting", "preparing"})
MEMORY_ADVICE = "lower max_length under [data], choose a smaller base model, or set load_in_4bit under [model]"


class StopReason(StrEnum):
    """Why a trainer was asked to leave."""

    STOP = "the daemon stops"
    PAUSE = "the queue was paused"
    CANCEL = "a person cancelled the job"
    STALL = "no progress within stall_timeout"
    TIMEOUT = "it took longer than job_timeout"
    FORGOTTEN = "a dataset that it may rehearse was forgotten; it starts over without it"
    WINDOW_ENDED = "the hours of [schedule] are over; it goes on in the next window"
    LOGGED_IN = "somebody logged in; it goes on when nobody is"
    TOO_HOT = "the GPU was too hot; it goes on when it has cooled"
    DAEMON_LOST = "its daemon was gone"  # the kernel asked, by the trainer's death signal


# The job did nothing that it would have to be given up for.
UNCOUNTED_STOPS = frozenset(
    {StopReason.STOP, StopReason.PAUSE, StopReason.WINDOW_ENDED, StopReason.LOGGED_IN, StopReason.TOO_HOT}
)


@dataclass(frozen=True, kw_only=True)
class RetryDecision:
    """Where a job goes after an attempt."""

    to: JobState
    reason: str
    failure: FailureKind | None = None
    not_before: float = 0.0  # seconds since the epoch
    attempts_without_progress: int = 0  # attempts in a row without a new sealed step
    recipe: Mapping[str, Any] | None = None  # of the next attempt; None: it stays as it is


def decide(
    *,
    job: Job,
    result: RunResult | None,
    ended: Exit,
    stop: StopReason | None,
    phase: str,
    progressed: bool,
    queue: QueueSettings,
    now: float,
) -> RetryDecision:
    """Decide from the trainer's own result first, from its exit only when it left none.

    A success is believed only if every planned step ran, or those until early stopping. `stop`: why we asked it to leave. `phase`: the last one that it
    reported, "" when none. `progressed`: the attempt sealed a step that no earlier one had.
    """
    if result is not None and result.outcome is Outcome.SUCCEEDED:
        return _decide_success(result)
    if stop is StopReason.CANCEL:
        return RetryDecision(to=JobState.CANCELLED, reason=stop.value)
    if stop is StopReason.TIMEOUT:
        return RetryDecision(to=JobState.FAILED, reason=stop.value, failure=FailureKind.STALLED)
    failure, reason = _failure_of(result, ended, stop, job)
    if failure is None:
        return RetryDecision(to=JobState.QUEUED, reason=reason, attempts_without_progress=job.attempts_without_progress)
    if failure in FINAL_FAILURES:
        return RetryDecision(to=JobState.FAILED, reason=reason, failure=failure)
    if failure in HOLDING_FAILURES:
        return _wait_for_person(job, failure, result)
    if failure is FailureKind.NO_SPACE:
        return _wait_for_space(job, reason, queue, now)
    attempts = 0 if progressed else job.attempts_without_progress + 1
    again = _try_again(attempts, failure, reason, queue, now)
    if failure is FailureKind.OUT_OF_MEMORY:
        return _decide_out_of_memory(again, job, result, phase, reason)
    return again


def decide_not_launched(
    *, job: Job, cause: str, refused: str, no_space: bool, queue: QueueSettings, now: float
) -> RetryDecision:
    """Decide after a trainer could not be started: no memory for a process, a full disk, a program that cannot be executed.

    `refused`: the sentence about such a program, empty when it was something else.
    """
    if refused:
        return RetryDecision(
            to=JobState.QUEUED,
            reason=refused,
            failure=FailureKind.TRAINER,
            attempts_without_progress=job.attempts_without_progress,
        )
    reason = f"the trainer could not be started: {cause}"
    if no_space:
        return _wait_for_space(job, reason, queue, now)
    return _try_again(job.attempts_without_progress + 1, FailureKind.INTERNAL, reason, queue, now)


def _decide_success(result: RunResult) -> RetryDecision:
    is_whole = result.steps_run == result.steps_planned or (
        result.stopped_early and result.steps_run < result.steps_planned
    )
    if is_whole and result.steps_run >= 1 and result.candidate:
        early = ": the held-out loss had stopped falling" if result.stopped_early else ""
        return RetryDecision(to=JobState.SUCCEEDED, reason=f"{result.steps_run} of {result.steps_planned} steps{early}")
    return RetryDecision(
        to=JobState.FAILED,
        reason=f"only {result.steps_run} of {result.steps_planned} planned steps ran; nothing was promoted",
        failure=FailureKind.INTERNAL,
    )


def _failure_of(
    result: RunResult | None, ended: Exit, stop: StopReason | None, job: Job
) -> tuple[FailureKind | None, str]:
    """The failure's kind, None for an interruption that we requested, and its sentence."""
    if stop is StopReason.STALL:
        return FailureKind.STALLED, stop.value
    if result is not None and result.outcome is Outcome.INTERRUPTED:
        if stop is not None:
            return None, f"interrupted: {stop.value}"
        return FailureKind.LOST, f"interrupted by a signal that the daemon did not send: {result.message or 'stopped'}"
    if result is not None and result.failure is not None:
        return result.failure, result.message
    if stop is not None:
        return None, f"interrupted: {stop.value}; the trainer had to be ended ({ended})"
    if ended.out_of_memory:
        return FailureKind.OUT_OF_MEMORY, "the kernel ran out of memory and killed the trainer"
    return FailureKind.LOST, f"the trainer was lost ({ended}) at step {job.max_step} or later"


def _wait_for_person(job: Job, failure: FailureKind, result: RunResult | None) -> RetryDecision:
    """Not the job's fault and not its attempt: the queue is held until a person acts, with the ways out in the reason."""
    said = (result.message, result.hint) if result is not None else ()
    return RetryDecision(
        to=JobState.QUEUED,
        reason="; ".join(filter(None, said)),
        failure=failure,
        attempts_without_progress=job.attempts_without_progress,
    )


def _wait_for_space(job: Job, reason: str, queue: QueueSettings, now: float) -> RetryDecision:
    """Not the job's fault and not its attempt: it waits until there is room."""
    return RetryDecision(
        to=JobState.QUEUED,
        reason=f"{reason}; waits for free space",
        failure=FailureKind.NO_SPACE,
        not_before=now + queue.retry_seconds,
        attempts_without_progress=job.attempts_without_progress,
    )


def _try_again(
    attempts_without_progress: int, failure: FailureKind, reason: str, queue: QueueSettings, now: float
) -> RetryDecision:
    """The next attempt after a back-off that doubles; FAILED once there were `max_attempts` without progress."""
    if attempts_without_progress >= queue.max_attempts:
        return RetryDecision(
            to=JobState.FAILED,
            reason=f"{reason}; {attempts_without_progress} attempts in a row made no progress",
            failure=failure,
            attempts_without_progress=attempts_without_progress,
        )
    backoff = min(queue.retry_seconds * 2 ** max(0, attempts_without_progress - 1), LONGEST_BACKOFF_SECONDS)
    return RetryDecision(
        to=JobState.QUEUED,
        reason=f"{reason}; will be tried again",
        failure=failure,
        not_before=now + backoff,
        attempts_without_progress=attempts_without_progress,
    )


def _decide_out_of_memory(
    again: RetryDecision, job: Job, result: RunResult | None, phase: str, why: str
) -> RetryDecision:
    """Half the batch where that can help and the trainer has not gone further by itself; FAILED where nothing is left.

    `again`: what would follow from any other failure. `why`: the failure's own sentence.
    """
    training = (job.recipe or {}).get("training", {})
    tried = result.tried if result is not None else ()
    checkpointed = MemoryMeasure.GRADIENT_CHECKPOINTING in tried or training.get("gradient_checkpointing") is True
    advice = MEMORY_ADVICE if checkpointed else f'set gradient_checkpointing = "auto" under [training], {MEMORY_ADVICE}'
    if again.to is JobState.FAILED:
        return replace(again, reason=f"{again.reason}: {advice}")
    if phase in PHASES_BEFORE_PASSES:  # memory that others hold now may be free later
        return again
    if MemoryMeasure.ONE_ROW in tried or int(training.get("per_device_train_batch_size", 1)) == 1:
        reason = f"{why}; one row at a time is too much already: {advice}"
        return replace(again, to=JobState.FAILED, not_before=0.0, reason=reason)
    return replace(again, recipe=halve_batch(job.recipe or {}))


def halve_batch(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return `recipe` with half the rows a pass and twice the passes a step: the same global batch.

    An odd number of rows is divided by its smallest factor instead (9 x 2 becomes 3 x 6), so that nothing is lost.
    """
    training = dict(recipe["training"])
    rows = training["per_device_train_batch_size"]
    factor = next(factor for factor in range(2, rows + 1) if rows % factor == 0)
    training["per_device_train_batch_size"] = rows // factor
    training["gradient_accumulation_steps"] *= factor
    return {**recipe, "training": training}
