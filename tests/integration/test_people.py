"""What people ask of the queue, with and without a running daemon; holds; hooks; a reload."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daemon.job import FailureKind, Job, JobState
from daemon.processes import identify
from daemon.run_dir import run_dir_of
from tests.support.root import Root, children_of, wait_until
from tests.support.sound import assert_sound

MakeRoot = Callable[..., Root]
SLOW = {"*": {"step_seconds": 0.02}}
STEPS = {"training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 10}}


def texts(count: int, word: str = "row") -> list[dict[str, str]]:
    return [{"text": f"{word} {number}"} for number in range(count)]


def ask(root: Root, *arguments: str) -> str:
    done = root.run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def state(root: Root, name: str) -> JobState | None:
    job = root.job(name)
    return job.state if job else None


def test_a_paused_queue_seals_its_run_and_stays_paused_over_a_restart(make_root: MakeRoot) -> None:
    root = make_root(behaviour=SLOW, tables=STEPS)
    root.start()
    root.drop("a.jsonl", texts(300))
    root.running("a.jsonl", step=10)
    ask(root, "pause", "--reason", "the GPU is needed")
    wait_until(lambda: (status := root.status()) and status["status"] == "paused" and status, what="paused")
    job = root.job("a.jsonl")
    assert job is not None
    assert (job.state, job.attempts_without_progress, job.max_step >= 10) == (JobState.QUEUED, 0, True)
    assert root.stop() == 0
    root.start()
    status = wait_until(lambda: (now := root.status()) and now["status"] == "paused" and now)
    assert status
    assert "the GPU is needed" in status["reason"]
    assert state(root, "a.jsonl") is JobState.QUEUED
    root.behave({})
    ask(root, "resume")
    done = root.finished("a.jsonl")
    assert done.state is JobState.SUCCEEDED
    assert done.result is not None
    assert done.result.start_step >= 10
    assert_sound(root)


def test_pausing_after_the_job_lets_it_finish(make_root: MakeRoot) -> None:
    root = make_root(behaviour=SLOW, tables=STEPS)
    root.start()
    root.drop("a.jsonl", texts(60, "a"))
    root.running("a.jsonl")
    root.drop("b.jsonl", texts(10, "b"))
    ask(root, "pause", "--after-job")
    assert root.finished("a.jsonl").attempt == 1
    wait_until(lambda: (status := root.status()) and status["status"] == "paused")
    assert state(root, "b.jsonl") is JobState.QUEUED
    ask(root, "resume")
    assert root.finished("b.jsonl").state is JobState.SUCCEEDED


def test_a_queue_is_paused_without_a_daemon_too(make_root: MakeRoot) -> None:
    root = make_root(behaviour={}, tables=STEPS)
    root.start()
    root.stop()
    ask(root, "pause")
    root.drop("a.jsonl", texts(5))
    root.start()
    wait_until(lambda: state(root, "a.jsonl") is JobState.QUEUED)
    assert root.status()["status"] == "paused"  # type: ignore[index]
    assert "goes on" in ask(root, "resume")
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED


def test_cancelling_a_running_job_stops_it_and_the_next_one_runs(make_root: MakeRoot) -> None:
    root = make_root(behaviour=SLOW, tables=STEPS)
    root.start()
    root.drop("a.jsonl", texts(3000, "a"))
    job = root.running("a.jsonl")
    root.drop("b.jsonl", texts(5, "b"))
    ask(root, "cancel", job.id)
    cancelled = root.finished("a.jsonl")
    assert (cancelled.state, cancelled.reason) == (JobState.CANCELLED, "a person cancelled the job")
    assert root.finished("b.jsonl").state is JobState.SUCCEEDED
    assert (root.settings.inbox_dir / "failed" / job.id / "a.jsonl").exists()
    assert_sound(root)
    refused = root.run("cancel", job.id)
    assert (refused.returncode, "cancelled already" in refused.stderr) == (1, True)


def test_a_cancelled_file_can_go_back_to_the_inbox(make_root: MakeRoot) -> None:
    root = make_root(behaviour={}, tables=STEPS)
    root.start()
    ask(root, "pause")
    root.drop("a.jsonl", texts(5))
    wait_until(lambda: state(root, "a.jsonl") is JobState.QUEUED)
    root.stop()
    first = root.job("a.jsonl")
    assert first is not None
    ask(root, "cancel", first.id, "--return")
    assert (root.settings.inbox_dir / "a.jsonl").exists()
    root.start()
    ask(root, "resume")
    wait_until(lambda: (job := root.job("a.jsonl")) and job.id != first.id)
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED


def test_a_retry_checks_and_trains_under_the_settings_of_now(make_root: MakeRoot) -> None:
    root = make_root(behaviour={"*": {"fail": {"kind": "config", "message": "wrong shape"}}}, tables=STEPS)
    root.start()
    root.drop("a.jsonl", texts(12))
    job = root.finished("a.jsonl")
    assert job.state is JobState.FAILED
    root.behave({})
    root.configure(training={"num_train_epochs": 2.0})
    os.kill(root.start_pid, signal.SIGHUP)
    wait_until(lambda: root.events("daemon.reloaded"))
    ask(root, "retry", job.id)
    done = root.finished("a.jsonl")
    assert done.state is JobState.SUCCEEDED
    assert done.id == job.id
    assert done.result is not None
    assert done.result.steps_planned == 24
    assert_sound(root)
    assert "succeeded" in root.run("retry", job.id).stderr


def test_a_rejected_file_that_was_mended_in_place_can_be_retried(make_root: MakeRoot) -> None:
    root = make_root(behaviour={}, tables=STEPS)
    root.start()
    root.drop("a.jsonl", b'{"text": "fine"}\n{"text": cut\n')
    job = root.finished("a.jsonl")
    assert job.state is JobState.REJECTED
    path = root.settings.inbox_dir / "failed" / job.id / "a.jsonl"
    wait_until(path.exists, what="the file in failed/")
    path.write_text('{"text": "fine"}\n{"text": "whole"}\n')
    ask(root, "retry", job.id)
    done = root.finished("a.jsonl")
    assert done.state is JobState.SUCCEEDED
    assert done.dataset is not None
    assert done.dataset.rows == 2
    assert_sound(root)


def test_order_can_be_changed_while_jobs_wait(make_root: MakeRoot) -> None:
    root = make_root(behaviour={}, tables=STEPS)
    root.start()
    ask(root, "pause")
    for name in ("a", "b", "c"):
        root.drop(f"{name}.jsonl", texts(3, name))
        wait_until(lambda name=name: state(root, f"{name}.jsonl") is JobState.QUEUED)  # type: ignore[misc]
    ids = {name: root.job(f"{name}.jsonl").id for name in "abc"}  # type: ignore[union-attr]
    assert "number 1" in ask(root, "move", ids["c"], "--first")
    assert "number 3" in ask(root, "move", ids["a"], "--priority", "low")
    assert root.run("move", ids["a"]).returncode == 2
    ask(root, "resume")
    wait_until(lambda: all(state(root, f"{name}.jsonl") is JobState.SUCCEEDED for name in "abc"))
    assert [event["dataset"][0] for event in root.events("job.started")] == ["c", "b", "a"]


def test_a_lost_run_keeps_its_checkpoints_while_others_wait(make_root: MakeRoot) -> None:
    """A trainer that died backs off; what waits behind it, or comes urgently meanwhile, does not take its place."""
    root = make_root(
        behaviour={"1": {"die_at": 45, "step_seconds": 0.02}}, tables={**STEPS, "queue": {"retry_seconds": 6.0}}
    )
    root.start()
    root.drop("a.jsonl", texts(60, "a"))
    begun = root.running("a.jsonl")
    root.drop("b.jsonl", texts(5, "b"), folder="high")
    root.drop("c.jsonl", texts(5, "c"))
    wait_until(lambda: (job := root.job("a.jsonl")) and job.failure is FailureKind.LOST, what="the trainer to be lost")
    waiting = root.job("c.jsonl")
    assert waiting is not None
    assert f"job {begun.id} has begun" in ask(root, "move", waiting.id, "--first")
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        assert root.finished(name).state is JobState.SUCCEEDED
    done = root.job("a.jsonl")
    assert done is not None
    assert done.result is not None
    assert (done.attempt, done.result.start_step) == (2, 40)
    assert [event["dataset"] for event in root.events("job.started")] == ["a.jsonl", "a.jsonl", "b.jsonl", "c.jsonl"]
    assert_sound(root)


def test_what_one_job_s_sidecar_asks_for_fails_that_job_and_holds_no_other(make_root: MakeRoot) -> None:
    """An adapter that is larger than the disk: its own fault, where one of the root's settings has room."""
    root = make_root(behaviour={}, tables=STEPS)
    hidden = shutil.disk_usage(root.path).free // (16 * 23 * 4 * 10 * 20)  # a run of rank 16 takes a 20th of the disk
    shape = {"hidden_size": hidden, "num_hidden_layers": 1, "intermediate_size": 4 * hidden}
    (root.path / "base" / "config.json").write_text(json.dumps(shape))
    (root.settings.inbox_dir / "greedy.job.toml").write_text("[lora]\nr = 1024\n")
    root.drop("greedy.jsonl", texts(5))
    root.start()
    job = root.finished("greedy.jsonl")
    assert (job.state, job.failure) == (JobState.FAILED, FailureKind.CONFIG)
    assert "its sidecar asks for more than there is room for" in job.reason
    root.drop("modest.jsonl", texts(6))
    assert root.finished("modest.jsonl").state is JobState.SUCCEEDED
    assert not root.events("queue.held")


