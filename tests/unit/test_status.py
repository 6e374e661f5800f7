"""The status file: bounded, without NaN, in the form of its schema, and never believed about its writer's life."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import guard
from daemon.gpu import Gpu, GpuProbe, GpuTimeout
from daemon.job import FailureKind, Job, JobState, Progress, RunResult
from daemon.observability import status
from daemon.observability.status import (
    StatusSnapshot,
    finished_job,
    gpu_device,
    liveness_of,
    read_status,
    running_job,
    write_status,
)
from daemon.processes import boot_id, identify
from daemon.status_writer import LOSS_POINTS, LossHistory
from tests.support.root import REPOSITORY

SCHEMA = json.loads((REPOSITORY / "docs" / "status.schema.json").read_text())
NASTY = "\x1b[31m\n\u202e\udcff" + "ä" * 5000


def job(**fields: Any) -> Job:
    return Job(
        **{"id": "20261123-041500-9f3a", "name": "a.jsonl", "state": JobState.RUNNING, "updated_at": "x", **fields}
    )


def full_snapshot() -> StatusSnapshot:
    """Everything as large and as odd as it can be."""
    progress = Progress(phase="training", step=10**9, total_steps=10**9, loss=float("nan"), eta_seconds=float("inf"))
    result: Any = RunResult(outcome="failed", held_out_after=float("nan"))  # type: ignore[arg-type]
    ended = job(name=NASTY, reason=NASTY, state=JobState.FAILED, failure=FailureKind.DIVERGED, result=result)
    return StatusSnapshot(
        status="training",
        reason=NASTY,
        queue={state.value: 10**9 for state in JobState},
        job=running_job(job(name=NASTY), progress, [(n, 1.0 / (n + 1)) for n in range(LOSS_POINTS)]),
        waiting=tuple({"file": "f" * 200, "reason": "r" * 200, "since": "s"} for _ in range(status.WAITING_FILES)),
        left_alone=tuple({"file": "f" * 200, "reason": "r" * 200} for _ in range(status.WAITING_FILES)),
        recent=tuple(finished_job(ended) for _ in range(status.RECENT_JOBS)),
        model={"version": "0001", "dataset": "d", "created_at": None},
        verification={"at": "x", "versions": 10**9, "datasets": 10**9, "problems": 10**9},
        warnings=tuple(NASTY for _ in range(1000)),
    )


def test_the_largest_status_is_small_and_of_the_schema() -> None:
    text = status.render(full_snapshot())
    assert text.isascii()
    assert len(text) < 256 * 1024
    content = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(content, SCHEMA)
    assert content["job"]["loss"] is None
    assert len(content["warnings"]) == status.WARNINGS


def test_the_schema_refuses_what_is_no_status_file() -> None:
    good = json.loads(status.render(full_snapshot()))
    for change in ({"status": "sleeping"}, {"pid": "1"}, {"job": {}}, {"warnings": ["w"] * 100}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**good, **change}, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({key: value for key, value in good.items() if key != "timestamp"}, SCHEMA)


def content(**changes: Any) -> dict[str, Any]:
    return {**json.loads(status.render(StatusSnapshot(status="idle", reason="", status_interval=2.0))), **changes}


def test_a_daemon_is_alive_hung_dead_or_stopped_whatever_its_file_claims() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    me = identify(os.getpid())
    assert me is not None
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "alive"),
        ({"monotonic_seconds": time.monotonic() - 61}, "hung"),
        ({"monotonic_seconds": time.monotonic() - 61, "status_interval": 10.0}, "alive"),  # it beats less often
        ({"pid": ended.pid}, "dead"),
        ({"start_ticks": me.start_ticks + 1}, "dead"),  # another process has that pid now
        ({"boot_id": "00000000-0000-0000-0000-000000000000"}, "dead"),  # before the machine was restarted
        ({"status": "stopped"}, "stopped"),
        ({"status": "stopped", "pid": ended.pid}, "stopped"),
        ({"timestamp": "2031-01-01T00:00:00.000Z"}, "alive"),  # the clock was set back; the heartbeat does not mind
    ]
    for changes, expected in cases:
        assert liveness_of(content(**changes), is_locked=lambda: False)["liveness"] == expected, changes


def test_a_daemon_whose_process_is_not_to_be_seen_is_known_by_the_lock_it_holds() -> None:
    """Another boot_id than its own, as in a container that mounts one over the kernel's, or on another machine."""
    elsewhere = {"boot_id": "00000000-0000-0000-0000-000000000000"}
    old = {**elsewhere, "timestamp": "2026-01-01T00:00:00.000Z"}
    cases: list[tuple[dict[str, Any], bool | None, str, bool | None]] = [
        (elsewhere, True, "alive", True),
        (old, True, "hung", True),
        (elsewhere, False, "dead", False),
        (elsewhere, None, "unknown", None),  # its lock may not be read: nothing is claimed
        ({"status": "stopped"}, True, "alive", True),  # the next one, which has not written yet
        ({**elsewhere, "status": "stopped"}, None, "stopped", False),
        ({}, None, "alive", True),  # the process itself is seen
    ]
    for changes, is_locked, expected, alive in cases:
        found = liveness_of(content(**changes), is_locked=lambda held=is_locked: held)  # type: ignore[misc]
        assert (found["liveness"], found["alive"]) == (expected, alive), changes


