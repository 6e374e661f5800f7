"""What was lost of earlier datasets: bounds and verdicts, what is scored, which blend is taken, and the matrix."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from daemon.evaluation.blend import Scored, choose_blend
from daemon.evaluation.budget import LEAST_ROWS, MOST_ROWS, ScoreBudget, Standing, choose_rows, scoring_order
from daemon.evaluation.gate import held_reason, with_action
from daemon.evaluation.matrix import read_matrix, summarise
from daemon.evaluation.scores import AdapterScores, best_of_line, read_scores, scores_path, sweep_scores, write_scores
from daemon.evaluation.settings import EvaluationSettings, GateSettings
from daemon.evaluation.statistics import Measured, Rows, bootstrap_ratio, judge, overall, passes
from daemon.evaluation.values import Evaluation, GateAction, GateVerdict, RowScore
from daemon.job import Outcome, RunResult, from_json, to_json
from daemon.observability.status import model_evaluation

GATE = GateSettings()


def scored(losses: list[float], exact: list[bool] | None = None, tokens: int = 10) -> dict[str, RowScore]:
    """Rows by their mean losses."""
    flags = exact or [True] * len(losses)
    return {
        f"{number:032x}": RowScore(loss=loss * tokens, tokens=tokens, exact=flag)
        for number, (loss, flag) in enumerate(zip(losses, flags, strict=True))
    }


def measured(before: Rows, after: Rows, **more: Any) -> Measured:
    return Measured(name="facts.jsonl", digest="d" * 64, before=before, after=after, **more)


def verdict(before: Rows, after: Rows, gate: GateSettings = GATE, **more: Any) -> GateVerdict:
    [one] = judge([measured(before, after, **more)], gate)
    return one.verdict


def noisy(shift: float, noise: float, seed: int, rows: int = MOST_ROWS) -> tuple[Rows, Rows]:
    """Rows before and after a change of `shift`, each with its own luck; one in twenty flips."""
    generator = random.Random(seed)
    before = [max(0.01, generator.gauss(1.2, 0.5)) for _ in range(rows)]
    after = [loss + shift + generator.gauss(0, noise) for loss in before]
    exact = [generator.random() < 0.5 for _ in range(rows)]
    flipped = [flag if generator.random() > 0.05 else not flag for flag in exact]
    return scored(before, exact), scored(after, flipped)


# -- statistics


def test_bounds_contain_what_was_measured_and_narrow_with_the_level() -> None:
    differences = [0.1 * number for number in range(40)]
    wide, narrow = (bootstrap_ratio(differences, None, level) for level in (0.001, 0.05))
    assert wide.low < narrow.low < narrow.measured < narrow.high < wide.high
    assert narrow.measured == pytest.approx(sum(differences) / 40)
    assert bootstrap_ratio(differences, None, 0.05) == narrow  # the same draws every time


def test_rows_count_by_their_tokens() -> None:
    long_row = {"a": RowScore(loss=100.0, tokens=100, exact=True), "b": RowScore(loss=1.0, tokens=1, exact=True)}
    after = {"a": RowScore(loss=100.0, tokens=100, exact=True), "b": RowScore(loss=3.0, tokens=1, exact=True)}
    [one] = judge([measured(long_row, after)], GATE)
    assert one.loss.measured == pytest.approx(2 / 101)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([1.0] * 40, GateVerdict.KEPT),
        ([0.5] * 40, GateVerdict.KEPT),
        ([1.04] * 40, GateVerdict.KEPT),
        ([1.3] * 40, GateVerdict.REGRESSED),
        ([1.0, 1.3] * 20, GateVerdict.REGRESSED),
        ([1.0] * 38 + [3.0] * 2, GateVerdict.UNCLEAR),  # two rows may be luck
    ],
)
def test_a_verdict_follows_from_the_bounds(after: list[float], expected: GateVerdict) -> None:
    assert verdict(scored([1.0] * 40), scored(after)) is expected


def test_exact_answers_count_although_the_loss_does_not_rise() -> None:
    loss = scored([1.0] * 40)
    assert verdict(loss, scored([1.0] * 40, [True] * 20 + [False] * 20)) is GateVerdict.REGRESSED
    assert verdict(scored([1.0] * 40, [False] * 40), loss) is GateVerdict.KEPT


def test_slow_drift_is_seen_although_no_single_step_is_beyond_the_margin() -> None:
    before, after = scored([1.16] * 40), scored([1.2] * 40)
    assert verdict(before, after) is GateVerdict.KEPT
    best = scored([1.0] * 40)
    [one] = judge([measured(before, after, best=best, best_version="0003")], GATE)
    assert one.verdict is GateVerdict.REGRESSED
    assert one.regressed_since_best
    assert one.best_version == "0003"
    assert verdict(before, after, best=scored([1.1] * 40), best_version="0003") is GateVerdict.KEPT


def test_too_few_rows_are_never_a_verdict() -> None:
    assert verdict(scored([1.0] * 5), scored([9.0] * 5)) is GateVerdict.UNCLEAR


def test_strict_passes_only_what_is_shown() -> None:
    assert passes(GateVerdict.UNCLEAR, strict=False)
    assert not passes(GateVerdict.UNCLEAR, strict=True)
    assert not passes(GateVerdict.REGRESSED, strict=False)
    assert passes(GateVerdict.KEPT, strict=True)
    assert overall([]) is GateVerdict.UNMEASURED


def test_at_most_one_harmless_version_in_twenty_is_held_and_a_real_loss_is_not_missed() -> None:
    """The rates that the defaults stand on, over four datasets of 40 rows, and of 16 where the budget is short."""

    def held(shift: float, noise: float, rows: int, count: int = 25) -> float:
        """Share of versions that are held, of which the first of four datasets changed by `shift`."""
        found = 0
        for number in range(count):
            changes = [noisy(shift if at == 0 else 0.0, noise, 1000 * number + at, rows) for at in range(4)]
            found += overall(judge([measured(*change) for change in changes], GATE)) is GateVerdict.REGRESSED
        return found / count

    assert held(0.0, 0.3, 40) <= 0.05
    assert held(0.05, 0.2, 16) <= 0.05  # the margin itself
    assert held(0.3, 0.3, 40) >= 0.95
    assert held(1.0, 0.8, 16) >= 0.95


# -- what is scored


def test_the_worst_and_the_latest_come_first_then_what_was_left_alone_for_longest() -> None:
    standings = [
        Standing(digest="never", learned=9, scored=None),
        Standing(digest="long", learned=8, scored=6),
        Standing(digest="worst", learned=7, scored=1, lost=0.4),
        Standing(digest="short", learned=6, scored=1),
        *(Standing(digest=f"new{age}", learned=age, scored=0) for age in range(3)),
    ]
    assert scoring_order(standings) == (["worst", "new0", "new1", "new2"], ["never", "long", "short"])


def test_no_more_is_scored_than_the_budget_allows() -> None:
    sizes = [100] * 60
    asked: list[str] = []

    def costs(digest: str) -> list[int]:
        asked.append(digest)
        return sizes

    names = [f"d{number}" for number in range(500)]
    budget = ScoreBudget.of(1_000_000, EvaluationSettings())
    taken = choose_rows(names[:4], names[4:], costs, budget)
    assert sum(taken.values()) * 100 <= budget.tokens == 100_000
    assert all(LEAST_ROWS <= rows <= MOST_ROWS for rows in taken.values())
    assert len(asked) < 80  # the others were not even read
    few = choose_rows(names[:4], names[4:9], costs, budget)
    assert set(few.values()) == {MOST_ROWS}


def test_of_a_small_run_the_latest_are_scored_within_the_larger_budget_and_no_others() -> None:
    budget = ScoreBudget.of(20_000, EvaluationSettings())
    taken = choose_rows(["a", "b", "d"], ["c"], lambda _: [100] * 40, budget)
    assert taken.keys() == {"a", "b", "d"}
    assert all(rows >= LEAST_ROWS for rows in taken.values())
    assert sum(taken.values()) * 100 <= budget.most
    tiny = ScoreBudget.of(10, EvaluationSettings())  # a run of a few rows is no less dangerous
    assert choose_rows(["a"], ["c"], lambda _: [100] * 40, tiny) == {"a": 40}
    assert choose_rows(["a"], [], lambda _: [1000] * 40, tiny) == {}
    assert choose_rows(["a"], [], lambda _: [100] * 3, budget) == {"a": 3}


# -- blends


def blends(losses: Mapping[float, float], own: Mapping[float, float], **gate: Any) -> tuple[float | None, list[float]]:
    """The alpha that is taken, and those that were tried, by what each would make of an old and the new dataset."""
    asked: list[float] = []

    def score(alpha: float) -> Scored:
        asked.append(alpha)
        return Scored(datasets={"d" * 64: scored([losses[alpha]] * 40)}, own=scored([own[alpha]] * 40))

    found = choose_blend(
        score,
        measured=[measured(scored([1.0] * 40), scored([4.0] * 40))],
        parent=scored([3.0] * 40),
        candidate=scored([1.0] * 40),
        gate=GateSettings(**gate),
    )
    assert list(found.tried) == asked[: len(found.tried)]
    return found.alpha, asked


def test_the_largest_blend_is_taken_that_loses_nothing_and_keeps_the_gain() -> None:
    own = {0.75: 1.1, 0.5: 1.2, 0.25: 2.0}
    assert blends({0.75: 1.0, 0.5: 1.0, 0.25: 1.0}, own) == (0.75, [0.75])
    assert blends({0.75: 2.0, 0.5: 1.02, 0.25: 1.0}, own) == (0.5, [0.75, 0.5])
    assert blends({0.75: 2.0, 0.5: 1.5, 0.25: 1.0}, own) == (None, [0.75, 0.5, 0.25])  # half of the gain is not enough
    assert blends({0.75: 2.0, 0.5: 1.5, 0.25: 1.0}, own, min_gain_kept=0.4)[0] == 0.25


def test_a_blend_that_suits_only_the_rows_that_chose_it_is_not_taken() -> None:
    good_on_even = [1.0 if number % 2 == 0 else 4.0 for number in range(40)]

    def score(alpha: float) -> Scored:
        return Scored(datasets={"d" * 64: scored(good_on_even)}, own=scored([1.0] * 40))

    found = choose_blend(
        score,
        measured=[measured(scored([1.0] * 40), scored([4.0] * 40))],
        parent=scored([3.0] * 40),
        candidate=scored([1.0] * 40),
        gate=GATE,
    )
    assert found.alpha is None


# -- scores


def test_scores_are_found_again_and_only_under_the_same_conditions(tmp_path: Path) -> None:
    write_scores(tmp_path, "a" * 64, AdapterScores(environment="cpu", datasets={"x": scored([1.0])}))
    write_scores(tmp_path, "a" * 64, AdapterScores(environment="cpu", datasets={"y": scored([2.0])}))
    found = read_scores(tmp_path, "a" * 64, "cpu")
    assert dict(found.rows("x")) == scored([1.0])
    assert dict(found.rows("y")) == scored([2.0])
    assert not read_scores(tmp_path, "a" * 64, "cuda").datasets
    scores_path(tmp_path, "a" * 64).write_text('{"environment": "cpu", "datasets": [')
    assert not read_scores(tmp_path, "a" * 64, "cpu").datasets
    sweep_scores(tmp_path, [])
    assert not scores_path(tmp_path, "a" * 64).exists()


def test_the_best_of_a_line_is_compared_over_the_same_rows_only() -> None:
    full = AdapterScores(environment="", datasets={"x": scored([1.0, 1.0])})
    part = AdapterScores(environment="", datasets={"x": scored([0.1])})
    rows = list(scored([0.0, 0.0]))
    best = best_of_line([("0002", part), ("0001", full)], "x", rows)
    assert best is not None
    assert best[0] == "0001"
    assert best_of_line([("0002", part)], "x", rows) is None


# -- what is done, and shown


def test_only_the_settings_of_the_root_decide_what_becomes_of_a_loss() -> None:
    lost = Evaluation(verdict=GateVerdict.REGRESSED, passes=False, reasons=("facts.jsonl 1 -> 4",))
    result = RunResult(outcome=Outcome.SUCCEEDED, evaluation=lost)
    for action, expected in (("hold", "held"), ("warn", "warned"), ("off", "promoted")):
        found = with_action(result, GateSettings(action=action)).evaluation  # type: ignore[arg-type]
        assert found is not None
        assert found.action == expected
    kept = RunResult(outcome=Outcome.SUCCEEDED, evaluation=Evaluation(verdict=GateVerdict.KEPT, passes=True))
    assert with_action(kept, GATE) == kept
    assert with_action(RunResult(outcome=Outcome.SUCCEEDED), GATE).evaluation is None
    assert held_reason(result) == "held: facts.jsonl 1 -> 4"


def test_an_evaluation_survives_the_result_file() -> None:
    [one] = judge([measured(*noisy(0.5, 0.1, 1))], GATE)
    evaluation = Evaluation(verdict=one.verdict, passes=False, datasets=(one,), action=GateAction.HELD, alpha=0.5)
    result = RunResult(outcome=Outcome.SUCCEEDED, evaluation=evaluation)
    assert from_json(to_json(result), RunResult) == result


def record(version: str, parent: str | None, dataset: str, own: float, **earlier: float) -> dict[str, Any]:
    datasets = [
        {"digest": digest, "name": f"{digest}.jsonl", "loss_after": loss, "exact_after": 1.0, "rows": 40}
        for digest, loss in earlier.items()
    ]
    evaluation = {"verdict": "kept", "datasets": datasets, "own": {"loss": own, "exact": 1.0, "rows": 40}}
    return {
        "version": version,
        "parent": parent,
        "dataset": f"{dataset}.jsonl",
        "dataset_digest": dataset,
        "evaluation": evaluation,
    }


def test_the_matrix_follows_the_line_of_the_current_version_and_leaves_empty_what_was_not_scored() -> None:
    records = [
        record("0001", None, "a", 1.0),
        record("0002", "0001", "b", 0.5, a=1.5),
        record("0003", "0001", "c", 0.2, a=1.1),  # another branch
        record("0004", "0002", "d", 0.3, a=2.0),
    ]
    matrix = read_matrix(records, ["0003"])
    assert [name for _, name in matrix.datasets] == ["a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"]
    assert "b" not in matrix.rows[3].cells
    summary = summarise(matrix, "0004")
    assert summary is not None
    assert (summary.learned, summary.measured, summary.transferred) == (3, 2, 1)
    assert summary.backward_transfer == pytest.approx(-1.0)
    assert summary.worst == ("a", 1.0)
    assert summary.average_loss == pytest.approx((2.0 + 0.3) / 2)
    assert summarise(matrix, None) is None
    shown = model_evaluation(matrix, "0004")
    assert shown is not None
    assert [(one["dataset"], one["change"]) for one in shown["datasets"]] == [("a.jsonl", 1.0), ("d.jsonl", None)]
    assert shown["backward_transfer"] == pytest.approx(-1.0)
    old = {"version": "0001", "parent": None, "dataset": "a.jsonl", "dataset_digest": "a", "held_out_after": 1.25}
    assert read_matrix([old]).rows[0].cells["a"].loss == 1.25
