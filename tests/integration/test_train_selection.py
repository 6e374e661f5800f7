"""Evaluations during a run choose its weights, and a run that was killed anywhere chooses as one that was not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from daemon.job import Job, JobState, Outcome, RunResult, RunSpec
from daemon.run_dir import RunWriter
from tests.support.inprocess import Wish, events, specify
from tests.support.root import Root, wait_until
from tests.support.sound import assert_sound

MakeRoot = Callable[..., Root]
# Few rows and a high rate: what is held out is understood for a while, and then unlearned.
OVERFITS = {
    "training": {
        "learning_rate": 2e-2, "num_train_epochs": 4.0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
        "eval_steps": 2, "load_best_model_at_end": True, "save_steps": 5, "save_total_limit": 1,
    },
    "data": {"max_length": 48},
}  # fmt: skip


def pairs(count: int = 40) -> list[dict[str, str]]:
    return [{"prompt": f"What is {n}? ", "completion": f"{n * 37 % 101} and {n * 53 % 97}"} for n in range(count)]


def with_training(**settings: Any) -> dict[str, Any]:
    return {**OVERFITS, "training": {**OVERFITS["training"], **settings}}


def spec_of(folder: Path, base: Path, tables: dict[str, Any] | None = None, rows: int = 40) -> RunSpec:
    return specify(folder, pairs(rows), base, tables or OVERFITS, format_="prompt_completion")


class Killed(BaseException):
    """Stands for a kill -9: nothing catches it, and the disk stays as it is."""


@dataclass
class Fault:
    """What happens at one event of one step."""

    event: str
    step: int
    stop: Wish | None = None  # asked to stop; None: killed


class FaultyWriter(RunWriter):
    """Meets the fault in the middle of a run."""

    def __init__(self, run_dir: Path, fault: Fault | None) -> None:
        super().__init__(run_dir)
        self._fault = fault

    def _meet(self, event: str, step: Any) -> None:
        fault = self._fault
        if fault is None or (fault.event, fault.step) != (event, step):
            return
        self._fault = None
        if fault.stop is None:
            raise Killed
        fault.stop.requested = True

    def event(self, name: str, **data: Any) -> None:
        super().event(name, **data)
        self._meet(name, data.get("step"))

    def progress(self, **fields: Any) -> None:
        super().progress(**fields)
        if fields.get("phase") == "training":
            self._meet("trained", fields.get("step"))


def train(spec: RunSpec, fault: Fault | None = None) -> RunResult:
    from daemon.trainer.train import train as run

    wish = (fault and fault.stop) or Wish()
    return run(spec, FaultyWriter(Path(spec.run_dir), fault), wish)  # type: ignore[arg-type]


def weights(folder: Path | str | None) -> dict[str, torch.Tensor]:
    return load_file(Path(folder or "") / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSpec, RunResult]:
    spec = spec_of(tmp_path_factory.mktemp("whole"), tiny_base)
    return spec, train(spec)


def test_a_run_ends_with_the_weights_of_its_best_evaluation(whole: tuple[RunSpec, RunResult]) -> None:
    spec, result = whole
    assert result.outcome is Outcome.SUCCEEDED
    assert [point.step for point in result.held_out_losses] == [2, 4, 6, 8, 10, 12, 14, 16]
    best = min(result.held_out_losses, key=lambda point: point.loss)
    assert best.step < 16, "nothing was unlearned: the test shows nothing"
    assert (result.best_step, result.kept_step, result.steps_run) == (best.step, best.step, 16)
    assert result.held_out_after == pytest.approx(best.loss, rel=1e-6)
    # The best one stays beside the newest, however few are kept.
    kept = {int(path.name.rpartition("-")[2]) for path in Path(spec.model_dir).glob("checkpoint-*")}
    assert kept == {best.step, 16}
    best_folder = Path(spec.model_dir) / f"checkpoint-{best.step}"
    assert same(weights(result.candidate), weights(best_folder))
    card = (Path(result.candidate or "") / "README.md").read_text()
    assert f"of step {best.step}; the lowest held-out loss during the run" in card
    assert [event["step"] for event in events(spec, "run.evaluated") if event["when"] == "during"] == [
        2, 4, 6, 8, 10, 12, 14, 16
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("event", "step", "stops"),
    [
        ("checkpoint.sealed", 4, False),
        ("run.evaluated", 8, False),  # the evaluation of a step that is not yet sealed
        ("run.best_kept", None, False),  # trained to the end, nothing written
        ("trained", 3, True),  # leaves at a step that is to be evaluated, without evaluating it
    ],
)
def test_a_run_that_was_interrupted_anywhere_ends_with_the_same_weights_and_the_same_best(
    whole: tuple[RunSpec, RunResult], tiny_base: Path, tmp_path: Path, event: str, step: int | None, stops: bool
) -> None:
    spec, expected = spec_of(tmp_path, tiny_base), whole[1]
    at = step if step is not None else expected.kept_step or 0
    if stops:
        assert train(spec, Fault(event, at, Wish())).outcome is Outcome.INTERRUPTED
    else:
        with pytest.raises(Killed):
            train(spec, Fault(event, at))
    result = train(spec)
    assert result.verdict == "resume"
    assert result.held_out_losses == expected.held_out_losses
    assert (result.best_step, result.kept_step) == (expected.best_step, expected.kept_step)
    assert same(weights(result.candidate), weights(expected.candidate))


def test_evaluating_changes_nothing_of_what_is_trained(
    whole: tuple[RunSpec, RunResult], tiny_base: Path, tmp_path: Path
) -> None:
    """Without load_best_model_at_end, the last weights are those of a run that evaluates nothing."""
    spec = spec_of(tmp_path, tiny_base, with_training(eval_steps=0, load_best_model_at_end=False))
    result = train(spec)
    assert (result.held_out_losses, result.best_step, result.kept_step) == ((), None, 16)
    assert same(weights(result.candidate), weights(Path(whole[0].model_dir) / "checkpoint-16"))


def test_patience_ends_a_run_and_a_kill_after_its_last_step_does_not_prolong_it(
    tiny_base: Path, tmp_path: Path
) -> None:
    tables = with_training(early_stopping_patience=1, early_stopping_threshold=50.0)  # nothing improves by that
    spec = spec_of(tmp_path, tiny_base, tables)
    with pytest.raises(Killed):
        train(spec, Fault("checkpoint.sealed", 4))
    result = train(spec)
    assert (result.outcome, result.stopped_early) == (Outcome.SUCCEEDED, True)
    assert (result.steps_run, result.start_step, result.steps_planned) == (4, 4, 16)
    assert [point.step for point in result.held_out_losses] == [2, 4]


def test_best_weights_that_were_damaged_are_told_and_the_next_best_taken(tiny_base: Path, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, tiny_base)
    with pytest.raises(Killed):
        train(spec, Fault("run.evaluated", 16))
    best, newest = sorted(int(path.name.rpartition("-")[2]) for path in Path(spec.model_dir).glob("checkpoint-*"))
    assert best < newest
    file = Path(spec.model_dir) / f"checkpoint-{best}" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    result = train(spec)
    assert (result.outcome, result.best_step) == (Outcome.SUCCEEDED, best)
    assert result.kept_step != best
    told = f"the best weights, of step {best}, could not be loaded: checkpoint-{best} is altered"
    assert any(told in warning and f"step {result.kept_step} were taken" in warning for warning in result.warnings)


def test_a_dataset_of_which_nothing_is_held_out_says_that_nothing_was_chosen(tiny_base: Path, tmp_path: Path) -> None:
    result = train(spec_of(tmp_path, tiny_base, rows=9))
    assert (result.held_out_losses, result.steps_run) == ((), result.steps_planned)
    assert any("load_best_model_at_end had no effect: no row" in warning for warning in result.warnings)


def test_a_job_that_stopped_early_is_a_success_and_shows_its_evaluations(make_root: MakeRoot, tiny_base: Path) -> None:
    tables = with_training(early_stopping_patience=1, early_stopping_threshold=50.0)
    root = make_root(base_model=tiny_base, tables=tables)
    root.start()
    root.drop("a.jsonl", pairs())
    job: Job = root.finished("a.jsonl")
    assert (job.state, job.version) == (JobState.SUCCEEDED, "0001"), job.reason
    assert "4 of 16 steps" in job.reason
    shown = " ".join(root.run("show", job.id).stdout.split())
    assert "during the run step 2 " in shown
    assert "stopped early" in shown
    assert job.result is not None
    assert job.result.held_out_losses[-1].step == job.result.steps_run == 4
    # What was learned is also what is kept to rehearse.
    memory = wait_until(lambda: ((root.status() or {}).get("memory") or {}).get("datasets") and root.status()["memory"])
    assert (memory["datasets"], memory["kept_rows"], memory["held_out_rows"], memory["problems"]) == (1, 32, 8, 0)
    assert 0 < memory["used_bytes"] < memory["max_bytes"] == root.settings.replay.memory_bytes
    assert_sound(root)
