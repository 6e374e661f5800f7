"""A base model that cannot be used holds the queue with what mends it; no file ends in failed/ for it."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon.base_identity import base_problem
from daemon.job import JobState
from daemon.observability.status import read_status
from daemon.recipe import ModelSettings
from tests.support.root import Root, wait_until
from tests.support.sound import assert_sound

MakeRoot = Callable[..., Root]
ROWS = [{"text": f"row {number}"} for number in range(4)]


def waits_for(root: Root, words: str) -> dict[str, Any]:
    """Wait until the status says this of why the queue waits; the job is queued and has burnt nothing."""

    def told() -> dict[str, Any] | None:
        now = root.status()
        return now if now and words in now["reason"] and now["status"] == "waiting" else None

    status = wait_until(told, what=words)
    assert status is not None
    job = root.job("a.jsonl")
    assert job is not None
    assert (job.state, job.attempt, job.attempts_without_progress) == (JobState.QUEUED, 0, 0)
    return status


def test_a_root_without_a_base_model_holds_until_one_is_set_and_reloaded(make_root: MakeRoot) -> None:
    """The daemon says so at its start, and the command that its reason names is the one that mends it."""
    root = make_root(behaviour={})
    root.configure(model={"model_name_or_path": ""})
    root.drop("a.jsonl", ROWS)
    assert root.run("run", "--once").returncode == 1  # nobody is there to mend it
    root.start()
    assert [event["check"] for event in root.events("doctor.found")] == ["model", "model"]
    status = waits_for(root, "no base model is configured")
    assert "`dropforge config set model.model_name_or_path NAME`" in status["reason"]
    assert root.run("config", "set", "model.model_name_or_path", "base").returncode == 0
    os.kill(root.start_pid, signal.SIGHUP)
    done = root.finished("a.jsonl")
    assert (done.state, done.attempt) == (JobState.SUCCEEDED, 1)
    assert {event["kind"] for event in root.events("queue.held")} == {"base"}
    assert_sound(root)


def test_what_only_a_trainer_finds_wrong_with_the_base_holds_until_its_files_change(make_root: MakeRoot) -> None:
    failure = {"kind": "base", "message": "the base model has no usable tokenizer"}
    root = make_root(behaviour={"*": {"fail": failure}})
    root.start()
    root.drop("a.jsonl", ROWS)
    waits_for(root, "no usable tokenizer; a hint")
    launched = len(root.events("job.started"))
    root.drop("b.jsonl", [{"text": "other"}])
    wait_until(lambda: root.job("b.jsonl") and root.job("b.jsonl").state is JobState.QUEUED)  # type: ignore[union-attr]
    assert len(root.events("job.started")) == launched == 1
    root.behave({})
    (root.path / "base" / "tokenizer.json").write_text('{"whole": true}')
    for name in ("a.jsonl", "b.jsonl"):
        done = root.finished(name)
        assert (done.state, done.attempt) == (JobState.SUCCEEDED, 1)
    assert_sound(root)


def test_a_trainer_that_is_not_there_holds_until_it_is(make_root: MakeRoot, tmp_path: Path) -> None:
    """No file ends in failed/ because somebody moved an environment."""
    root = make_root(behaviour={})
    program = tmp_path / "trainer"
    command = root.tables["executor"]["command"]
    root.configure(executor={"command": (str(program), *command[1:])})
    root.drop("a.jsonl", ROWS)
    once = root.run("run", "--once")
    assert once.returncode == 1
    assert f"the trainer's program {program} is not there" in once.stderr
    root.start()
    waits_for(root, f"the trainer's program {program} is not there, or is no program")
    # One that is there and looks executable, and is not: what the kernel says counts, and no attempt is spent on it.
    program.write_text(f'#!{tmp_path}/sh\nexec {command[0]} "$@"\n')
    program.chmod(0o755)
    waits_for(root, f"the trainer's program {program} cannot be executed: no such file or directory")
    assert root.events("queue.held")[-1]["kind"] == "trainer"
    program.write_text(f'#!/bin/sh\nexec {command[0]} "$@"\n')
    done = root.finished("a.jsonl")
    assert (done.state, done.attempt) == (JobState.SUCCEEDED, 1)
    assert_sound(root)


def test_a_problem_is_seen_without_loading_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.json").write_text("{}")
    (whole / "model.safetensors").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cache" / "models--org--known" / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "cache" / "models--org--known" / "refs").mkdir()
    (tmp_path / "cache" / "models--org--known" / "refs" / "main").write_text("abc")
    cases = {
        "": "no base model is configured",
        str(whole): None,
        str(tmp_path / "empty"): "has no *.safetensors weights",
        str(tmp_path / "gone"): "is not a folder",
        "./gone": "is not a folder",
        "org/known": None,
        "org/unknown": "neither a folder of the root nor in the local cache",
    }
    for name, words in cases.items():
        found = base_problem(ModelSettings(model_name_or_path=name))
        assert (found is None) if words is None else (found is not None and words in found.message), name
    allowed = ModelSettings(model_name_or_path="org/unknown", allow_downloads=True)
    assert base_problem(allowed) is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in str(base_problem(allowed))


def test_a_clean_restart_is_no_attempt_of_the_job(make_root: MakeRoot) -> None:
    root = make_root(
        behaviour={"*": {"step_seconds": 0.02}},
        tables={"training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 5}},
    )
    root.start()
    root.drop("a.jsonl", [{"text": f"row {number}"} for number in range(200)])
    root.running("a.jsonl", step=5)
    assert root.stop() == 0
    job = root.job("a.jsonl")
    assert job is not None
    assert (job.state, job.attempt) == (JobState.QUEUED, 0)
    last = read_status(root.settings.status_path)
    assert last is not None
    assert (last["watch_mode"], last["warnings"]) == ("", [])  # that it watches no more is no fault
    root.behave({})
    root.start()
    done = root.finished("a.jsonl")
    assert (done.state, done.attempt) == (JobState.SUCCEEDED, 1)
    assert done.result is not None
    assert done.result.start_step >= 5


def test_a_reload_tells_of_a_fault_and_of_a_port_that_cannot_be_opened(make_root: MakeRoot) -> None:
    """What was valid before still holds, and the status says so until the file is mended."""
    root = make_root(behaviour={})
    daemon = root.start()
    good, status_path = (root.path / "dropforge.toml").read_text(), root.settings.status_path

    def warned(words: str) -> bool:
        return any(words in warning for warning in (read_status(status_path) or {}).get("warnings", ()))

    (root.path / "dropforge.toml").write_text(good.replace("[lora]\n", "[lora]\nr = 0\n", 1))
    os.kill(daemon.pid, signal.SIGHUP)
    wait_until(lambda: warned("[lora] r is at least 1"), what="the fault")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        (root.path / "dropforge.toml").write_text(good.replace("[metrics]\n", f"[metrics]\nport = {port}\n", 1))
        os.kill(daemon.pid, signal.SIGHUP)
        wait_until(lambda: warned(f"cannot open [metrics] port {port}"), what="the port")
    (root.path / "dropforge.toml").write_text(good)
    os.kill(daemon.pid, signal.SIGHUP)
    wait_until(lambda: not warned(""), what="no warning")


def test_a_second_daemon_is_told_first_that_the_root_is_held(make_root: MakeRoot) -> None:
    """Before its log is opened and its settings are looked at; in words, with the one that holds it."""
    root = make_root(behaviour={})
    root.configure(model={"model_name_or_path": ""})
    daemon = root.start()
    second = root.run("run")
    assert second.returncode == 5
    assert f"another daemon holds it: it is in use by dropforge daemon (process {daemon.pid} on" in second.stderr
    assert "{" not in second.stderr
    assert "doctor.found" not in second.stderr


def test_a_lock_that_no_daemon_holds_is_waited_for_and_not_taken_for_one(make_root: MakeRoot) -> None:
    """Whoever may read the file may lock it: exit code 5 would keep a supervisor from ever trying again."""
    root = make_root(behaviour={})
    lock = root.settings.state_dir / ".lock"
    lock.touch()
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        refused = root.run("run", "--once")
    assert refused.returncode == 75
    assert f"`fuser -v {lock}`" in refused.stderr
    assert root.run("run", "--once").returncode == 0
