"""Sharing a GPU: the real NVML binding over a driver library of our own, whose one device does as the test says."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.job import JobState
from tests.support.root import Root, wait_until

pytest.importorskip("pynvml", reason="nvidia-ml-py (extra gpu) is not installed")
SOURCE = Path(__file__).parents[1] / "support" / "nvml.c"
STEPS = {"training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 10}}
GIB = 2**30
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build the driver library with")


class Device:
    """The imaginary GPU."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "nvml-state"

    def set(self, free_bytes: int, pid: int = 0, *, lost: bool = False, celsius: int = 40) -> None:
        beside = self.state.with_suffix(".new")
        beside.write_text(f"{free_bytes} {0 if lost else 80 * GIB} {pid} {celsius}\n")
        beside.rename(self.state)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libnvidia-ml.so.1", SOURCE], check=True)
    found = Device(tmp_path)
    found.set(80 * GIB)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("FAKE_NVML", str(found.state))
    return found


def texts(count: int, word: str = "row") -> list[dict[str, str]]:
    return [{"text": f"{word} {number}"} for number in range(count)]


def test_a_run_waits_for_memory_that_others_hold_and_says_for_whom(
    make_root: Callable[..., Root], device: Device, tmp_path: Path
) -> None:
    root = make_root(behaviour={}, tables={**STEPS, "gpu": {"lock_dir": str(tmp_path)}})
    device.set(GIB // 10, pid=os.getpid())
    root.start()
    root.drop("a.jsonl", texts(5))
    status = wait_until(lambda: (now := root.status()) and "Imaginary" in now["reason"] and now)
    assert status
    assert status["status"] == "waiting"
    assert f"pid {os.getpid()}" in status["reason"]
    shown = wait_until(lambda: (now := root.status()) and now["gpu"])
    used = 80 * GIB - GIB // 10
    assert shown == [{"name": "Imaginary 9000", "used_bytes": used, "total_bytes": 80 * GIB, "utilization": 0.37}]
    job = root.job("a.jsonl")
    assert job is not None
    assert (job.state, job.attempt) == (JobState.QUEUED, 0)
    device.set(80 * GIB)
    assert root.finished("a.jsonl").attempt == 1


def test_a_run_waits_for_a_gpu_that_fell_over_and_is_not_trained_on_the_cpu_instead(
    make_root: Callable[..., Root], device: Device, tmp_path: Path
) -> None:
    """It would take days there, and its other precision would have the GPU run's checkpoints cleared."""
    root = make_root(behaviour={}, tables={**STEPS, "gpu": {"lock_dir": str(tmp_path)}})
    root.start()
    root.drop("a.jsonl", texts(5, "a"))
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED
    device.set(0, lost=True)
    root.drop("b.jsonl", texts(5, "b"))
    status = wait_until(lambda: (now := root.status()) and "GPU" in now["reason"] and now)
    assert status
    assert status["status"] == "waiting"
    assert "GPU is lost" in status["reason"]
    job = root.job("b.jsonl")
    assert job is not None
    assert (job.state, job.attempt) == (JobState.QUEUED, 0)
    device.set(80 * GIB)
    assert root.finished("b.jsonl").attempt == 1


def test_the_trainer_sees_the_chosen_device_by_its_uuid_alone(
    make_root: Callable[..., Root], device: Device, tmp_path: Path
) -> None:
    root = make_root(behaviour={"*": {"step_seconds": 0.05}}, tables={**STEPS, "gpu": {"lock_dir": str(tmp_path)}})
    root.start()
    root.drop("a.jsonl", texts(100))
    trainer = root.trainer(root.running("a.jsonl"))
    environment = Path(f"/proc/{trainer.pid}/environ").read_bytes().split(b"\0")
    assert b"CUDA_VISIBLE_DEVICES=GPU-0123" in environment


def test_two_daemons_of_one_machine_take_turns_on_one_gpu(
    make_root: Callable[..., Root], device: Device, tmp_path: Path
) -> None:
    tables = {**STEPS, "gpu": {"lock_dir": str(tmp_path)}}
    first = make_root("first", behaviour={"*": {"step_seconds": 0.02}}, tables=tables)
    second = make_root("second", behaviour={}, tables=tables)
    for root in (first, second):
        root.start()
    first.drop("a.jsonl", texts(200, "a"))
    first.running("a.jsonl")
    second.drop("b.jsonl", texts(5, "b"))
    status = wait_until(lambda: (now := second.status()) and "in use by" in now["reason"] and now)
    assert status
    assert str(first.path) in status["reason"]
    assert first.finished("a.jsonl").state is JobState.SUCCEEDED
    assert second.finished("b.jsonl").state is JobState.SUCCEEDED
    ended = first.events("job.succeeded")[0]["timestamp"]
    assert second.events("job.started")[0]["timestamp"] >= ended
    assert (tmp_path / "dropforge-GPU-0123.lock").exists()


def test_a_device_that_is_not_there_is_named_with_those_that_are(
    make_root: Callable[..., Root], device: Device
) -> None:
    root = make_root(behaviour={}, tables={**STEPS, "gpu": {"device": "GPU-9999"}})
    done = root.run("run", "--once")
    assert done.returncode == 2, done.stderr
    assert "GPU-0123" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gpu_that_others_use_or_that_is_too_hot_is_left_alone_until_it_is_free_and_cool(
    make_root: Callable[..., Root], device: Device, tmp_path: Path
) -> None:
    schedule = {"gpu_idle": True, "pause_celsius": 80, "resume_celsius": 70}
    tables = {**STEPS, "gpu": {"lock_dir": str(tmp_path)}, "schedule": schedule}
    root = make_root(behaviour={"1": {"step_seconds": 0.5}}, tables=tables)
    device.set(80 * GIB, pid=os.getpid())
    root.start()
    root.drop("a.jsonl", texts(60, "a"))
    wait_until(lambda: (now := root.status()) and f"in use by pid {os.getpid()}" in now["reason"], what="an idle GPU")
    device.set(80 * GIB, celsius=85)
    wait_until(lambda: (now := root.status()) and "85 degrees" in now["reason"], what="a cooler GPU")
    device.set(80 * GIB, celsius=75)  # it has to cool further
    wait_until(lambda: (now := root.status()) and "75 degrees" in now["reason"], what="a cooler GPU")
    device.set(80 * GIB, celsius=70)
    root.running("a.jsonl")
    device.set(80 * GIB, celsius=90)
    status = wait_until(lambda: (now := root.status()) and "90 degrees" in now["reason"] and now, what="the pause")
    assert status
    assert "it goes on at 70" in status["reason"]
    root.behave({})
    device.set(80 * GIB, celsius=60)
    job = root.finished("a.jsonl")
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)
