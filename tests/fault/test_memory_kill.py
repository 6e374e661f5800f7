"""A machine without memory, for real: the kernel kills the trainer, or an allocation fails. Both are told apart from a kill."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from daemon.executors.base import Exit
from daemon.executors.local import LocalExecutor
from daemon.job import FailureKind, RunSpec
from daemon.run_dir import IDENTITY_NAME
from daemon.trainer.attempt import result_of
from tests.support.inprocess import events, rows, specify
from tests.support.root import environment, wait_until

MOST_BYTES = 900 << 20  # the trainer with its libraries has a good half of that
LONG = {
    "training": {"per_device_train_batch_size": 256, "gradient_accumulation_steps": 1, "max_steps": 2},
    "data": {"max_length": 2048, "held_out_fraction": 0.0},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A control group with little memory; its trainers join it before they become Python."""
    one, two = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    old = (one / "memory.limit_in_bytes").is_file()
    parent, limit = (one, "memory.limit_in_bytes") if old else (two, "memory.max")
    group = parent / f"dropforge-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        if not (group / limit).is_file():
            pytest.skip("control groups have no memory limit here")
        (group / limit).write_text(str(MOST_BYTES))
        for name, value in environment().items():
            monkeypatch.setenv(name, value)
        yield group
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text().split(), what="the group to be empty")
        group.rmdir()


def launch(executor: LocalExecutor, spec: RunSpec) -> Path:
    executor.launch(replace(spec, daemon_pid=os.getpid()))
    return Path(spec.run_dir)


def within(group: Path) -> LocalExecutor:
    join = f'echo $$ > "{group}/cgroup.procs" && exec "$0" -P -m daemon.trainer "$1"'
    return LocalExecutor(("sh", "-c", join, sys.executable))


def ended(executor: LocalExecutor, run_dir: Path) -> Exit:
    found = wait_until(lambda: executor.poll(run_dir), 120, "the trainer to end")
    assert found is not None
    return found


def texts(count: int) -> list[dict[str, Any]]:
    words = " ".join(message["content"] for row in rows(60) for message in row["messages"])
    return [{"text": words[number * 5 :]} for number in range(count)]


def test_the_kernels_kill_is_out_of_memory_and_anothers_is_not(small: Path, tiny_base: Path, tmp_path: Path) -> None:
    executor = within(small)
    spec = specify(tmp_path / "greedy", texts(256), tiny_base, LONG, format_="text")
    greedy = launch(executor, spec)
    how = ended(executor, greedy)
    assert how == Exit(signal=signal.SIGKILL, out_of_memory=True), (greedy / "trainer.log").read_text()
    assert not (greedy / "result.json").exists()
    assert events(spec, "run.started")  # and not while it loaded its libraries

    modest = launch(executor, specify(tmp_path / "modest", rows(24), tiny_base))
    wait_until((modest / "events.jsonl").exists, what="the trainer to begin")
    os.kill(json.loads((modest / IDENTITY_NAME).read_text())["pid"], signal.SIGKILL)
    assert ended(executor, modest) == Exit(signal=signal.SIGKILL)


def test_an_allocation_that_cannot_be_had_is_out_of_memory() -> None:
    """torch has no class of its own for it on the CPU: what its allocator raises, and what Python does."""
    found = []
    for allocate in (lambda: torch.empty(1 << 50, dtype=torch.uint8), lambda: bytearray(1 << 60)):
        try:
            allocate()
        except Exception as error:
            found.append(result_of(error).failure)
    assert found == [FailureKind.OUT_OF_MEMORY, FailureKind.OUT_OF_MEMORY]
