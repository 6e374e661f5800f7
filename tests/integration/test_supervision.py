"""One job's way from the inbox to its end, with a quick engine in place of torch: everything else is real."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from daemon.job import FailureKind, JobState
from daemon.run_dir import run_dir_of
from daemon.store import JobStore
from daemon.versions import list_versions
from tests.support.root import Root, wait_until
from tests.support.sound import assert_sound

MakeRoot = Callable[..., Root]
ONE_ROW_A_STEP = {"training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 500}}


def texts(count: int, word: str = "row") -> list[dict[str, str]]:
    return [{"text": f"{word} {number}"} for number in range(count)]


def test_a_larger_finished_run_on_disk_takes_no_step_from_the_next_dataset(make_root: MakeRoot) -> None:
    """4,000 steps of A lie there; B has 2,487 to go, and runs 2,487."""
    root = make_root(behaviour={}, tables=ONE_ROW_A_STEP)
    root.start()
    root.drop("a.jsonl", texts(4000, "a"))
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED, root.errors()
    assert (root.settings.model_dir / "checkpoint-4000").is_dir()
    root.drop("b.jsonl", texts(2487, "b"))
    job = root.finished("b.jsonl")
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    assert (job.result.start_step, job.result.steps_run, job.result.steps_planned) == (0, 2487, 2487)
    assert job.result.cleared == 2
    assert any("Dataset changed: a.jsonl → b.jsonl" in reason for reason in job.result.reasons)
    cleared = [event for event in root.events("guard.checkpoints_cleared") if event["job"] == job.id]
    assert cleared
    assert cleared[0]["cleared"] == 2
    assert root.stop() == 0
    assert_sound(root)


def test_an_unfinished_run_is_not_continued_by_another_dataset(make_root: MakeRoot) -> None:
    root = make_root(behaviour={"1": {"die_at": 1200}}, tables={**ONE_ROW_A_STEP, "queue": {"retry_seconds": 3600.0}})
    root.start()
    root.drop("a.jsonl", texts(2000, "a"))
    lost = wait_until(
        lambda: (job := root.job("a.jsonl")) and job.attempt == 1 and job.state is JobState.QUEUED and job
    )
    assert lost
    root.behave({})
    root.drop("b.jsonl", texts(300, "b"))
    assert root.run("cancel", lost.id).returncode == 0  # until then b waits for it
    job = root.finished("b.jsonl")
    assert job.result is not None
    assert (job.result.start_step, job.result.steps_run, job.result.cleared) == (0, 300, 2)


def test_a_killed_trainer_comes_back_and_resumes(make_root: MakeRoot) -> None:
    root = make_root(behaviour={"1": {"die_at": 1700}}, tables=ONE_ROW_A_STEP)
    whole = make_root("whole", behaviour={}, tables=ONE_ROW_A_STEP)
    for each in (root, whole):
        each.start()
        each.drop("a.jsonl", texts(2000))
    job, expected = root.finished("a.jsonl"), whole.finished("a.jsonl")
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
    assert job.result is not None
    assert job.result.resumed_from == "checkpoint-1500"
    weights = [
        (each.settings.model_dir / "latest" / "adapter_model.safetensors").read_bytes() for each in (root, whole)
    ]
    assert weights[0] == weights[1]
    assert expected.attempt == 1
    moves = [(event["event"], event.get("attempt")) for event in root.log() if event["event"].startswith("job.")]
    assert moves == [
        ("job.queued", None),
        ("job.started", 1),
        ("job.requeued", 1),
        ("job.started", 2),
        ("job.succeeded", 2),
    ]


def test_a_trainer_that_only_claims_success_is_not_believed(make_root: MakeRoot) -> None:
    root = make_root(behaviour={"*": {"lie_about_steps": 1}}, tables=ONE_ROW_A_STEP)
    root.drop("a.jsonl", texts(10))
    assert root.run("run", "--once").returncode == 1
    job = root.job("a.jsonl")
    assert job is not None
    assert (job.state, job.failure) == (JobState.FAILED, FailureKind.INTERNAL)
    assert "9 of 10 planned steps" in job.reason
    assert list_versions(root.settings.model_dir) == []
    assert_sound(root)


def test_a_trainer_that_never_gets_anywhere_fails_the_job_and_the_next_one_trains(make_root: MakeRoot) -> None:
    root = make_root(behaviour={"*": {"die_at": 1}}, tables=ONE_ROW_A_STEP)
    root.start()
    root.drop("a.jsonl", texts(10, "a"))
    job = root.finished("a.jsonl")
    assert (job.state, job.failure, job.attempt) == (JobState.FAILED, FailureKind.LOST, 3)
    assert "SIGKILL" in job.reason
    root.behave({})
    root.drop("b.jsonl", texts(10, "b"))
    assert root.finished("b.jsonl").state is JobState.SUCCEEDED
    assert_sound(root)


def test_odd_events_of_a_trainer_do_no_harm_to_the_daemon(make_root: MakeRoot) -> None:
    """Those of another program behind `[executor] command`, or of one that is not as old as the daemon."""
    odd = [
        *({"event": "checkpoint.sealed", "step": step} for step in (None, "x", float("inf"), [])),
        *({"event": "run.stepped", "step": step, "loss": step} for step in (None, "x", float("inf"))),
        {"event": "run.odd", "self": 1, "args": 2, "level": 3, "timestamp": 4, "exc_info": True, "stack_info": 1},
        [1],
    ]
    root = make_root(behaviour={"*": {"events": odd}}, tables=ONE_ROW_A_STEP)
    root.start()
    root.drop("a.jsonl", texts(3))
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED
    assert root.stop() == 0
    assert root.events("run.odd")


def test_a_recipe_that_cannot_be_read_fails_its_job_and_the_next_one_trains(make_root: MakeRoot) -> None:
    """One that was frozen by a version with other settings, while the job waited for its turn."""
    root = make_root(behaviour={}, tables=ONE_ROW_A_STEP)
    root.start()
    assert root.run("pause").returncode == 0
    root.drop("a.jsonl", texts(3, "a"))
    root.drop("b.jsonl", texts(3, "b"))
    wait_until(lambda: all((job := root.job(name)) and job.recipe for name in ("a.jsonl", "b.jsonl")))
    assert root.stop() == 0
    job = root.job("a.jsonl")
    assert job is not None
    assert job.recipe is not None
    with closing(JobStore(root.settings.store_path)) as store:
        store.update(job.id, recipe={**job.recipe, "training": {**job.recipe["training"], "rows_a_step": 7}})
    root.start()
    assert root.run("resume").returncode == 0
    failed = root.finished("a.jsonl")
    assert (failed.state, failed.failure, failed.attempt) == (JobState.FAILED, FailureKind.CONFIG, 1)
    assert "rows_a_step" in failed.reason
    assert f"dropforge retry {job.id}" in failed.reason
    assert root.finished("b.jsonl").state is JobState.SUCCEEDED


@pytest.mark.parametrize("kind", [FailureKind.BAD_DATA, FailureKind.DIVERGED, FailureKind.CONFIG])
def test_what_would_fail_again_is_tried_once_and_reported(make_root: MakeRoot, kind: FailureKind) -> None:
    root = make_root(behaviour={"*": {"fail": {"kind": kind, "message": "told why"}}})
    root.drop("a.jsonl", texts(20))
    assert root.run("run", "--once").returncode == 1
    job = root.job("a.jsonl")
    assert job is not None
    assert (job.state, job.failure, job.attempt, job.reason) == (JobState.FAILED, kind, 1, "told why")
    report = (root.settings.inbox_dir / "failed" / job.id / "report.txt").read_text()
    assert "told why" in report
    assert "a hint" in report
    assert kind in report
    assert str(run_dir_of(root.settings.state_dir, job.id) / "trainer.log") in report
    assert f"dropforge retry {job.id}" in report
    assert_sound(root)


def test_the_daemon_killed_in_mid_run_is_followed_by_one_that_finishes(make_root: MakeRoot) -> None:
    root = make_root(
        behaviour={"*": {"step_seconds": 0.005}},
        tables=ONE_ROW_A_STEP | {"training": {**ONE_ROW_A_STEP["training"], "save_steps": 50}},
    )
    root.start()
    root.drop("a.jsonl", texts(400))
    job = root.running("a.jsonl", step=50)
    trainer = root.trainer(job)
    root.kill()
    wait_until(lambda: not trainer.alive, what="the trainer to follow its daemon")
    root.behave({})
    root.start()
    done = root.finished("a.jsonl")
    assert done.state is JobState.SUCCEEDED, root.errors()
    assert done.result is not None
    assert done.result.start_step >= 50
    assert done.result.steps_run == 400
    assert root.stop() == 0
    assert_sound(root)


def test_a_trainer_that_outlives_its_daemon_is_ended_not_doubled(make_root: MakeRoot) -> None:
    """One that ignores SIGTERM, its death signal included, is recognised by pid, start time and boot, and ended."""
    root = make_root(
        behaviour={"*": {"step_seconds": 0.01, "ignore_terminate": True}},
        tables={**ONE_ROW_A_STEP, "queue": {"stop_timeout": 0.5}},
    )
    root.start()
    root.drop("a.jsonl", texts(20_000))
    job = root.running("a.jsonl")
    wait_until(lambda: (status := root.status()) and status["job"] and status["job"]["step"] > 3)
    trainer = root.trainer(job)
    root.kill()
    assert trainer.alive
    root.configure(training={"max_steps": 10})
    root.behave({})
    root.start()
    wait_until(lambda: not trainer.alive, what="the orphan to be ended")
    assert [event["job"] for event in root.events("trainer.adopted")] == [job.id]
    again = wait_until(lambda: (found := root.job("a.jsonl")) and found.attempt == 2 and found, what="attempt 2")
    assert again
    assert again.attempts_without_progress == 0


def test_stop_ends_a_trainer_that_does_not_listen(make_root: MakeRoot) -> None:
    root = make_root(
        behaviour={"*": {"step_seconds": 0.01, "ignore_terminate": True}},
        tables={**ONE_ROW_A_STEP, "queue": {"stop_timeout": 0.5}},
    )
    root.start()
    root.drop("a.jsonl", texts(20_000))
    job = root.running("a.jsonl")
    wait_until(lambda: (status := root.status()) and status["job"] and status["job"]["step"] > 3)
    trainer = root.trainer(job)
    assert root.stop() == 0
    assert not trainer.alive
    stopped = root.job("a.jsonl")
    assert stopped is not None
    assert (stopped.state, stopped.attempts_without_progress) == (JobState.QUEUED, 0)
    assert_sound(root)


def test_a_stop_does_not_wait_for_a_promotion_that_cannot_be_made(make_root: MakeRoot) -> None:
    """The adapter is finished; the next daemon promotes it, and nothing is trained again."""
    root = make_root(
        behaviour={"*": {"step_seconds": 0.02}}, tables={**ONE_ROW_A_STEP, "queue": {"retry_seconds": 3600.0}}
    )
    root.start()
    root.drop("a.jsonl", texts(40))
    root.running("a.jsonl")
    in_the_way = root.settings.model_dir / "versions"
    in_the_way.write_text("a file where a folder has to be")
    wait_until(lambda: root.events("version.not_promoted"))
    status = wait_until(lambda: (now := root.status()) and now["status"] == "waiting" and now)
    assert status
    assert "cannot be promoted yet" in status["reason"]
    assert root.stop(timeout=15) == 0
    in_the_way.unlink()
    root.start()
    done = root.finished("a.jsonl")
    assert (done.state, done.attempt) == (JobState.SUCCEEDED, 1)
    assert_sound(root)


def test_an_adapter_that_is_not_what_the_run_wrote_is_made_again_from_the_last_checkpoint(make_root: MakeRoot) -> None:
    """Such as one that a power cut left empty: it is never promoted, and no step is taken twice."""
    root = make_root(behaviour={"1": {"spoil_candidate": True}}, tables=ONE_ROW_A_STEP)
    root.start()
    root.drop("a.jsonl", texts(20))
    done = root.finished("a.jsonl")
    assert (done.state, done.attempt, done.version) == (JobState.SUCCEEDED, 2, "0001")
    assert done.result is not None
    assert done.result.start_step == done.result.steps_planned == 20
    assert "is not the file that the run wrote" in root.events("version.not_promoted")[0]["error"]
    assert root.stop() == 0
    assert_sound(root)


def test_a_job_that_is_being_cancelled_stays_cancelled_when_the_daemon_stops_meanwhile(
    make_root: MakeRoot, tmp_path: Path
) -> None:
    """The trainer leaves after the daemon was asked to stop: one that lives on takes the returned file as a new job."""
    stopping = tmp_path / "stopping"
    root = make_root(behaviour={"*": {"step_seconds": 0.02, "seal_after": str(stopping)}}, tables=ONE_ROW_A_STEP)
    daemon = root.start()
    root.drop("a.jsonl", texts(3000))
    job = root.running("a.jsonl")
    assert root.run("cancel", job.id, "--return").returncode == 0
    wait_until(lambda: root.events("trainer.asked_to_leave"))
    daemon.terminate()
    wait_until(lambda: root.events("daemon.stopping"))
    stopping.touch()
    assert daemon.wait(60) == 0
    cancelled = root.job("a.jsonl")
    assert cancelled is not None
    assert cancelled.state is JobState.CANCELLED
    assert (root.settings.inbox_dir / "a.jsonl").exists()
    assert_sound(root)


def test_one_job_runs_at_a_time_in_order_of_priority_and_arrival(make_root: MakeRoot) -> None:
    root = make_root(behaviour={"*": {"step_seconds": 0.02}}, tables=ONE_ROW_A_STEP)
    root.start()
    root.drop("first.jsonl", texts(40, "first"))
    root.running("first.jsonl")
    for name, folder in (("second", ""), ("low", "low"), ("high", "high")):
        root.drop(f"{name}.jsonl", texts(5, name), folder=folder)
        wait_until(lambda name=name: root.job(f"{name}.jsonl"), what=name)  # type: ignore[misc]
    assert all(
        root.finished(f"{name}.jsonl").state is JobState.SUCCEEDED for name in ("first", "second", "low", "high")
    )
    started = [event["dataset"] for event in root.events("job.started")]
    assert started == ["first.jsonl", "high.jsonl", "second.jsonl", "low.jsonl"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", ["0 lines"]),
        (b'{"text": "fine"}\n{"text": "cut', ["line 2"]),
        (b'{"text": "fine"}\n{"something": "else"}\n', ["line 2", "text"]),
        (b'{"nothing": "usable"}\n', ["line 1", "nothing"]),
        (b"{not json at all}\n", ["line 1"]),
        (b"not json at all\n", ["plain text"]),
    ],
    ids=["empty", "truncated", "deviating row", "no usable key", "no json", "plain text"],
)
def test_bad_data_is_refused_with_line_and_reason_and_the_next_file_trains(
    make_root: MakeRoot, content: bytes, told: list[str]
) -> None:
    root = make_root(behaviour={}, tables=ONE_ROW_A_STEP)
    daemon = root.start()
    root.drop("bad.jsonl", content)
    job = root.finished("bad.jsonl")
    assert job.state is JobState.REJECTED
    folder = root.settings.inbox_dir / "failed" / job.id
    wait_until((folder / "report.txt").exists, what="a report")
    report = (folder / "report.txt").read_text()
    for word in told:
        assert word in report
    assert "Traceback" not in report
    assert json.loads((folder / "report.json").read_text())
    assert (folder / "bad.jsonl").read_bytes() == content
    root.drop("good.jsonl", texts(3))
    assert root.finished("good.jsonl").state is JobState.SUCCEEDED
    assert daemon.poll() is None
    assert_sound(root)


def test_a_second_daemon_leaves_with_5_and_names_the_first(make_root: MakeRoot) -> None:
    root = make_root(behaviour={})
    first = root.start()
    second = root.run("run")
    assert second.returncode == 5
    assert str(first.pid) in second.stderr
    assert "Traceback" not in second.stderr
    assert first.poll() is None


def test_a_dead_daemon_is_told_from_a_living_one(make_root: MakeRoot) -> None:
    root = make_root(behaviour={})
    root.start()
    assert root.status()["alive"]  # type: ignore[index]
    assert "idle" in root.run("status").stdout
    root.kill()
    assert root.status()["status"] == "idle"  # type: ignore[index]  # what the file claims
    assert not root.status()["alive"]  # type: ignore[index]
    assert "dead" in root.run("status").stdout


def test_the_status_file_is_whole_and_its_keys_are_there_in_every_state(make_root: MakeRoot) -> None:
    root = make_root(behaviour={"*": {"step_seconds": 0.002}}, tables=ONE_ROW_A_STEP)
    root.start()
    root.drop("a.jsonl", texts(300))
    root.drop("bad.jsonl", b"x")
    found: set[str] = set()

    def look() -> dict[str, Any]:
        status = json.loads(root.settings.status_path.read_bytes())
        assert {
            "schema_version", "status", "reason", "pid", "timestamp", "watch_mode", "queue", "job", "recent", "model",
            "warnings",
        } <= status.keys()  # fmt: skip
        found.add(status["status"])
        return dict(status)

    wait_until(lambda: look()["queue"].get("succeeded"))
    status = wait_until(lambda: (now := look())["status"] == "idle" and now)
    assert status
    assert found >= {"training", "idle"}
    assert status["model"]["version"] == "0001"
    assert {entry["state"] for entry in status["recent"]} == {"succeeded", "rejected"}
    root.stop()
    assert look()["status"] == "stopped"


def test_sigint_stops_like_sigterm(make_root: MakeRoot) -> None:
    root = make_root(behaviour={})
    daemon = root.start()
    os.kill(daemon.pid, signal.SIGINT)
    assert daemon.wait(30) == 0


def test_cleared_checkpoints_are_kept_as_long_as_policy_says(make_root: MakeRoot) -> None:
    root = make_root(behaviour={}, tables={**ONE_ROW_A_STEP, "guard": {"keep_cleared_sets": 2}})
    root.start()
    for name in ("a", "b", "c", "d", "e"):
        root.drop(f"{name}.jsonl", texts(5, name))
        assert root.finished(f"{name}.jsonl").state is JobState.SUCCEEDED
    sets = [path for path in (root.settings.model_dir / ".cleared").iterdir() if path.is_dir()]
    assert len(sets) == 2
    assert sum(len(event["sets"]) for event in root.events("guard.cleared_sets_purged")) == 2
