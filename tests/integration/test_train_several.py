"""Two processes that share each step: the same rows, the same run, resumed from where one process left it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from daemon.job import FailureKind, Outcome, RunResult, RunSpec, from_json, to_json
from daemon.recipe import Recipe
from daemon.run_dir import RunWriter
from daemon.trainer import launcher
from daemon.trainer.callbacks import MonitorCallback
from daemon.trainer.errors import RunFailure
from daemon.trainer.launcher import KILLED, exit_code
from tests.support.inprocess import Wish, events, recipe, rows, specify, train
from tests.support.root import environment

PYTHON = sys.executable
ONE = {"training": {"save_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}}
TWO = {"training": {**ONE["training"], "gradient_accumulation_steps": 1, "num_processes": 2}}


def launch(spec: RunSpec) -> RunResult:
    run_dir = Path(spec.run_dir)
    (run_dir / "run.json").write_text(to_json(spec))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "daemon.trainer", str(run_dir)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env=environment(),
    )
    assert (run_dir / "result.json").exists(), done.stderr[-3000:]
    return from_json((run_dir / "result.json").read_bytes(), RunResult)


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The run as one process makes it."""
    return train(specify(tmp_path_factory.mktemp("whole"), rows(60), tiny_base, ONE))


def require_same_weights(found: RunResult, expected: RunResult) -> None:
    """Within float tolerance: the order in which gradients are added up differs."""
    ours, theirs = (load_file(Path(one.candidate or "") / "adapter_model.safetensors") for one in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=2e-2, atol=2e-3)
        # As a whole far closer than single weights, which Adam moves by the learning rate for gradients near zero.
        assert float((ours[name] - tensor).norm()) <= 2e-2 * float(tensor.norm())


def test_one_process_takes_over_a_run_of_two_which_computed_what_one_does(
    tiny_base: Path, tmp_path: Path, whole: RunResult
) -> None:
    spec = specify(tmp_path, rows(60), tiny_base, {"training": {**TWO["training"], "save_total_limit": 100}})
    both = launch(spec)
    assert both.outcome is Outcome.SUCCEEDED, both
    assert (both.steps_run, both.rows, both.tokens_trained) == (whole.steps_run, whole.rows, whole.tokens_trained)
    assert both.train_loss == pytest.approx(whole.train_loss, rel=1e-4)
    assert both.held_out_before == pytest.approx(whole.held_out_before, rel=1e-5)
    require_same_weights(both, whole)

    # As if it had been stopped after its first checkpoint.
    for checkpoint in (tmp_path / "model").glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-2":
            shutil.rmtree(checkpoint)
    alone = train(replace(spec, attempt=2, recipe=recipe(tiny_base, ONE).model_dump(mode="json")))
    assert (alone.verdict, alone.resumed_from, alone.cleared) == ("resume", "checkpoint-2", 0)
    assert alone.steps_run == whole.steps_run
    require_same_weights(alone, whole)


