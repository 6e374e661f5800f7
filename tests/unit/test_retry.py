"""What follows from an attempt's end, over everything that a trainer can report or fail to report."""

from __future__ import annotations

from typing import Any

import pytest

from daemon.config import QueueSettings
from daemon.executors.base import Exit
from daemon.job import FailureKind, Job, JobState, Outcome, RunResult
from daemon.retry import FINAL_FAILURES, Conclusion, conclude

QUEUE = QueueSettings(max_attempts=3, retry_seconds=10.0)


def after(
    result: RunResult | None, *, fruitless: int = 0, asked: bool = False, progressed: bool = False, **exit_: Any
) -> Conclusion:
    job = Job(id="a", name="a", state=JobState.RUNNING, fruitless=fruitless)
    return conclude(
        job=job, result=result, ended=Exit(**exit_), asked=asked, progressed=progressed, queue=QUEUE, now=1000.0
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
    conclusion = after(RunResult(outcome=Outcome.INTERRUPTED), fruitless=2, code=75)
    assert (conclusion.to, conclusion.fruitless, conclusion.not_before) == (JobState.QUEUED, 2, 0.0)


def test_being_ended_after_we_asked_burns_no_attempt() -> None:
    conclusion = after(None, fruitless=2, asked=True, signal=9)
    assert (conclusion.to, conclusion.fruitless) == (JobState.QUEUED, 2)


def test_a_lost_trainer_comes_back_with_growing_back_off_until_it_made_no_progress_too_often() -> None:
    waits = []
    fruitless = 0
    while True:
        conclusion = after(None, fruitless=fruitless, signal=9)
        if conclusion.to is JobState.FAILED:
            break
        waits.append(conclusion.not_before - 1000.0)
        fruitless = conclusion.fruitless
    assert waits == [10.0, 20.0]
    assert conclusion.failure is FailureKind.LOST
    assert "SIGKILL" in conclusion.reason


def test_progress_resets_the_count() -> None:
    conclusion = after(None, fruitless=2, progressed=True, signal=9)
    assert (conclusion.to, conclusion.fruitless) == (JobState.QUEUED, 0)


@pytest.mark.parametrize("kind", sorted(FINAL_FAILURES))
def test_what_would_fail_again_is_not_tried_again(kind: FailureKind) -> None:
    conclusion = after(RunResult(outcome=Outcome.FAILED, failure=kind, message="why"), progressed=True, code=1)
    assert (conclusion.to, conclusion.failure, conclusion.reason) == (JobState.FAILED, kind, "why")


def test_a_result_counts_more_than_the_exit_code() -> None:
    assert after(success(), signal=11).to is JobState.SUCCEEDED
    assert after(None, code=0).failure is FailureKind.LOST