def test_a_disk_without_room_holds_the_queue_and_lets_it_go_by_itself(make_root: MakeRoot) -> None:
    root = make_root(behaviour={}, tables={**STEPS, "queue": {"min_free_bytes": 2**60}})
    root.start()
    root.drop("a.jsonl", texts(5))
    status = wait_until(lambda: (now := root.status()) and "free space" in now["reason"] and now)
    assert status
    assert status["status"] == "waiting"
    job = root.job("a.jsonl")
    assert job is not None
    assert (job.state, job.attempt) == (JobState.QUEUED, 0)
    root.configure(queue={"min_free_bytes": 0})
    os.kill(root.start_pid, signal.SIGHUP)
    assert root.finished("a.jsonl").attempt == 1
    assert [event["kind"] for event in root.events("queue.held")] == ["no_space"]


def test_a_disk_that_fills_up_in_mid_run_burns_no_attempt(make_root: MakeRoot) -> None:
    behaviour = {"1": {"fail": {"kind": "no_space", "message": "No space left on device"}}}
    root = make_root(behaviour=behaviour, tables=STEPS)
    root.start()
    root.drop("a.jsonl", texts(5))
    done = root.finished("a.jsonl")
    assert (done.state, done.attempt, done.attempts_without_progress) == (JobState.SUCCEEDED, 2, 0)