def test_two_processes_take_over_a_run_of_one_and_end_where_it_would_have(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: RunResult
) -> None:
    """The same fingerprint (so: resumed, nothing cleared), the same steps, the same weights within float tolerance."""
    content = rows(60)
    expected = whole

    wish = Wish()
    ended = MonitorCallback.on_step_end

    def stopping(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wish.requested = state.global_step >= 3
        ended(self, args, state, control, **kwargs)

    monkeypatch.setattr(MonitorCallback, "on_step_end", stopping)
    spec = specify(tmp_path / "shared", content, tiny_base, ONE)
    begun = train(spec, wish)
    assert (begun.outcome, begun.steps_run) == (Outcome.INTERRUPTED, 3)

    shared = replace(spec, attempt=2, recipe=recipe(tiny_base, TWO).model_dump(mode="json"))
    result = launch(shared)
    assert result.outcome is Outcome.SUCCEEDED, result
    assert result.verdict == "resume"
    assert result.resumed_from == "checkpoint-3"
    assert result.cleared == 0
    assert result.steps_run == result.steps_planned == expected.steps_run
    assert result.rows == expected.rows
    assert result.held_out_before == pytest.approx(expected.held_out_before, rel=1e-5)
    assert result.held_out_after == pytest.approx(expected.held_out_after, rel=1e-3)
    require_same_weights(result, expected)
    # One voice: each step is told once, by process 0.
    told = [event["step"] for event in events(shared, "run.stepped")]
    assert told == list(range(1, expected.steps_run + 1))
    assert json.loads((tmp_path / "shared" / "run" / "process-1" / "result.json").read_text())["outcome"] == "succeeded"


def test_the_number_of_processes_is_no_part_of_a_runs_identity(tiny_base: Path) -> None:
    from daemon.fingerprint import fingerprint_run
    from daemon.job import Dataset

    def identity(chosen: Recipe) -> str:
        return fingerprint_run(
            dataset=Dataset(name="x", path="/x", size_bytes=1, rows=1, digest="00", format="text"),
            recipe=chosen,
            base_path=tiny_base,
            base_revision=None,
            parent_version=None,
            parent_digest=None,
            precision="float32",
        ).identity_digest

    assert identity(recipe(tiny_base, ONE)) == identity(recipe(tiny_base, TWO))
    assert identity(recipe(tiny_base, ONE)) != identity(recipe(tiny_base, {"training": {"num_processes": 2}}))


def test_a_killed_process_ends_the_run_as_lost(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "oom_kills", lambda: 7)

    class Killer(Wish):
        """Asked again and again while the processes run; kills the second as soon as they train together."""

        killed = False

        @property
        def requested(self) -> bool:  # type: ignore[override]
            if not self.killed and any(event["event"] == "run.started" for event in events(spec)):
                for torchrun in children(os.getpid()):
                    for member in children(torchrun)[1:]:
                        os.kill(member, signal.SIGKILL)
                        self.killed = True
            return False

    spec = specify(tmp_path, rows(60), tiny_base, {"training": {**TWO["training"], "num_train_epochs": 50}})
    Path(spec.run_dir, "run.json").write_text(to_json(spec))
    with pytest.raises(RunFailure) as caught:
        launcher.launch(spec, RunWriter(Path(spec.run_dir)), Killer())  # type: ignore[arg-type]
    assert caught.value.kind is FailureKind.LOST


def run_faked(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results: list[dict[str, str]], code: int
) -> RunResult:
    """With a torchrun that leaves these results and ends with `code`."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(
        f"""#!{PYTHON}
from pathlib import Path
for process, result in enumerate({[json.dumps(result) for result in results]!r}):
    Path({spec.run_dir!r}, f"process-{{process}}", "result.json").write_text(result)
raise SystemExit({code})
"""
    )
    torchrun.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(torchrun))
    return launcher.launch(spec, RunWriter(Path(spec.run_dir)), Wish())


@pytest.mark.parametrize(("kills", "kind"), [(7, FailureKind.LOST), (8, FailureKind.OUT_OF_MEMORY)])
def test_the_kernels_own_count_tells_a_kill_for_want_of_memory_from_another(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int, kind: FailureKind
) -> None:
    counts = iter((7, kills))
    monkeypatch.setattr(launcher, "oom_kills", lambda: next(counts))
    spec = specify(tmp_path, rows(60), tiny_base, TWO)
    with pytest.raises(RunFailure) as caught:
        run_faked(spec, monkeypatch, tmp_path, [], KILLED + signal.SIGKILL)
    assert caught.value.kind is kind


def test_a_process_that_dies_after_its_last_word_has_done_its_share(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = specify(tmp_path, rows(60), tiny_base, TWO)
    both = [{"outcome": "succeeded", "candidate": "/first"}, {"outcome": "succeeded"}]
    result = run_faked(spec, monkeypatch, tmp_path, both, KILLED + signal.SIGABRT)
    assert (result.outcome, result.candidate) == (Outcome.SUCCEEDED, "/first")


def test_of_two_processes_the_one_that_knows_why_is_believed(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other is aborted by its library when the first has gone, and may be noticed first."""
    spec = specify(tmp_path, rows(60), tiny_base, TWO)
    knows = {"outcome": "failed", "failure": "diverged", "message": "the loss is nan"}
    missed = {"outcome": "failed", "failure": "internal", "message": "connection closed by peer"}
    for results, code in (([knows], KILLED + signal.SIGABRT), ([missed, knows], 1)):
        assert run_faked(spec, monkeypatch, tmp_path, results, code).failure is FailureKind.DIVERGED


@pytest.mark.parametrize(
    ("failures", "code"),
    [
        ([(1, 7)], 1),
        ([(-9, 7)], KILLED + 9),
        ([(1, 7), (-9, 7)], KILLED + 9),  # both had ended when torchrun looked
        ([(1, 7), (-11, 8)], KILLED + 11),
        ([(1, 7), (-15, 7)], 1),  # torchrun asked the second to end
        ([(1, 7), (-9, 37)], 1),  # and insisted
        ([(-9, 7), (1, 7)], KILLED + 9),
        ([(-15, 7), (1, 9)], KILLED + 15),
    ],
)
def test_torchrun_tells_who_was_killed(failures: list[tuple[int, int]], code: int) -> None:
    noticed = [SimpleNamespace(exitcode=exitcode, timestamp=second) for exitcode, second in failures]
    assert exit_code(noticed) == code


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
