"""A disk that is truly full or read-only: a small tmpfs, mounted and remounted by the test."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import guard
from daemon.job import FailureKind, JobState, Outcome, RunResult, RunSpec, from_json, to_json
from daemon.trainer import attempt
from daemon.trainer.attempt import kind_of, run_attempt
from tests.support.disks import mounted, remount
from tests.support.root import Root, wait_until
from tests.support.sound import assert_sound

STEPS = {"training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 2}}
ROWS = [{"text": f"row {row}"} for row in range(6)]


def test_a_disk_without_room_for_a_run_holds_the_queue_until_there_is_some(make_root: Callable[..., Root]) -> None:
    root = make_root(behaviour={}, tables={**STEPS, "queue": {"min_free_bytes": 0}})
    with mounted(root.settings.model_dir, "8m"):
        root.start()
        root.drop("a.jsonl", ROWS)
        status = wait_until(lambda: (now := root.status()) and "free space" in now["reason"] and now)
        assert status
        assert status["status"] == "waiting"
        remount(root.settings.model_dir, "size=4g")
        done = root.finished("a.jsonl")
        assert (done.state, done.attempt) == (JobState.SUCCEEDED, 1)
        assert root.stop() == 0
        assert_sound(root)


def test_a_model_directory_that_became_read_only_holds_the_queue_until_it_can_be_written(
    make_root: Callable[..., Root],
) -> None:
    root = make_root(behaviour={}, tables={**STEPS, "queue": {"min_free_bytes": 0, "max_attempts": 2}})
    with mounted(root.settings.model_dir, "4g"):
        root.start()
        remount(root.settings.model_dir, "ro")
        root.drop("a.jsonl", ROWS)
        status = wait_until(lambda: (now := root.status()) and "read-only file system" in now["reason"] and now)
        assert status
        assert status["status"] == "waiting"
        remount(root.settings.model_dir, "rw")
        done = root.finished("a.jsonl")
        assert (done.state, done.attempt) == (JobState.SUCCEEDED, 1)
        assert root.stop() == 0
        assert_sound(root)


@pytest.mark.parametrize("size", ["60k", "400k", "700k", "1000k", "1500k"])
def test_a_disk_that_fills_up_while_training_is_told_as_that_and_the_run_goes_on_with_room(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    """Full at the metadata, at weights, at torch's archives, at the third checkpoint: no error of a library in its place."""
    inprocess = pytest.importorskip("tests.support.inprocess")
    tables = {"training": {"save_steps": 1}, "data": {"held_out_fraction": 0.0}}
    spec = inprocess.specify(tmp_path, inprocess.rows(32), tiny_base, tables)
    for effect in ("die_with_parent", "prefer_oom_kill"):  # they are for a process of its own
        monkeypatch.setattr(attempt, effect, lambda **_: None)
    model_dir = Path(spec.model_dir)
    with mounted(model_dir, size):
        result = run_as_process(spec, inprocess)
        assert (result.outcome, result.failure) == (Outcome.FAILED, FailureKind.NO_SPACE), result.message
        assert "full" in result.message or "no space" in result.message.lower()
        assert "free some space" in result.hint
        assert not list(model_dir.glob(".staging/*"))
        sealed = guard.scan_checkpoints(model_dir, digests=True)
        assert all(checkpoint.is_intact for checkpoint in sealed)
        remount(model_dir, "size=16m")
        again = run_as_process(spec, inprocess)
        assert again.outcome is Outcome.SUCCEEDED, again.message
        assert again.start_step == max((checkpoint.step for checkpoint in sealed), default=0)
        assert again.steps_run == again.steps_planned == 4


def run_as_process(spec: RunSpec, inprocess: Any) -> RunResult:
    """One attempt as the trainer's process runs it, result file and all, without its start."""
    run_dir = Path(spec.run_dir)
    (run_dir / "run.json").write_text(to_json(spec))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run_attempt(run_dir, lambda: lambda spec, report, stop: inprocess.train(spec))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return from_json((run_dir / "result.json").read_bytes(), RunResult)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (guard.StorageError(operation="seal", path="x", cause="no space left on device"), FailureKind.NO_SPACE),
        (guard.StorageError(operation="seal", path="x", cause="input/output error"), FailureKind.INTERNAL),
        (guard.UsageError(operation="use the key file", path="key", cause="others can use it"), FailureKind.CONFIG),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), FailureKind.NO_SPACE),
        (OSError(errno.EIO, "Input/output error"), FailureKind.INTERNAL),
    ],
)
def test_errors_of_the_guard_and_of_the_system_have_their_kind(error: Exception, kind: FailureKind) -> None:
    if "no space" in str(error):
        error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert isinstance(error, guard.GuardError | OSError)
    assert kind_of(error) is kind
