"""What follows from an attempt's end, over everything that a trainer can report or fail to report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from daemon.config import QueueSettings
from daemon.executors.base import Exit
from daemon.job import LONGEST_BACKOFF_SECONDS, FailureKind, Job, JobState, MemoryMeasure, Outcome, RunResult
from daemon.retry import (
    FINAL_FAILURES,
    HOLDING_FAILURES,
    RetryDecision,
    StopReason,
    decide,
    decide_not_launched,
    halve_batch,
)

QUEUE = QueueSettings(max_attempts=3, retry_seconds=10.0)


def after(
    result: RunResult | None,
    *,
    attempts_without_progress: int = 0,
    stop: StopReason | None = None,
    phase: str = "training",
    progressed: bool = False,
    batch: int = 4,
    checkpointing: Any = "auto",
    **exit_: Any,
) -> RetryDecision:
    recipe = {
        "training": {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": checkpointing,
        }
    }
    job = Job(
        id="a", name="a", state=JobState.RUNNING, attempts_without_progress=attempts_without_progress, recipe=recipe
    )
    return decide(
        job=job,
        result=result,
        ended=Exit(**exit_),
        stop=stop,
        phase=phase,
        progressed=progressed,
        queue=QUEUE,
        now=1000.0,
    )


def success(**fields: Any) -> RunResult:
    return RunResult(**{"outcome": Outcome.SUCCEEDED, "steps_planned": 7, "steps_run": 7, "candidate": "x", **fields})


def test_a_whole_run_succeeds() -> None:
    assert after(success(), code=0).to is JobState.SUCCEEDED


@pytest.mark.parametrize(
    "lie",
    [{"steps_run": 6}, {"steps_run": 8}, {"steps_run": 0, "steps_planned": 0}, {"candidate": None}, {"steps_run": -1}],
)
def test_a_success_that_did_not_run_its_steps_is_a_failure(lie: dict[str, Any]) -> None:
    decision = after(success(**lie), code=0)
    assert decision.to is JobState.FAILED
    assert "nothing was promoted" in decision.reason


def test_an_interruption_that_we_asked_for_burns_no_attempt() -> None:
    interrupted = RunResult(outcome=Outcome.INTERRUPTED)
    for why in (StopReason.STOP, StopReason.PAUSE, StopReason.DAEMON_LOST):
        decision = after(interrupted, stop=why, attempts_without_progress=2, code=75)
        assert (decision.to, decision.attempts_without_progress, decision.not_before) == (JobState.QUEUED, 2, 0.0)


def test_an_interruption_that_nobody_asked_for_backs_off_and_comes_to_an_end() -> None:
    """A trainer that somebody else's SIGTERM ends each time before it gets anywhere."""
    interrupted = RunResult(outcome=Outcome.INTERRUPTED, message="stopped before the first step")
    first = after(interrupted, code=75)
    assert (first.to, first.not_before, first.attempts_without_progress) == (JobState.QUEUED, 1010.0, 1)
    last = after(interrupted, attempts_without_progress=2, code=75)
    assert (last.to, last.failure) == (JobState.FAILED, FailureKind.LOST)
    assert last.reason == (
        "interrupted by a signal that the daemon did not send: stopped before the first step;"
        " 3 attempts in a row made no progress"
    )
    assert after(interrupted, attempts_without_progress=2, progressed=True, code=75).to is JobState.QUEUED


def test_being_ended_after_we_asked_burns_no_attempt() -> None:
    for why in (StopReason.STOP, StopReason.PAUSE):
        decision = after(None, attempts_without_progress=2, stop=why, signal=9)
        assert (decision.to, decision.attempts_without_progress, decision.failure) == (JobState.QUEUED, 2, None)


def test_a_lost_trainer_comes_back_with_growing_back_off_until_it_made_no_progress_too_often() -> None:
    waits = []
    attempts_without_progress = 0
    while True:
        decision = after(None, attempts_without_progress=attempts_without_progress, signal=9)
        if decision.to is JobState.FAILED:
            break
        waits.append(decision.not_before - 1000.0)
        attempts_without_progress = decision.attempts_without_progress
    assert waits == [10.0, 20.0]
    assert decision.failure is FailureKind.LOST
    assert "SIGKILL" in decision.reason


def test_progress_resets_the_count() -> None:
    decision = after(None, attempts_without_progress=2, progressed=True, signal=9)
    assert (decision.to, decision.attempts_without_progress) == (JobState.QUEUED, 0)


@pytest.mark.parametrize("kind", sorted(FINAL_FAILURES))
def test_what_would_fail_again_is_not_tried_again(kind: FailureKind) -> None:
    decision = after(RunResult(outcome=Outcome.FAILED, failure=kind, message="why"), progressed=True, code=1)
    assert (decision.to, decision.failure, decision.reason) == (JobState.FAILED, kind, "why")