def test_out_of_memory_comes_back_with_half_the_batch_and_resumes_its_own_checkpoint(make_root: MakeRoot) -> None:
    tables = {"training": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_steps": 2}}
    behaviour = {"1": {"die_at": 5}, "2": {"fail": {"kind": "out_of_memory", "message": "no memory"}}}
    root = make_root(behaviour=behaviour, tables=tables)
    root.start()
    root.drop("a.jsonl", texts(80))
    done = root.finished("a.jsonl")
    assert (done.state, done.attempt) == (JobState.SUCCEEDED, 3)
    assert done.recipe is not None
    training = done.recipe["training"]
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == (2, 4)
    assert done.result is not None
    assert (done.result.start_step, done.result.steps_run) == (4, 10)


def test_out_of_memory_at_one_row_a_pass_is_not_tried_again(make_root: MakeRoot) -> None:
    """The trainer has computed with less than any smaller batch would be: one attempt, and what is left to do."""
    fail = {"kind": "out_of_memory", "message": "no memory", "tried": ["one_row", "gradient_checkpointing"]}
    root = make_root(behaviour={"*": {"fail": fail}}, tables={"training": {"per_device_train_batch_size": 4}})
    root.start()
    root.drop("a.jsonl", texts(80))
    failed = root.finished("a.jsonl")
    assert (failed.state, failed.attempt, failed.failure) == (JobState.FAILED, 1, FailureKind.OUT_OF_MEMORY)
    assert "one row at a time is too much already: lower max_length" in failed.reason


def test_a_trainer_that_others_end_each_time_backs_off_and_fails_the_job(make_root: MakeRoot) -> None:
    """An interruption that nobody here asked for, before anything is sealed, is no reason to go round for ever."""
    root = make_root(behaviour={"*": {"quit_at": 2}}, tables={**STEPS, "queue": {"retry_seconds": 0.01}})
    root.start()
    root.drop("a.jsonl", texts(20))
    failed = root.finished("a.jsonl")
    assert (failed.state, failed.attempt, failed.failure) == (JobState.FAILED, 3, FailureKind.LOST)
    assert "a signal that the daemon did not send" in failed.reason
    assert "3 attempts in a row made no progress" in failed.reason


def test_a_trainer_that_stands_still_is_ended_and_the_job_comes_back(make_root: MakeRoot) -> None:
    behaviour = {"1": {"step_seconds": 3600, "ignore_terminate": True}}
    root = make_root(behaviour=behaviour, tables={**STEPS, "queue": {"stall_timeout": 0.5, "stop_timeout": 0.3}})
    root.start()
    root.drop("a.jsonl", texts(5))
    wait_until(lambda: (job := root.job("a.jsonl")) and job.failure is FailureKind.STALLED)
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED


def test_a_job_over_its_time_fails_and_keeps_its_checkpoint(make_root: MakeRoot) -> None:
    root = make_root(behaviour=SLOW, tables={**STEPS, "queue": {"job_timeout": 1.0}})
    root.start()
    root.drop("a.jsonl", texts(100_0))
    job = root.finished("a.jsonl")
    assert (job.state, job.failure) == (JobState.FAILED, FailureKind.STALLED)
    assert "job_timeout" in job.reason
    assert list(root.settings.model_dir.glob("checkpoint-*"))


def test_hooks_get_the_facts_on_stdin_and_a_broken_one_harms_nobody(make_root: MakeRoot, tmp_path: Path) -> None:
    notes = tmp_path / "notes.jsonl"
    write = (sys.executable, "-c", f"import sys; open({str(notes)!r}, 'a').write(sys.stdin.read() + chr(10))")
    root = make_root(
        behaviour={},
        tables={
            **STEPS,
            "hooks": {
                "on_job_finished": write,
                "on_queue_empty": ("/no/such/program",),
                "on_hold": write,
                "timeout": 5.0,
            },
        },
    )
    root.start()
    root.drop("a.jsonl", texts(5))
    root.finished("a.jsonl")

    def noted() -> list[dict[str, Any]]:
        return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []

    wait_until(lambda: len(noted()) == 1 and root.events("hook.failed"))
    assert (noted()[0]["hook"], noted()[0]["job"]["state"]) == ("on_job_finished", "succeeded")
    assert root.events("hook.failed")[0]["hook"] == "on_queue_empty"
    ask(root, "pause")
    wait_until(lambda: len(noted()) == 2)
    assert noted()[1]["kind"] == "paused"


def test_a_reload_with_a_broken_file_changes_nothing(make_root: MakeRoot) -> None:
    root = make_root(behaviour={}, tables=STEPS)
    root.start()
    good, log = (root.path / "dropforge.toml").read_text(), root.settings.log_path
    (root.path / "dropforge.toml").write_text("[training]\nlr = 3\n")
    os.kill(root.start_pid, signal.SIGHUP)
    wait_until(lambda: "daemon.not_reloaded" in log.read_text())
    (root.path / "dropforge.toml").write_text(good)
    assert "unknown key [training] lr" in root.events("daemon.not_reloaded")[0]["error"]
    root.drop("a.jsonl", texts(5))
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED


def test_a_reload_names_what_only_a_restart_applies(make_root: MakeRoot) -> None:
    """In the log and, until it comes, in the status: a lock that is not there lets two daemons train at once."""
    root = make_root(behaviour={}, tables=STEPS)
    root.start()
    path, log = root.path / "dropforge.toml", root.settings.log_path
    before = path.read_text()
    root.configure(executor={"gpu_lock": "shared.lock"}, metrics={"port": 9099})
    os.kill(root.start_pid, signal.SIGHUP)
    wait_until(lambda: "daemon.reloaded" in log.read_text())
    ignored = root.events("daemon.reloaded")[0]["ignored"]
    assert ignored == "[executor] gpu_lock, [metrics] port: applied only by a restart"
    named = "changed, but applied only by a restart: [executor] gpu_lock, [metrics] port"
    wait_until(lambda: (status := root.status()) and named in status["warnings"])
    path.write_text(before)
    os.kill(root.start_pid, signal.SIGHUP)
    wait_until(lambda: (status := root.status()) and named not in status["warnings"])
    assert "ignored" not in root.events("daemon.reloaded")[-1]


def test_a_second_signal_ends_the_trainer_at_once_and_nothing_is_lost(make_root: MakeRoot) -> None:
    root = make_root(
        behaviour={"*": {"step_seconds": 0.02, "ignore_terminate": True}},
        tables={**STEPS, "queue": {"stop_timeout": 600.0}},
    )
    daemon = root.start()
    root.drop("a.jsonl", texts(3000))
    root.running("a.jsonl", step=10)
    daemon.send_signal(signal.SIGTERM)
    wait_until(lambda: (status := root.status()) and status["status"] == "stopping")
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(30) == 0
    job: Job | None = root.job("a.jsonl")
    assert job is not None
    assert (job.state, job.attempts_without_progress) == (JobState.QUEUED, 0)
    assert job.max_step >= 10
    assert run_dir_of(root.settings.state_dir, job.id).is_dir()
    assert_sound(root)


def test_submit_waits_for_the_result_and_tells_it_by_its_exit_code(make_root: MakeRoot, tmp_path: Path) -> None:
    root = make_root(behaviour={}, tables=STEPS)
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"text": "a row"}\n')
    bad.write_text("no row\n")
    assert root.run("submit", str(good), "--wait").returncode == 75  # nobody is there to train it
    root.start()
    assert root.finished("good.jsonl").state is JobState.SUCCEEDED
    assert root.run("submit", str(bad), "--wait").returncode == 3
    assert root.run("submit", str(good), "--wait", "--force").returncode == 0
    root.behave({"*": {"fail": {"kind": "diverged", "message": "NaN"}}})
    assert root.run("submit", str(good), "--wait", "--force", "--priority", "high").returncode == 1
    assert root.run("submit", str(tmp_path / "none.jsonl")).returncode == 4
    assert good.exists()
    assert_sound(root)


