"""Every version answers the administrator's evals; one that answers fewer than its parent does not become current."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from daemon import versions
from daemon.cli.main import app
from daemon.evaluation.scores import read_any_scores
from daemon.evaluation.values import EvalEvaluation, GateAction, GateVerdict
from daemon.job import Outcome, RunResult, RunSpec
from daemon.memory.store import memory_dir_of
from daemon.trainer.answers import GenerationError, Writer, divide
from tests.integration.test_gate import COLOURS, finished, rows, specified
from tests.support.inprocess import Wish, events, train


class StopAtQuestion(Wish):
    """Asks the run to stop once it answers evals: the checks before are those of its data and of its start."""

    checks = 0

    def check(self) -> None:
        super().check()
        self.checks += 1
        self.requested = self.checks >= 4


def asked(folder: Path, name: str, content: list[dict[str, Any]]) -> str:
    (folder / "evals").mkdir(exist_ok=True)
    (folder / "evals" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(folder / "evals")


@pytest.fixture(scope="module")
def answered(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RunSpec], list[RunResult]]:
    """Two versions on one root: the second one answers the first one's questions otherwise."""
    folder = tmp_path_factory.mktemp("answered")
    questions = [
        {"prompt": f"item {number} is ", "check": "contains", "expected": "red and red"} for number in range(600, 612)
    ]
    evals_dir = asked(folder, "colours", questions)
    asked(folder, "programs", [{"prompt": "item 1 is ", "check": "command", "command": ["grep", "-q", "answer"]}])
    program = [{"prompt": f"item {n} is ", "check": "command", "command": ["sh", "-c", "exit 127"]} for n in (1, 2)]
    asked(folder, "broken", program)
    asked(folder, "wrong", [{"prompt": "a", "expected": "b"}, {"prompt": "a"}])
    specs, results = [], []
    for name, colours in (("a", COLOURS[:1]), ("b", COLOURS[1:2])):
        spec = specified(folder, name, tiny_base, rows(colours, 0 if name == "a" else 500), remedies=[])
        spec = replace(spec, evals_dir=evals_dir, evaluation={"evals_max_new_tokens": 24, "budget": 0.0})
        specs.append(spec)
        results.append(finished(spec))
    return folder, specs, results


def in_folder(folder: Path) -> dict[str, Any]:
    """A run's places on a copy of the root."""
    return {"run_dir": str(folder), "model_dir": str(folder / "model"), "state_dir": str(folder / "state")}


def evals_in(result: RunResult) -> dict[str, EvalEvaluation]:
    assert result.evaluation is not None
    return {one.name: one for one in result.evaluation.evals}


def test_a_version_that_answers_fewer_rows_is_held(answered: tuple[Path, list[RunSpec], list[RunResult]]) -> None:
    folder, specs, (first, second) = answered
    before, after = evals_in(first)["colours"], evals_in(second)["colours"]
    assert (before.answered, before.verdict, before.passed_before) == (12, GateVerdict.UNMEASURED, None)
    assert before.passed is not None
    assert before.passed > 0.9  # what was trained is answered, with the rows' own end
    assert (after.passed_before, after.passed_after, after.compared) == (before.passed, 0.0, 12)
    assert after.verdict is GateVerdict.REGRESSED
    assert evals_in(second)["programs"].passed == 1.0
    assert second.evaluation is not None
    assert second.evaluation.action is GateAction.HELD
    assert any(warning.startswith("fewer rows pass: eval colours") for warning in second.warnings)
    assert any("not measured: evals/wrong.jsonl line 2: check" in warning for warning in second.warnings)
    assert len([warning for warning in second.warnings if "broken" in warning]) == 1  # and no row of it counts
    [judged] = events(specs[1], "run.gate_judged")
    assert judged["evals"] == {"colours": 0.0, "programs": 1.0}
    card = (versions.find_version(folder / "model", "2").path / "README.md").read_text()
    assert "| colours | 12 | 12 |" in card


