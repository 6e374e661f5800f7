"""A disk that is truly full or read-only: a small tmpfs, mounted and remounted by the test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daemon.job import JobState
from tests.support.root import Root, wait_until
from tests.support.sound import assert_sound

STEPS = {"training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 2}}
ROWS = [{"text": f"row {row}"} for row in range(6)]


@contextmanager
def mounted(path: Path, size: str) -> Iterator[None]:
    """A tmpfs of this size on `path`, away again afterwards."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", path], check=True)


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


def test_a_state_directory_that_is_full_stops_the_daemon_with_a_sentence(make_root: Callable[..., Root]) -> None:
    """It cannot record what it does: going on would be guessing. With room again, everything goes on."""
    root = make_root(behaviour={}, tables=STEPS)
    with mounted(root.settings.state_dir, "2m"):
        daemon = root.start()
        filler = root.settings.state_dir / "filler"
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={filler}", "bs=4096"], capture_output=True, check=False
        )  # until full
        root.drop("a.jsonl", ROWS)
        assert daemon.wait(60) == 1
        said = root.errors()
        assert "Traceback" not in said
        assert "full" in said or "No space" in said
        filler.unlink()
        root.start()
        assert root.finished("a.jsonl").state is JobState.SUCCEEDED
        assert root.stop() == 0
        assert_sound(root)