def test_the_lock_is_looked_at_beside_the_file(tmp_path: Path) -> None:
    write_status(tmp_path / "status.json", StatusSnapshot(status="idle", reason=""))
    text = (tmp_path / "status.json").read_text()
    (tmp_path / "status.json").write_text(text.replace(boot_id(), "00000000-0000-0000-0000-000000000000"))
    with guard.ModelLock(tmp_path, owner="dropforge daemon"):
        assert (read_status(tmp_path / "status.json") or {})["liveness"] == "alive"
    assert (read_status(tmp_path / "status.json") or {})["liveness"] == "dead"


@pytest.mark.parametrize("content", [b"", bytes(700)])
def test_what_a_power_cut_leaves_of_a_status_file_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "status.json"
    path.write_bytes(content)
    assert read_status(path) is None


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        "{}",
        '{"status": "idle"}',
        '{"status": "idle", "pid": "x", "start_ticks": 0, "boot_id": ""}',
    ],
)
def test_what_is_no_status_file_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "status.json"
    assert read_status(path) is None
    path.write_text(text)
    with pytest.raises(ValueError, match=r".+"):
        read_status(path)


def test_a_status_is_written_beside_and_renamed(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_status(path, StatusSnapshot(status="idle", reason=""))
    first = path.stat().st_ino
    write_status(path, StatusSnapshot(status="idle", reason="again"))
    assert path.stat().st_ino != first
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


# -- losses


@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 2000), every=st.integers(1, 50), start=st.integers(0, 500))
def test_losses_are_few_ascending_and_cover_the_run(
    tmp_path_factory: pytest.TempPathFactory, total: int, every: int, start: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    history, points = LossHistory(), []
    for step in range(start + 1, total + 1, every):
        points = history.observe(folder, 1, Progress(phase="training", step=step, total_steps=total, loss=1.0 / step))
    steps = [step for step, _ in points]
    assert len(points) <= LOSS_POINTS
    assert steps == sorted(set(steps))
    if start < total:
        assert all(0 < loss <= 1.00001 / (start + 1) for _, loss in points)
        assert steps[-1] == range(start + 1, total + 1, every)[-1]
        told = len(range(start + 1, total + 1, every))
        assert len(points) >= min(LOSS_POINTS * (total - start) // total, told) // 2 - 1


def test_a_run_that_is_met_in_its_middle_is_caught_up_and_a_resumed_one_takes_back(tmp_path: Path) -> None:
    events = [
        {"event": "run.started", "start_step": 0},
        *({"event": "run.stepped", "step": step, "loss": 5.0} for step in range(1, 101)),
        {"event": "run.started", "start_step": 50},
        *({"event": "run.stepped", "step": step, "loss": 2.0} for step in range(51, 61)),
    ]
    text = "\n".join(map(json.dumps, events))
    (tmp_path / "events.jsonl").write_text(text + '\n{"event": "run.st')
    points = dict(LossHistory().observe(tmp_path, 2, Progress(phase="training", step=61, total_steps=100, loss=1.0)))
    assert max(points) == 61
    assert points[50] == 5.0
    assert points[55] == 2.0
    assert points[61] == 1.0


def test_another_attempt_or_job_begins_anew(tmp_path: Path) -> None:
    history = LossHistory()
    progress = Progress(phase="training", step=5, total_steps=10, loss=1.0)
    assert history.observe(tmp_path, 1, progress) == [(5, 1.0)]
    assert history.observe(tmp_path, 1, replace(progress, loss=None, step=6)) == [(5, 1.0)]
    assert history.observe(tmp_path / "other", 1, replace(progress, step=2)) == [(2, 1.0)]
    assert history.observe(tmp_path, 1, None) == []


# -- GPUs


GPU = Gpu(uuid="GPU-1", name="H200\n", free_bytes=30, total_bytes=100, processes=(), utilization=0.37)


def test_a_gpu_is_shown_by_what_is_used_of_it() -> None:
    assert gpu_device(GPU) == {"name": "H200\\n", "used_bytes": 70, "total_bytes": 100, "utilization": 0.37}


def test_a_driver_that_never_answers_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.gpu.TIMEOUT_SECONDS", 0.2)
    answers = threading.Event()

    def ask() -> tuple[Gpu, ...]:
        answers.wait(60)
        return (GPU,)

    probe = GpuProbe(ask)
    assert probe.known() == ()  # asked, not waited for
    for _ in range(50):
        with pytest.raises(GpuTimeout):
            probe.fresh()
    assert sum(thread.name == "gpu" for thread in threading.enumerate()) == 1
    answers.set()
    monkeypatch.setattr("daemon.gpu.TIMEOUT_SECONDS", 60.0)
    assert probe.fresh() == probe.known() == (GPU,)
