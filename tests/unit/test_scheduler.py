"""The scheduler over a real root and store: what it asks of a trainer, when, and what follows from each end.

The executor is scripted; everything else is the daemon's own. Time is moved, not waited for.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import guard
from daemon import scheduler as scheduler_module
from daemon import versions
from daemon.config import Settings
from daemon.executors.base import Exit
from daemon.gpu import GpuProbe, GpuReservation
from daemon.holds import PAUSED_KEY, Hold, HoldKind
from daemon.in_hand import InHand
from daemon.inbox.archive import Archive
from daemon.job import Dataset, FailureKind, Job, JobState, Outcome, Progress, RunResult, RunSpec, to_json, utc_now
from daemon.memory.forgetting import FORGOTTEN_KEY
from daemon.notifications import Hooks
from daemon.retry import StopReason
from daemon.run_dir import EVENTS_NAME, PROGRESS_NAME, RESULT_NAME, begin_attempt, run_dir_of
from daemon.run_window import RunWindow
from daemon.scheduler import Scheduler
from daemon.store import JobStore
from tests.support.inbox import Record
from tests.unit.guard.test_metadata import make_metadata
from tests.unit.test_versions import candidate

INTERRUPTED = RunResult(outcome=Outcome.INTERRUPTED)


class Clock:
    """The module `time` as the scheduler sees it, moved by a test."""

    def __init__(self) -> None:
        self.moved = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.moved

    def time(self) -> float:
        return time.time() + self.moved

    def sleep(self, seconds: float) -> None:
        self.moved += seconds


class Trainers:
    """An executor whose trainers do what a test says; it notes what is asked of it."""

    def __init__(self) -> None:
        self.launched: list[RunSpec] = []
        self.asked: list[str] = []
        self.killed: list[str] = []
        self.alive = False  # left by an earlier daemon
        self.owned = False
        self.ended: Exit | None = None
        self.refusal: OSError | None = None

    def launch(self, spec: RunSpec) -> None:
        if self.refusal is not None:
            raise self.refusal
        begin_attempt(spec)
        self.launched.append(spec)
        self.ended = None

    def owns(self, run_dir: Path) -> bool:
        return self.owned

    def adopt(self, run_dir: Path) -> bool:
        return self.alive

    def poll(self, run_dir: Path) -> Exit | None:
        return self.ended

    def request_stop(self, run_dir: Path) -> None:
        self.asked.append(run_dir.name)

    def kill(self, run_dir: Path) -> None:
        self.killed.append(run_dir.name)
        self.ended = Exit(signal=9)

    def close(self) -> None:
        pass


class Rig:
    def __init__(self, root: Path, **tables: Any) -> None:
        base = root / "base"
        base.mkdir(parents=True)
        (base / "config.json").write_text(json.dumps({"hidden_size": 8, "num_hidden_layers": 1}))
        (base / "model.safetensors").write_bytes(b"weights")
        (base / "tokenizer.json").write_text("{}")
        queue = {"retry_seconds": 100.0, "min_free_bytes": 0, "stop_timeout": 10.0, **tables.pop("queue", {})}
        self.settings = Settings(
            root=root,
            **{
                "model": {"model_name_or_path": str(base)},
                "executor": {"command": ("sh",)},
                "gpu": {"device": "none"},
                "queue": queue,
                **tables,
            },
        )
        for folder in (self.settings.inbox_dir, self.settings.model_dir, self.settings.state_dir):
            folder.mkdir(parents=True)
        self.log, self.trainers, self.clock = Record(), Trainers(), Clock()
        self.store = JobStore(self.settings.state_dir / "queue.db")
        self.commands = JobStore(self.settings.state_dir / "queue.db")  # another process's
        self.scheduler = self.made()

    def made(self) -> Scheduler:
        probe = GpuProbe(lambda: ())
        return Scheduler(
            self.settings,
            self.store,
            self.trainers,
            archive=Archive(self.settings, self.store, self.log),
            hooks=Hooks(self.settings.hooks, self.log),
            gpu=GpuReservation(self.settings, probe),
            window=RunWindow(probe),
            in_hand=InHand(),
            log=self.log,
        )

    def add(self, job_id: str = "a", **fields: Any) -> Job:
        dataset = Dataset(name="a.jsonl", path="a.jsonl", size_bytes=1, rows=1, digest=job_id * 64, format="text")
        recipe = self.settings.recipe.model_dump(mode="json")
        values = {"state": JobState.QUEUED, "dataset": dataset, "recipe": recipe, **fields}
        return self.store.add(Job(id=job_id, name="a.jsonl", **values))

    def start(self, job_id: str = "a", **fields: Any) -> None:
        """Add a job and launch it."""
        self.add(job_id, **fields)
        self.scheduler.dispatch()
        assert self.job(job_id).state is JobState.RUNNING, self.scheduler.hold

    def job(self, job_id: str = "a") -> Job:
        return self.store.get(job_id)

    def folder(self, job_id: str = "a") -> Path:
        return run_dir_of(self.settings.state_dir, job_id)

    def report(self, *events: dict[str, Any], **progress: Any) -> None:
        """Write what a trainer reports."""
        with (self.folder() / EVENTS_NAME).open("a") as file:
            file.writelines(json.dumps(event) + "\n" for event in events)
        if progress:
            (self.folder() / PROGRESS_NAME).write_text(to_json(Progress(**{"phase": "training", **progress})))

    def end(self, result: RunResult | None = None, code: int = 0) -> None:
        """Have the trainer leave, with a result or none."""
        if result is not None:
            (self.folder() / RESULT_NAME).write_text(to_json(result))
        self.trainers.ended = Exit(code=code)
        self.scheduler.poll_run()

    def succeed(self) -> None:
        """Have the trainer leave with a finished adapter."""
        guard.write_metadata(self.settings.model_dir, make_metadata())
        folder = candidate(self.settings.model_dir, "candidate-a", b"1")
        self.end(
            RunResult(outcome=Outcome.SUCCEEDED, steps_planned=3, steps_run=3, candidate=str(folder), train_loss=1.0)
        )

    def move(self, seconds: float) -> None:
        """Let time pass, and look at the trainer."""
        self.clock.moved += seconds
        self.scheduler.poll_run()

    def command(self, **controls: Any) -> None:
        """Set controls as a command does."""
        for key, value in controls.items():
            self.commands.set_control(key, value)


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(tmp_path / "root", queue=getattr(request, "param", {}))
    monkeypatch.setattr(scheduler_module, "time", made.clock)
    yield made
    made.store.close()
    made.commands.close()


# -- launching


def test_the_next_job_is_launched_with_all_that_its_trainer_needs(rig: Rig) -> None:
    rig.start(force=True, overrides={"lora": {"r": 4}})
    rig.add("b")
    rig.scheduler.dispatch()
    (spec,) = rig.trainers.launched
    assert (spec.job_id, spec.attempt, spec.force, spec.overrides) == ("a", 1, True, {"lora": {"r": 4}})
    assert (spec.run_dir, spec.model_dir) == (str(rig.folder()), str(rig.settings.model_dir))
    assert (spec.gpu, spec.key_file, spec.recipe) == (None, None, rig.job().recipe)
    assert rig.job("b").state is JobState.QUEUED
    assert [data["job"] for data in rig.log.events("job.started")] == ["a"]


def test_a_trainer_that_cannot_be_started_is_tried_again_later(rig: Rig) -> None:
    rig.trainers.refusal = OSError(errno.ENOMEM, "Cannot allocate memory")
    rig.add()
    rig.scheduler.dispatch()
    assert (rig.job().state, rig.job().attempt, rig.job().failure) == (JobState.QUEUED, 1, FailureKind.INTERNAL)
    assert rig.scheduler.run is None
    waits = rig.scheduler.next_start_seconds()
    assert waits is not None
    assert 90 < waits <= 100
    rig.scheduler.dispatch()
    assert rig.job().attempt == 1
    rig.trainers.refusal = None
    rig.clock.moved += 101
    assert rig.scheduler.next_start_seconds() is None
    rig.scheduler.dispatch()
    assert (rig.job().state, rig.job().attempt) == (JobState.RUNNING, 2)


def test_a_disk_that_is_full_at_the_launch_is_waited_for(rig: Rig) -> None:
    rig.trainers.refusal = OSError(errno.ENOSPC, "No space left on device")
    rig.add()
    rig.scheduler.dispatch()
    assert (rig.job().failure, rig.job().attempts_without_progress) == (FailureKind.NO_SPACE, 0)


@pytest.mark.parametrize("fields", [{"dataset": None}, {"recipe": {"training": {"learning_rate": "fast"}}}])
def test_a_job_that_cannot_be_read_fails_and_holds_nobody(rig: Rig, fields: dict[str, Any]) -> None:
    rig.add(**fields)
    rig.scheduler.dispatch()
    assert (rig.job().state, rig.job().failure) == (JobState.FAILED, FailureKind.CONFIG)
    assert "dropforge retry a" in rig.job().reason
    rig.start("b")


def test_a_hold_is_told_once_and_goes_by_itself(rig: Rig) -> None:
    rig.add()
    program = rig.settings.executor.command
    rig.scheduler.settings = rig.settings.model_copy(
        update={"executor": rig.settings.executor.model_copy(update={"command": ("/no/such/program",)})}
    )
    for _ in range(2):
        rig.scheduler.dispatch()
    assert rig.scheduler.hold is not None
    assert (rig.scheduler.hold.kind, rig.job().state) == (HoldKind.TRAINER, JobState.QUEUED)
    assert len(rig.log.events("queue.held")) == 1
    assert program == ("sh",)
    rig.scheduler.settings = rig.settings
    rig.scheduler.dispatch()
    assert rig.log.events("queue.released") == [{"kind": "trainer"}]
    assert rig.job().state is JobState.RUNNING


def test_a_hold_ends_with_the_last_job_that_waited(rig: Rig) -> None:
    rig.scheduler.suspend(Hold(kind=HoldKind.STORE, reason="why"))
    rig.scheduler.dispatch()
    assert rig.scheduler.hold is None


# -- requests


def test_a_pause_after_the_job_lets_it_run_and_launches_no_other(rig: Rig) -> None:
    rig.start()
    rig.add("b")
    assert rig.scheduler.poll_control()
    assert not rig.scheduler.poll_control()
    rig.command(**{PAUSED_KEY: {"mode": "after_job", "at": "now"}})
    assert rig.scheduler.poll_control()
    assert rig.trainers.asked == []
    rig.end(INTERRUPTED, code=75)
    rig.scheduler.suspend(Hold(kind=HoldKind.STORE, reason="why"))
    rig.scheduler.unsuspend()
    rig.scheduler.hold_contradicted()
    rig.clock.moved += 1000
    rig.scheduler.dispatch()
    assert rig.scheduler.hold is not None
    assert rig.scheduler.hold.kind is HoldKind.PAUSED
    assert len(rig.trainers.launched) == 1
    rig.command(**{PAUSED_KEY: None})
    rig.scheduler.poll_control()
    assert rig.scheduler.hold is None
    rig.scheduler.dispatch()
    assert len(rig.trainers.launched) == 2


def test_a_pause_now_asks_the_trainer_to_leave_and_counts_no_attempt(rig: Rig) -> None:
    rig.start()
    rig.command(**{PAUSED_KEY: {"mode": "now", "at": "now"}})
    rig.scheduler.poll_control()
    rig.command(other=1)
    rig.scheduler.poll_control()
    assert rig.trainers.asked == ["a"]
    rig.end(INTERRUPTED, code=75)
    assert (rig.job().state, rig.job().attempt, rig.job().failure) == (JobState.QUEUED, 0, None)


def test_a_cancellation_is_heard_once_and_nothing_replaces_it(rig: Rig) -> None:
    rig.start()
    rig.scheduler.request_stop(StopReason.PAUSE)
    rig.commands.update("a", cancel_request="cancel")
    rig.scheduler.poll_control()
    rig.scheduler.request_stop(StopReason.STOP)
    assert rig.trainers.asked == ["a"]
    rig.end(INTERRUPTED, code=75)
    assert (rig.job().state, rig.job().reason) == (JobState.CANCELLED, StopReason.CANCEL.value)
    assert rig.scheduler.run is None


def test_a_later_reason_replaces_the_first(rig: Rig) -> None:
    rig.start()
    rig.scheduler.request_stop(StopReason.STALL)
    rig.scheduler.request_stop(StopReason.STOP)
    rig.end(INTERRUPTED, code=75)
    assert (rig.job().state, rig.job().attempt, rig.job().reason) == (
        JobState.QUEUED,
        0,
        "interrupted: the daemon stops",
    )


def test_a_job_cancelled_while_its_trainer_was_leaving_is_cancelled(rig: Rig) -> None:
    rig.start()
    rig.scheduler.request_stop(StopReason.STOP)
    rig.commands.update("a", cancel_request="cancel")
    rig.end(INTERRUPTED, code=75)
    assert rig.job().state is JobState.CANCELLED


@pytest.mark.parametrize(("at", "asked"), [("9999-01-01T00:00:00Z", ["a"]), ("2000-01-01T00:00:00Z", [])])
def test_what_is_forgotten_while_a_run_may_rehearse_it_ends_the_run(rig: Rig, at: str, asked: list[str]) -> None:
    rig.start()
    rig.command(**{FORGOTTEN_KEY: {"at": at, "digest": "d"}})
    rig.scheduler.poll_control()
    assert rig.trainers.asked == asked


def test_nothing_is_asked_of_nobody(rig: Rig) -> None:
    rig.scheduler.request_stop(StopReason.STOP)
    rig.scheduler.kill()
    rig.scheduler.poll_run()
    rig.command(**{PAUSED_KEY: {"mode": "now", "at": "now"}})
    rig.scheduler.poll_control()
    assert (rig.trainers.asked, rig.trainers.killed) == ([], [])


# -- limits


@pytest.mark.parametrize("rig", [{"job_timeout": 100.0, "stall_timeout": 0.0}], indirect=True)
def test_a_job_over_its_time_is_asked_then_killed_and_has_failed(rig: Rig) -> None:
    rig.start()
    rig.move(90)
    assert rig.trainers.asked == []
    rig.move(11)
    assert (rig.trainers.asked, rig.trainers.killed) == (["a"], [])
    rig.move(5)
    assert rig.trainers.killed == []
    rig.move(6)
    assert rig.trainers.killed == ["a"]
    (told,) = rig.log.events("trainer.ended")
    assert 10 < told["waited_seconds"] < 12
    rig.trainers.ended = None  # it is not gone yet
    rig.move(100)
    assert rig.trainers.killed == ["a"]
    rig.end(code=1)
    assert (rig.job().state, rig.job().failure) == (JobState.FAILED, FailureKind.STALLED)
    assert "job_timeout" in rig.job().reason


@pytest.mark.parametrize("rig", [{"job_timeout": 0.0, "stall_timeout": 0.0}], indirect=True)
def test_without_limits_a_job_may_take_any_time(rig: Rig) -> None:
    rig.start()
    rig.move(1e6)
    assert rig.trainers.asked == []


@pytest.mark.parametrize("rig", [{"stall_timeout": 100.0}], indirect=True)
def test_a_trainer_that_reports_is_not_stalled_and_one_that_repeats_itself_is(rig: Rig) -> None:
    rig.start()
    rig.clock.moved += 90
    rig.report(step=1)
    rig.move(0)
    rig.clock.moved += 90
    rig.report({"event": "step"})
    rig.move(0)
    rig.move(90)
    assert rig.trainers.asked == []
    rig.report(step=1)
    rig.move(20)
    assert rig.trainers.asked == ["a"]
    rig.end(INTERRUPTED, code=75)
    assert (rig.job().failure, rig.job().attempts_without_progress) == (FailureKind.STALLED, 1)


@pytest.mark.parametrize("rig", [{"stall_timeout": 100.0, "job_timeout": 1e5}], indirect=True)
def test_what_cannot_be_recorded_for_a_while_is_no_stall(rig: Rig) -> None:
    rig.start()
    rig.scheduler.suspend(Hold(kind=HoldKind.STORE, reason="why"))
    assert rig.scheduler.hold is not None
    rig.move(1000)
    rig.scheduler.unsuspend()
    assert rig.scheduler.hold is None
    rig.move(90)
    assert rig.trainers.asked == []
    rig.move(20)
    assert rig.trainers.asked == ["a"]
    rig.scheduler.suspend(Hold(kind=HoldKind.STORE, reason="why"))
    rig.move(20)  # it was asked before: that limit counts
    assert rig.trainers.killed == ["a"]


# -- what it reports


def test_what_a_trainer_reports_reaches_log_and_store(rig: Rig) -> None:
    """A run may begin below an earlier attempt; odd numbers of a trainer do no harm."""
    rig.start(max_step=50)
    assert rig.job().step_at_launch == 50
    rig.report({"event": "run.started", "start_step": 10})
    rig.move(0)
    assert (rig.job().max_step, rig.job().step_at_launch) == (10, 10)
    rig.report(
        {"event": "checkpoint.sealed", "step": 20},
        {"event": "checkpoint.sealed", "step": 15},
        {"event": "checkpoint.sealed", "step": "many"},
        {"event": "x", "job": "forged"},
    )
    rig.move(0)
    assert rig.job().max_step == 20
    assert [data["job"] for data in rig.log.events("x")] == ["a"]
    assert len(rig.log.events("checkpoint.sealed")) == 3
    rig.trainers.ended = Exit(signal=9)
    rig.report({"event": "checkpoint.sealed", "step": 30})  # its last words
    rig.move(0)
    assert (rig.job().max_step, rig.job().attempts_without_progress, rig.job().state) == (30, 0, JobState.QUEUED)


def test_a_lost_trainer_backs_off(rig: Rig) -> None:
    rig.start()
    rig.end(code=1)
    job = rig.job()
    assert (job.state, job.attempt, job.attempts_without_progress, job.failure) == (
        JobState.QUEUED, 1, 1, FailureKind.LOST,
    )  # fmt: skip
    assert job.not_before > time.time()


def test_what_concerns_every_job_holds_the_queue_until_it_is_another_and_counts_no_attempt(rig: Rig) -> None:
    rig.start()
    rig.end(RunResult(outcome=Outcome.FAILED, failure=FailureKind.BASE, message="it is broken", hint="mend it"), code=1)
    assert (rig.job().state, rig.job().attempt, rig.job().failure) == (JobState.QUEUED, 0, FailureKind.BASE)
    rig.scheduler.dispatch()
    assert rig.scheduler.hold is not None
    assert (rig.scheduler.hold.kind, rig.scheduler.hold.reason) == (HoldKind.BASE, "it is broken; mend it")
    (rig.settings.root / "base" / "model.safetensors").write_bytes(b"other weights")
    rig.scheduler.dispatch()
    assert (rig.job().state, rig.job().attempt) == (JobState.RUNNING, 1)


# -- promotion


def test_a_finished_adapter_becomes_the_current_version(rig: Rig) -> None:
    rig.start()
    rig.succeed()
    assert (rig.job().state, rig.job().version) == (JobState.SUCCEEDED, "0001")
    version = versions.current_version(rig.settings.model_dir)
    assert version is not None
    assert (version.name, version.record["job"], version.record["steps"]) == ("0001", "a", 3)
    assert [data["version"] for data in rig.log.events("version.promoted")] == ["0001"]
    metadata = guard.read_metadata(rig.settings.model_dir).run
    assert metadata is not None
    assert metadata.finished == "0001"  # what the run left behind is not resumed from
    assert rig.scheduler.run is None


def fail_promotions(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[int]:
    """Have promotions fail; returns a list that grows with each."""
    tried: list[int] = []

    def promote(*_: Any) -> versions.Version:
        tried.append(1)
        raise error

    monkeypatch.setattr(versions, "promote_result", promote)
    return tried


def test_a_promotion_that_fails_is_tried_again_alone_and_not_for_ever(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = fail_promotions(monkeypatch, OSError(errno.EIO, "Input/output error"))
    rig.start()
    rig.succeed()
    run = rig.scheduler.run
    assert run is not None
    assert "cannot be promoted yet" in run.waiting_for
    rig.move(90)
    assert len(tried) == 1
    rig.move(11)
    assert (len(tried), rig.job().state) == (2, JobState.RUNNING)
    rig.move(101)
    assert (len(tried), rig.job().state, rig.job().failure) == (3, JobState.FAILED, FailureKind.INTERNAL)
    assert "could not be promoted: [Errno 5] Input/output error" in rig.job().reason
    assert len(rig.trainers.launched) == 1


def test_a_full_disk_is_no_failed_promotion(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = fail_promotions(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    rig.start()
    rig.succeed()
    for _ in range(5):
        rig.move(101)
    assert (len(tried), rig.job().state) == (6, JobState.RUNNING)
    monkeypatch.undo()
    monkeypatch.setattr(scheduler_module, "time", rig.clock)
    rig.move(101)
    assert (rig.job().state, rig.job().version) == (JobState.SUCCEEDED, "0001")


def test_a_job_whose_promotion_waits_can_be_cancelled_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_promotions(monkeypatch, OSError(errno.EIO, "Input/output error"))
    rig.start()
    rig.succeed()
    rig.commands.update("a", cancel_request="cancel")
    rig.scheduler.poll_control()
    rig.move(0)
    assert rig.job().state is JobState.CANCELLED


def test_a_stop_leaves_a_promotion_that_waits_to_the_next_daemon(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_promotions(patch, OSError(errno.EIO, "Input/output error"))
        rig.start()
        rig.succeed()
    rig.scheduler.request_stop(StopReason.STOP)
    assert rig.scheduler.run is None
    assert (rig.job().state, rig.trainers.asked) == (JobState.RUNNING, [])
    rig.scheduler = rig.made()
    rig.scheduler.recover()
    assert (rig.job().state, rig.job().version) == (JobState.SUCCEEDED, "0001")


def test_an_adapter_that_is_lost_is_made_again(rig: Rig) -> None:
    rig.start()
    guard.write_metadata(rig.settings.model_dir, make_metadata())
    rig.end(RunResult(outcome=Outcome.SUCCEEDED, steps_planned=3, steps_run=3, candidate=str(rig.settings.root / "no")))
    assert (rig.job().state, rig.job().failure) == (JobState.QUEUED, FailureKind.LOST)
    assert "the finished adapter is lost" in rig.job().reason


# -- recovery


def left_running(rig: Rig, **fields: Any) -> None:
    """A job that an earlier daemon left running, at its second attempt."""
    rig.add(**{"state": JobState.RUNNING, "attempt": 2, "started_at": utc_now(), **fields})
    rig.folder().mkdir(parents=True)


def test_a_living_trainer_is_adopted_and_asked_to_leave(rig: Rig) -> None:
    left_running(rig)
    rig.report({"event": "checkpoint.sealed", "step": 7})
    rig.trainers.alive = True
    rig.scheduler.recover()
    assert rig.trainers.asked == ["a"]
    assert rig.job().max_step == 7
    rig.end(INTERRUPTED, code=75)
    assert (rig.job().state, rig.job().failure) == (JobState.QUEUED, None)
    assert rig.job().reason == "interrupted: its daemon was gone"


def test_a_trainer_of_this_daemon_goes_on(rig: Rig) -> None:
    left_running(rig)
    rig.trainers.owned = True
    rig.scheduler.recover()
    assert (rig.trainers.asked, rig.job().state) == ([], JobState.RUNNING)
    assert rig.scheduler.run is not None


@pytest.mark.parametrize(
    ("fields", "result", "state", "failure"),
    [
        ({}, None, JobState.QUEUED, FailureKind.LOST),
        ({}, INTERRUPTED, JobState.QUEUED, None),
        ({"cancel_request": "cancel"}, None, JobState.CANCELLED, None),
        ({"max_step": 9}, None, JobState.QUEUED, FailureKind.LOST),
    ],
)
def test_a_dead_trainer_is_finished(
    rig: Rig, fields: dict[str, Any], result: RunResult | None, state: JobState, failure: FailureKind | None
) -> None:
    left_running(rig, **fields)
    if result is not None:
        (rig.folder() / RESULT_NAME).write_text(to_json(result))
    rig.scheduler.recover()
    assert (rig.job().state, rig.job().failure) == (state, failure)
    assert rig.job().max_step == fields.get("max_step", 0)
    assert (rig.scheduler.run, rig.trainers.asked) == (None, [])


# -- giving up


def test_a_job_that_cannot_be_handled_fails_with_its_trainer(rig: Rig) -> None:
    rig.start()
    rig.add("b")
    rig.scheduler.quarantine("b", "why")
    assert (rig.trainers.killed, rig.job("b").state) == ([], JobState.FAILED)
    rig.scheduler.quarantine("a", "why")
    assert rig.trainers.killed == ["a"]
    assert (rig.job().state, rig.job().failure, rig.job().reason) == (JobState.FAILED, FailureKind.INTERNAL, "why")
    assert rig.scheduler.run is None
    rig.scheduler.quarantine("a", "again")
    rig.scheduler.quarantine("nobody", "why")
    assert rig.job().reason == "why"
    assert len(rig.log.events("job.quarantined")) == 2


def test_a_trainer_of_an_earlier_daemon_is_ended_with_its_job(rig: Rig) -> None:
    left_running(rig)
    rig.scheduler.end_trainer(rig.job())
    assert rig.trainers.killed == []
    rig.trainers.alive = True
    rig.scheduler.end_trainer(rig.job())
    assert rig.trainers.killed == ["a"]


def test_killing_what_was_asked_to_leave_counts_no_attempt(rig: Rig) -> None:
    rig.start()
    rig.scheduler.request_stop(StopReason.STOP)
    rig.scheduler.kill()
    assert rig.trainers.killed == ["a"]
    rig.scheduler.poll_run()
    assert (rig.job().state, rig.job().attempt, rig.job().failure) == (JobState.QUEUED, 0, None)