def test_a_parent_answers_once(answered: tuple[Path, list[RunSpec], list[RunResult]], tmp_path: Path) -> None:
    """Its answers are those of its own run; only a row that is new is asked of it later, with its own weights."""
    folder, specs, (first, _) = answered
    parent = versions.find_version(folder / "model", "1")
    known = read_any_scores(memory_dir_of(folder / "state"), str(parent.record["adapter_digest"])).answers("colours")
    assert len(known) == 12
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, symlinks=True)
    question = {"prompt": "item 77 is ", "check": "contains", "expected": "red"}
    evals_dir = asked(tmp_path, "new", [question])
    for name in ("programs", "wrong", "broken"):
        (tmp_path / "evals" / f"{name}.jsonl").unlink()
    spec = replace(specs[1], job_id="c", evals_dir=evals_dir, **in_folder(tmp_path))
    result = train(spec)
    assert result.outcome is Outcome.SUCCEEDED
    found = evals_in(result)
    assert (found["new"].passed_before, found["new"].passed_after) == (1.0, 0.0)
    assert found["colours"].passed_before == evals_in(first)["colours"].passed
    adapter = str(parent.record["adapter_digest"])
    kept = read_any_scores(memory_dir_of(tmp_path / "state"), adapter)
    assert [answer.prompt for answer in kept.answers("new").values()] == [question["prompt"]]
    assert kept.answers("colours") == known


def test_an_answer_ends_before_the_token_that_ends_it_or_at_its_longest() -> None:
    model: Any = None
    writer = Writer(model=model, ends=(7, 9), pad_token_id=0, max_new_tokens=3, tick=lambda: None)
    assert [writer.finished(ids) for ids in ([1, 9, 7], [7], [1, 2, 3], [1, 2])] == [[1], [], [1, 2, 3], None]
    assert divide([5, 100_000, 3, 4], 8) == [[2, 3, 0], [1]]
    assert [len(places) for places in divide([1] * 40, 8)] == [32, 8]


def test_a_model_that_cannot_write_is_told_of() -> None:
    """Its losses can be computed all the same, and its run is whole."""

    class Bare:
        def get_base_model(self) -> object:
            return object()

    model: Any = Bare()
    writer = Writer(model=model, ends=(), pad_token_id=0, max_new_tokens=3, tick=lambda: None)
    with pytest.raises(GenerationError, match="writes no answers"):
        writer.write([[1]], float("inf"))


def test_no_time_and_a_stop_are_told_and_nothing_is_lost(
    answered: tuple[Path, list[RunSpec], list[RunResult]], tmp_path: Path
) -> None:
    folder, specs, _ = answered
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, symlinks=True)
    spec = replace(specs[1], job_id="d", evaluation={"evals_seconds": 1e-6}, **in_folder(tmp_path))
    result = train(spec)
    assert result.outcome is Outcome.SUCCEEDED
    assert evals_in(result)["colours"].verdict is GateVerdict.UNMEASURED
    assert any("12 of 12 rows were not answered within [evaluation] evals_seconds" in one for one in result.warnings)
    stopped = train(replace(specs[1], job_id="e", **in_folder(tmp_path)), StopAtQuestion())
    assert stopped.outcome is Outcome.INTERRUPTED
    assert stopped.candidate is None


def test_compare_matrix_and_status_show_the_answers(
    answered: tuple[Path, list[RunSpec], list[RunResult]], tmp_path: Path
) -> None:
    folder, _, _ = answered
    (tmp_path / "dropforge.toml").write_text(
        f'[paths]\ncurrent_model = "{folder}/model"\nstate = "{folder}/state"\nevals = "{folder}/evals"\n'
    )

    def run(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["--root", str(tmp_path), *arguments])
        assert done.exit_code == code, done.output
        return done.output

    compared = json.loads(run("compare", "1", "2", "--json"))
    [colours] = [one for one in compared["evals"] if one["name"] == "colours"]
    assert colours["verdict"] == "regressed"
    assert len(colours["flips"]) == 12
    assert "red and red" in colours["flips"][0]["before"]
    assert "red" not in colours["flips"][0]["after"]
    assert "lost" in run("compare", "1", "2")
    assert "eval colours" in run("versions", "--matrix")
    shown = run("evals", code=1)
    assert "evals/wrong.jsonl line 2: check" in shown
    assert "12 contains" in shown
