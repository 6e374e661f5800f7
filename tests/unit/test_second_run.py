"""When a job runs once more with twice the share of earlier rows, and whose adapter is taken then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from daemon.evaluation.settings import GateSettings
from daemon.evaluation.values import Evaluation, GateAction, GateVerdict
from daemon.job import FirstRun, Job, JobState, Outcome, RunResult
from daemon.recipe import Recipe
from daemon.second_run import doubled, held_for_now, is_better, reason_of_first, recipe_of_second, told
from tests.support.fake_trainer import evaluated

ON = GateSettings(retry_share=True)
JOB = Job(id="j", name="b.jsonl", state=JobState.RUNNING, recipe=Recipe().model_dump(mode="json"))


def result(*, lost: float, passes: bool = False, **fields: Any) -> RunResult:
    said = {**evaluated({"passes": passes, "lost": lost}), "parent_digest": "p", **fields}
    return RunResult(outcome=Outcome.SUCCEEDED, steps_planned=4, steps_run=4, **said)


def test_a_loss_leads_to_one_more_run_with_twice_the_share_where_the_administrator_asks_for_it() -> None:
    recipe = recipe_of_second(JOB, result(lost=1.0), ON)
    assert recipe is not None
    replay = Recipe.model_validate(recipe).replay
    assert (replay.share, replay.min_rows, replay.max_share) == (0.2, 32, 0.5)
    assert {**recipe, "replay": None} == {**(JOB.recipe or {}), "replay": None}


@pytest.mark.parametrize(
    ("job", "found", "gate"),
    [
        (JOB, result(lost=1.0), GateSettings()),
        (JOB, result(lost=1.0), GateSettings(retry_share=True, action="off")),
        (JOB, result(lost=0.0, passes=True), ON),
        (JOB, result(lost=1.0, replayed=()), ON),
        (JOB, result(lost=1.0, evaluation=None), ON),
        (replace(JOB, first_run=FirstRun(version="0002", result=result(lost=1.0))), result(lost=1.0), ON),
    ],
    ids=["not asked for", "no gate", "passes", "nothing rehearsed", "not measured", "second run"],
)
def test_else_there_is_no_second_run(job: Job, found: RunResult, gate: GateSettings) -> None:
    assert recipe_of_second(job, found, gate) is None


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.95, 0.999])
def test_twice_the_share_is_a_share_that_a_recipe_may_have(share: float) -> None:
    before = Recipe().replay.model_copy(update={"share": share, "max_share": max(share, 0.25)}).model_dump()
    after = doubled(before)
    assert before["share"] <= after["share"] <= max(0.9, share)
    Recipe.model_validate({"replay": after})


def test_what_is_better_by_the_gate_is_taken_and_of_two_alike_the_first() -> None:
    first = result(lost=1.0)
    assert is_better(result(lost=0.0, passes=True), first)
    assert is_better(result(lost=0.5), first)
    assert not is_better(result(lost=1.0), first)
    assert not is_better(result(lost=2.0), first)
    assert not is_better(replace(first, evaluation=None), first)
    unmeasured = Evaluation(verdict=GateVerdict.UNMEASURED, passes=True)
    assert not is_better(replace(first, evaluation=unmeasured), first)
    # What continues another version cannot be compared with what was measured against that one.
    assert is_better(result(lost=2.0, parent_digest="another"), first)


def test_the_reason_tells_of_both_runs() -> None:
    held = held_for_now(result(lost=1.0))
    assert held.evaluation is not None
    assert held.evaluation.action is GateAction.HELD
    assert reason_of_first(held, "the second was no better") == "held: earlier.jsonl lost 1.0; the second was no better"
    assert "version 0002 had lost" in told(result(lost=0.0, passes=True), "0002", "4 of 4 steps")
    assert told(held, "0002", "held: x").startswith("held: x")