def test_the_same_content_queued_twice_is_trained_once(make_root: MakeRoot) -> None:
    """The second one was checked before the first was trained: it is recognised when its turn comes."""
    root = make_root(behaviour={}, tables=STEPS)
    root.start()
    ask(root, "pause")
    for name in ("a.jsonl", "b.jsonl"):
        root.drop(name, texts(5))
        wait_until(lambda name=name: state(root, name) is JobState.QUEUED)  # type: ignore[misc]
    ask(root, "resume")
    first, second = root.finished("a.jsonl"), root.finished("b.jsonl")
    assert (first.state, second.state) == (JobState.SUCCEEDED, JobState.CANCELLED)
    assert second.duplicate_of == first.id
    wait_until((root.settings.inbox_dir / "done" / second.id / "b.jsonl").exists, what="the file in done/")
    assert_sound(root)


def test_waiting_jobs_tell_why_and_when(make_root: MakeRoot) -> None:
    root = make_root(behaviour={"*": {"step_seconds": 0.01}}, tables=STEPS)
    root.start()
    root.drop("a.jsonl", texts(30, "a"))
    root.finished("a.jsonl")
    ask(root, "pause")
    for name, rows in (("b", 10), ("c", 40)):
        root.drop(f"{name}.jsonl", texts(rows, name))
        wait_until(lambda name=name: state(root, f"{name}.jsonl") is JobState.QUEUED)  # type: ignore[misc]
    listed = {entry["dataset"]: entry for entry in json.loads(ask(root, "jobs", "--json"))["jobs"]}
    assert listed["a.jsonl"]["eta_seconds"] is None
    assert 0 < listed["b.jsonl"]["eta_seconds"] < listed["c.jsonl"]["eta_seconds"]
    assert listed["c.jsonl"]["reason"] == "waits for its turn"
    assert "done in about" in " ".join(ask(root, "jobs").split())
    assert json.loads(ask(root, "show", "last", "--json"))["eta_seconds"] > 0
    wait_until(lambda: (root.status() or {})["queue"]["queued"] == 2, what="the status")
    assert json.loads(ask(root, "status", "--json"))["queue_eta_seconds"] > 0
    told = [json.loads(line) for line in ask(root, "logs", "last", "--json").splitlines()]
    assert {event["job"] for event in told} == {listed["c.jsonl"]["id"]}


def test_a_stop_waits_for_no_file_that_is_being_read(make_root: MakeRoot) -> None:
    """The child that reads rows stands still, as over a file of days: SIGTERM is answered all the same, and nothing is
    lost."""
    root = make_root(behaviour={}, tables=STEPS)
    daemon = root.start()
    children = [pid for pid, command in children_of(daemon.pid) if "daemon.dataset" in command]
    assert children
    for pid in children:
        os.kill(pid, signal.SIGSTOP)
    root.drop("a.jsonl", texts(5))
    wait_until(lambda: state(root, "a.jsonl") is JobState.CLAIMED)
    began = time.monotonic()
    assert root.stop() == 0
    assert time.monotonic() - began < root.settings.queue.stop_timeout
    assert not any(identify(pid) for pid in children)
    root.start()
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED
    assert_sound(root)