def test_a_result_counts_more_than_the_exit_code() -> None:
    assert after(success(), signal=11).to is JobState.SUCCEEDED
    assert after(None, code=0).failure is FailureKind.LOST


@pytest.mark.parametrize("result", [None, RunResult(outcome=Outcome.INTERRUPTED)])
def test_a_cancelled_run_is_cancelled_however_it_left(result: RunResult | None) -> None:
    assert after(result, stop=StopReason.CANCEL, signal=9).to is JobState.CANCELLED


def test_a_run_that_was_done_before_it_heard_of_the_cancelling_counts() -> None:
    assert after(success(), stop=StopReason.CANCEL, code=0).to is JobState.SUCCEEDED


def test_a_stalled_run_comes_back_and_counts_as_an_attempt_even_if_it_sealed_something_at_last() -> None:
    decision = after(
        RunResult(outcome=Outcome.INTERRUPTED), stop=StopReason.STALL, attempts_without_progress=1, code=75
    )
    assert (decision.to, decision.failure, decision.attempts_without_progress) == (
        JobState.QUEUED,
        FailureKind.STALLED,
        2,
    )
    assert after(None, stop=StopReason.STALL, attempts_without_progress=2, signal=9).to is JobState.FAILED


def test_a_run_over_its_time_fails() -> None:
    assert (
        after(RunResult(outcome=Outcome.INTERRUPTED), stop=StopReason.TIMEOUT, code=75).failure is FailureKind.STALLED
    )


OOM = RunResult(outcome=Outcome.FAILED, failure=FailureKind.OUT_OF_MEMORY, message="no memory")


def test_out_of_memory_halves_the_batch_and_keeps_the_global_one() -> None:
    decision = after(OOM, code=1)
    assert decision.to is JobState.QUEUED
    assert decision.recipe is not None
    training = decision.recipe["training"]
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == (2, 4)
    odd = halve_batch({"training": {"per_device_train_batch_size": 9, "gradient_accumulation_steps": 2}, "lora": {}})
    assert odd == {"training": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 6}, "lora": {}}


@pytest.mark.parametrize(
    ("result", "options"),
    [
        (OOM, {"batch": 1}),
        (replace(OOM, tried=(MemoryMeasure.ONE_ROW,)), {}),
        (replace(OOM, tried=tuple(MemoryMeasure)), {"progressed": True}),
        (None, {"batch": 1, "out_of_memory": True, "signal": 9}),
    ],
    ids=["a batch of one", "the trainer went down to one row", "and checkpointed", "killed at a batch of one"],
)
def test_out_of_memory_with_one_row_a_pass_fails_at_once_and_says_what_is_left(
    result: RunResult | None, options: dict[str, Any]
) -> None:
    """A smaller batch is what the trainer has already computed with: to try it again costs minutes for nothing."""
    decision = after(result, **options)
    assert (decision.to, decision.failure, decision.recipe) == (JobState.FAILED, FailureKind.OUT_OF_MEMORY, None)
    assert "lower max_length" in decision.reason


def test_gradient_checkpointing_is_advised_where_it_was_not_in_use() -> None:
    one_row = replace(OOM, tried=(MemoryMeasure.ONE_ROW,))
    assert "gradient_checkpointing" in after(one_row, checkpointing=False).reason
    assert "gradient_checkpointing" not in after(one_row, checkpointing=True).reason
    assert "gradient_checkpointing" not in after(replace(OOM, tried=tuple(MemoryMeasure))).reason


@pytest.mark.parametrize("phase", ["starting", "preparing"])
def test_out_of_memory_before_the_first_pass_is_tried_again_with_the_same_batch(phase: str) -> None:
    """While rows are tokenised and weights are loaded no batch exists; memory that others hold may be free later."""
    decision = after(OOM, phase=phase, code=1)
    assert (decision.to, decision.recipe, decision.not_before) == (JobState.QUEUED, None, 1010.0)
    last = after(OOM, phase=phase, attempts_without_progress=2, code=1)
    assert last.to is JobState.FAILED
    assert "3 attempts" in last.reason
    assert "choose a smaller base model" in last.reason


@pytest.mark.parametrize("no_space", [False, True])
def test_a_trainer_that_cannot_be_started_is_tried_again_and_a_full_disk_burns_no_attempt(no_space: bool) -> None:
    job = Job(id="a", name="a", state=JobState.RUNNING, attempts_without_progress=2)
    decision = decide_not_launched(job=job, cause="why", refused="", no_space=no_space, queue=QUEUE, now=1000.0)
    assert decision.to is (JobState.QUEUED if no_space else JobState.FAILED)
    assert "could not be started: why" in decision.reason


def test_a_trainer_that_cannot_be_executed_burns_no_attempt_and_says_why() -> None:
    job = Job(id="a", name="a", state=JobState.RUNNING, attempts_without_progress=2)
    decision = decide_not_launched(
        job=job, cause="why", refused="it cannot be executed", no_space=False, queue=QUEUE, now=1000.0
    )
    assert (decision.to, decision.failure, decision.reason, decision.not_before) == (
        JobState.QUEUED, FailureKind.TRAINER, "it cannot be executed", 0.0,
    )  # fmt: skip
    assert decision.attempts_without_progress == 2


