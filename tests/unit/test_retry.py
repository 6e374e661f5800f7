"""What follows from an attempt's end, over everything that a trainer can report or fail to report."""

from __future__ import annotations

from typing import Any

import pytest

from daemon.config import QueueSettings
from daemon.executors.base import Exit
from daemon.job import FailureKind, Job, JobState, Outcome, RunResult
from daemon.retry import FINAL_FAILURES, Conclusion, StopReason, conclude, halved

QUEUE = QueueSettings(max_attempts=3, retry_seconds=10.0)


def after(
    result: RunResult | None,
    *,
    attempts_without_progress: int = 0,
    asked: StopReason | None = None,
    progressed: bool = False,
    batch: int = 4,
    **exit_: Any,
) -> Conclusion:
    recipe = {"training": {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 2}}
    job = Job(
        id="a", name="a", state=JobState.RUNNING, attempts_without_progress=attempts_without_progress, recipe=recipe
    )
    return conclude(
        job=job,
        result=result,
        ended=Exit(**exit_),
        asked=asked,
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
    conclusion = after(success(**lie), code=0)
    assert conclusion.to is JobState.FAILED
    assert "nothing was promoted" in conclusion.reason


def test_an_interruption_burns_no_attempt() -> None:
    conclusion = after(RunResult(outcome=Outcome.INTERRUPTED), attempts_without_progress=2, code=75)
    assert (conclusion.to, conclusion.attempts_without_progress, conclusion.not_before) == (JobState.QUEUED, 2, 0.0)


def test_being_ended_after_we_asked_burns_no_attempt() -> None:
    for why in (StopReason.STOP, StopReason.PAUSE):
        conclusion = after(None, attempts_without_progress=2, asked=why, signal=9)
        assert (conclusion.to, conclusion.attempts_without_progress, conclusion.failure) == (JobState.QUEUED, 2, None)


def test_a_lost_trainer_comes_back_with_growing_back_off_until_it_made_no_progress_too_often() -> None:
    waits = []
    attempts_without_progress = 0
    while True:
        conclusion = after(None, attempts_without_progress=attempts_without_progress, signal=9)
        if conclusion.to is JobState.FAILED:
            break
        waits.append(conclusion.not_before - 1000.0)
        attempts_without_progress = conclusion.attempts_without_progress
    assert waits == [10.0, 20.0]
    assert conclusion.failure is FailureKind.LOST
    assert "SIGKILL" in conclusion.reason


def test_progress_resets_the_count() -> None:
    conclusion = after(None, attempts_without_progress=2, progressed=True, signal=9)
    assert (conclusion.to, conclusion.attempts_without_progress) == (JobState.QUEUED, 0)


@pytest.mark.parametrize("kind", sorted(FINAL_FAILURES))
def test_what_would_fail_again_is_not_tried_again(kind: FailureKind) -> None:
    conclusion = after(RunResult(outcome=Outcome.FAILED, failure=kind, message="why"), progressed=True, code=1)
    assert (conclusion.to, conclusion.failure, conclusion.reason) == (JobState.FAILED, kind, "why")


def test_a_result_counts_more_than_the_exit_code() -> None:
    assert after(success(), signal=11).to is JobState.SUCCEEDED
    assert after(None, code=0).failure is FailureKind.LOST


@pytest.mark.parametrize("result", [None, RunResult(outcome=Outcome.INTERRUPTED)])
def test_a_cancelled_run_is_cancelled_however_it_left(result: RunResult | None) -> None:
    assert after(result, asked=StopReason.CANCEL, signal=9).to is JobState.CANCELLED


def test_a_run_that_was_done_before_it_heard_of_the_cancelling_counts() -> None:
    assert after(success(), asked=StopReason.CANCEL, code=0).to is JobState.SUCCEEDED


def test_a_stalled_run_comes_back_and_counts_as_an_attempt_even_if_it_sealed_something_at_last() -> None:
    conclusion = after(
        RunResult(outcome=Outcome.INTERRUPTED), asked=StopReason.STALL, attempts_without_progress=1, code=75
    )
    assert (conclusion.to, conclusion.failure, conclusion.attempts_without_progress) == (
        JobState.QUEUED,
        FailureKind.STALLED,
        2,
    )
    assert after(None, asked=StopReason.STALL, attempts_without_progress=2, signal=9).to is JobState.FAILED


def test_a_run_over_its_time_fails() -> None:
    assert (
        after(RunResult(outcome=Outcome.INTERRUPTED), asked=StopReason.TIMEOUT, code=75).failure is FailureKind.STALLED
    )


def test_out_of_memory_halves_the_batch_and_keeps_the_global_one() -> None:
    oom = RunResult(outcome=Outcome.FAILED, failure=FailureKind.OUT_OF_MEMORY, message="no memory")
    conclusion = after(oom, code=1)
    assert (conclusion.to, conclusion.halve_batch) == (JobState.QUEUED, True)
    recipe = halved(
        {"training": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "seed": 1}, "lora": {}}
    )
    assert recipe == {
        "training": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "seed": 1},
        "lora": {},
    }
    odd = halved({"training": {"per_device_train_batch_size": 9, "gradient_accumulation_steps": 2}})
    assert odd == {"training": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 6}}
    one = after(oom, batch=1, code=1)
    assert one.to is JobState.FAILED
    assert "lower max_length" in one.reason


def test_the_kernels_own_killing_for_memory_is_told_from_somebody_elses_kill() -> None:
    assert after(None, out_of_memory=True, signal=9).failure is FailureKind.OUT_OF_MEMORY
    assert after(None, signal=9).failure is FailureKind.LOST


def test_a_full_disk_burns_no_attempt() -> None:
    full = RunResult(outcome=Outcome.FAILED, failure=FailureKind.NO_SPACE, message="No space left on device")
    conclusion = after(full, attempts_without_progress=2, code=1)
    assert (conclusion.to, conclusion.attempts_without_progress, conclusion.not_before) == (JobState.QUEUED, 2, 1010.0)
