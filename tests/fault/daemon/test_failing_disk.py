"""A disk that fails: one call, or from some call on, in the daemon or in the trainer. Nothing is lost, and once the disk
is well the job ends right."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.job import JobState
from daemon.versions import list_versions
from tests.support.disks import build_failing_disk
from tests.support.root import DROPFORGE, Root, environment
from tests.support.sound import assert_sound

TABLES = {
    "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 2},
    "queue": {"retry_seconds": 0.05, "max_attempts": 2},
}
KILLED = 0  # in place of an errno


@pytest.fixture(scope="module")
def failing_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_failing_disk(tmp_path_factory.mktemp("faults"))


ONCE = [
    *(("daemon", "write", errno.ENOSPC, at) for at in (1, 6, 14, 25, 40, 60)),
    *(("daemon", "fsync", errno.EIO, at) for at in (2, 7, 19)),
    *(("daemon", "rename", errno.EIO, at) for at in (1, 3, 6, 9)),
    *(("fake_trainer", "write", errno.ENOSPC, at) for at in (3, 9)),
    *(("fake_trainer", "fsync", errno.EIO, at) for at in (3, 12)),
    *(("fake_trainer", "rename", errno.EIO, at) for at in (2, 5)),
    *(("fake_trainer", "rename", KILLED, at) for at in (1, 4)),
]
FROM_THEN_ON = [
    ("daemon", "write", errno.EIO, 30),
    ("daemon", "fsync", errno.EIO, 12),
    ("daemon", "rename", errno.EROFS, 11),
    ("daemon", "rename", errno.EIO, 13),
    ("fake_trainer", "write", errno.EROFS, 6),
    ("fake_trainer", "rename", errno.EIO, 3),
]
EACH = [
    *((where, call, number) for where in ("daemon", "fake_trainer") for call in ("write", "fsync", "rename")
      for number in (errno.ENOSPC, errno.EIO)),
    *(("fake_trainer", call, KILLED) for call in ("write", "fsync", "rename")),
]  # fmt: skip


@pytest.mark.parametrize(("where", "call", "number", "at"), ONCE, ids=str)
def test_one_failing_call_loses_nothing(
    make_root: Callable[..., Root], failing_disk: Path, where: str, call: str, number: int, at: int
) -> None:
    root = make_root(behaviour={}, tables=TABLES)
    assert survives(root, failing_disk, where=where, call=call, number=number, at=at), "nothing failed"


@pytest.mark.parametrize(("where", "call", "number", "at"), FROM_THEN_ON, ids=str)
def test_a_disk_that_fails_from_some_call_on_loses_nothing(
    make_root: Callable[..., Root], failing_disk: Path, where: str, call: str, number: int, at: int
) -> None:
    root = make_root(behaviour={}, tables=TABLES)
    assert survives(root, failing_disk, where=where, call=call, number=number, at=at, forever=True), "nothing failed"


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("where", "call", "number"), EACH, ids=str)
def test_each_call_of_a_jobs_life_may_fail(
    make_root: Callable[..., Root], failing_disk: Path, where: str, call: str, number: int
) -> None:
    """Enumerated: the first, the second, ... until a life has no such call left."""
    at = 1
    while survives(
        make_root(f"at-{at}", behaviour={}, tables=TABLES), failing_disk, where=where, call=call, number=number, at=at
    ):
        at += 1
    print(f"{where}: {at - 1} calls of {call} failed, one a life")
    assert at > 3


def survives(root: Root, library: Path, *, where: str, call: str, number: int, at: int, forever: bool = False) -> bool:
    """One life in which a call fails, then one in which none does; the job must have ended right. False: none failed."""
    root.drop("a.jsonl", [{"text": f"row {row}"} for row in range(6)])
    mark = Path(f"{root.path}.fault")
    fault = {
        "LD_PRELOAD": str(library), "FAULT_ROOT": str(root.path), "FAULT_CALL": call, "FAULT_ERRNO": str(number),
        "FAULT_AT": str(at), "FAULT_PROGRAM": "-m daemon " if where == "daemon" else where,
        **({"FAULT_FOREVER": "1"} if forever else {"FAULT_ONCE": str(mark)}),
    }  # fmt: skip
    first = subprocess.run(
        [*DROPFORGE, "--root", str(root.path), "run", "--once"],
        env={**environment(), **fault}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    told = f"{call} {at} of {where} failed with {number}: {first.stderr}"
    assert "Traceback" not in first.stderr, told
    assert first.returncode in (0, 1), told

    again = root.run("run", "--once")
    assert again.returncode == 0, f"{told}\n{again.stderr}"
    job = root.job("a.jsonl")
    assert job is not None
    if job.state is JobState.FAILED:  # the disk failed its last attempt: a person puts it back
        assert root.run("retry", job.id).returncode == 0
        assert root.run("run", "--once").returncode == 0
        job = root.job("a.jsonl")
        assert job is not None
    assert job.state is JobState.SUCCEEDED, f"{told}\n{job.reason}"
    assert job.result is not None
    assert job.result.steps_run == job.result.steps_planned == 6, told
    assert len(list_versions(root.settings.model_dir)) == 1, told
    assert not list(root.settings.state_dir.glob("*unreadable*")), told  # a store is not broken because a disk was
    assert_sound(root)
    return forever or mark.exists()