def test_the_kernels_own_killing_for_memory_is_told_from_somebody_elses_kill() -> None:
    assert after(None, out_of_memory=True, signal=9).failure is FailureKind.OUT_OF_MEMORY
    assert after(None, signal=9).failure is FailureKind.LOST


def test_a_full_disk_burns_no_attempt() -> None:
    full = RunResult(outcome=Outcome.FAILED, failure=FailureKind.NO_SPACE, message="No space left on device")
    decision = after(full, attempts_without_progress=2, code=1)
    assert (decision.to, decision.attempts_without_progress, decision.not_before) == (JobState.QUEUED, 2, 1010.0)


def test_the_back_off_doubles_up_to_its_longest_and_a_step_backs_off_once() -> None:
    def wait(attempts: int, *, progressed: bool = False, most: int = 100) -> float:
        queue = QueueSettings(max_attempts=most, retry_seconds=10.0)
        job = Job(id="a", name="a", state=JobState.RUNNING, attempts_without_progress=attempts)
        common: dict[str, Any] = {"job": job, "queue": queue, "now": 0.0}
        return decide(
            result=None, ended=Exit(signal=9), stop=None, phase="", progressed=progressed, **common
        ).not_before

    assert [wait(attempts) for attempts in range(4)] == [10.0, 20.0, 40.0, 80.0]
    assert wait(5, progressed=True) == 10.0
    assert wait(60) == wait(61) == LONGEST_BACKOFF_SECONDS


@pytest.mark.parametrize("kind", sorted(HOLDING_FAILURES))
def test_what_concerns_every_job_waits_for_a_person_with_the_ways_out(kind: FailureKind) -> None:
    refused = RunResult(outcome=Outcome.FAILED, failure=kind, message="why", hint="what to do")
    decision = after(refused, attempts_without_progress=2, code=1)
    assert (decision.to, decision.failure, decision.reason) == (JobState.QUEUED, kind, "why; what to do")
    assert (decision.attempts_without_progress, decision.not_before) == (2, 0.0)
    assert after(replace(refused, hint=""), code=1).reason == "why"


def test_a_run_that_stopped_early_is_whole_when_it_ends_before_its_last_step() -> None:
    early = success(steps_run=4, stopped_early=True)
    assert after(early, code=0).to is JobState.SUCCEEDED
    assert after(early, code=0).reason == "4 of 7 steps: the held-out loss had stopped falling"
    assert after(success(), code=0).reason == "7 of 7 steps"
    for lie in ({"steps_run": 8}, {"steps_run": 0}, {"candidate": ""}):
        decision = after(replace(early, **lie), code=0)
        assert (decision.to, decision.failure) == (JobState.FAILED, FailureKind.INTERNAL)
    assert after(success(steps_run=1, steps_planned=1), code=0).to is JobState.SUCCEEDED


def test_each_end_says_what_happened() -> None:
    assert after(None, stop=StopReason.STOP, signal=9).reason == (
        "interrupted: the daemon stops; the trainer had to be ended (killed by SIGKILL)"
    )
    assert after(RunResult(outcome=Outcome.INTERRUPTED), stop=StopReason.PAUSE, code=75).reason == (
        "interrupted: the queue was paused"
    )
    assert after(RunResult(outcome=Outcome.INTERRUPTED), code=75).reason == (
        "interrupted by a signal that the daemon did not send: stopped; will be tried again"
    )
    timeout = after(None, stop=StopReason.TIMEOUT, signal=9)
    assert (timeout.to, timeout.reason) == (JobState.FAILED, "it took longer than job_timeout")
    waiting = Job(id="a", name="a", state=JobState.RUNNING)
    full = decide_not_launched(job=waiting, cause="why", refused="", no_space=True, queue=QUEUE, now=1.0)
    assert full.reason == "the trainer could not be started: why; waits for free space"
    assert (full.not_before, full.failure) == (11.0, FailureKind.NO_SPACE)


def test_out_of_memory_of_a_job_without_a_batch_size_has_one_row_and_a_prime_one_goes_to_it() -> None:
    bare = Job(id="a", name="a", state=JobState.RUNNING, recipe=None)
    common: dict[str, Any] = {"ended": Exit(code=1), "stop": None, "phase": "training", "progressed": False}
    decision = decide(job=bare, result=OOM, queue=QUEUE, now=0.0, **common)
    assert (decision.to, decision.not_before) == (JobState.FAILED, 0.0)
    assert decision.reason.startswith("no memory; one row at a time is too much already: set gradient_checkpointing")
    prime = after(OOM, batch=7, code=1).recipe
    assert prime is not None
    training = prime["training"]
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == (1, 14)
