"""A disk that fails: one call, or from some call on, in the daemon or in the trainer. Nothing is lost, and once the disk
is well the job ends right."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.job import JobState
from daemon.versions import list_versions
from tests.support.root import DROPFORGE, Root, environment
from tests.support.sound import assert_sound

SOURCE = Path(__file__).parents[2] / "support" / "faults.c"
TABLES = {
    "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 2},
    "queue": {"retry_seconds": 0.05, "max_attempts": 2},
}
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build the failing disk with")


@pytest.fixture(scope="module")
def failing_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library


CASES = [
    *(("daemon", "write", errno.ENOSPC, at) for at in (1, 6, 14, 25)),
    *(("daemon", "fsync", errno.EIO, at) for at in (2, 7, 19)),
    *(("daemon", "rename", errno.EIO, at) for at in (1, 3, 6, 9, 13)),
    *(("fake_trainer", "write", errno.ENOSPC, at) for at in (3, 9)),
    *(("fake_trainer", "fsync", errno.EIO, at) for at in (3, 12)),
    *(("fake_trainer", "rename", errno.EIO, at) for at in (2, 5)),
]


@pytest.mark.parametrize(("where", "call", "number", "at"), CASES, ids=str)
def test_one_failing_call_loses_nothing(
    make_root: Callable[..., Root], failing_disk: Path, where: str, call: str, number: int, at: int
) -> None:
    root = make_root(behaviour={}, tables=TABLES)
    root.drop("a.jsonl", [{"text": f"row {row}"} for row in range(6)])
    fault = {
        "LD_PRELOAD": str(failing_disk), "FAULT_ROOT": str(root.path), "FAULT_CALL": call, "FAULT_ERRNO": str(number),
        "FAULT_AT": str(at), "FAULT_ONCE": f"{root.path}.fault", "FAULT_PROGRAM": "-m daemon " if where == "daemon" else where,
    }  # fmt: skip
    first = subprocess.run(
        [*DROPFORGE, "--root", str(root.path), "run", "--once"],
        env={**environment(), **fault}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "Traceback" not in first.stderr, first.stderr
    assert first.returncode in (0, 1), first.stderr

    again = root.run("run", "--once")
    assert again.returncode == 0, again.stderr
    job = root.job("a.jsonl")
    assert job is not None
    if job.state is JobState.FAILED:  # the disk failed its last attempt: a person puts it back
        assert root.run("retry", job.id).returncode == 0
        assert root.run("run", "--once").returncode == 0
        job = root.job("a.jsonl")
        assert job is not None
    assert job.state is JobState.SUCCEEDED, f"{job.reason} {first.stderr}"
    assert job.result is not None
    assert job.result.steps_run == job.result.steps_planned == 6
    assert len(list_versions(root.settings.model_dir)) == 1
    assert_sound(root)
