"""A folder that nobody may enter any more (`chmod 000`): the daemon says so, loses nothing, and goes on by itself."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daemon.job import JobState
from daemon.versions import list_versions
from tests.support.root import Root, wait_until
from tests.support.sound import assert_sound

TABLES = {
    "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 2},
    "inbox": {"settle_seconds": 0.05, "rescan_seconds": 0.3},
    "queue": {"retry_seconds": 0.05, "max_attempts": 2},
    "status": {"status_interval": 0.1},
}
FOLDERS = [
    "inbox", "inbox/processing", "inbox/done", "inbox/failed", "current_model", "current_model/versions", "state",
    "state/runs",
]  # fmt: skip


@pytest.fixture(scope="module")
def through() -> tuple[str, ...]:
    """What starts a daemon whom modes bind: root that may no longer override them, as any other user."""
    if os.geteuid() != 0:
        return ()
    prefix = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    try:
        done = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("util-linux is not installed: setpriv is needed to start a daemon whom modes bind")
    if done.returncode:
        pytest.skip(f"a daemon whom modes bind cannot be started here: {done.stderr.decode().strip()}")
    return prefix


@contextmanager
def closed(folder: Path) -> Iterator[None]:
    mode = folder.stat().st_mode & 0o7777
    folder.chmod(0)
    try:
        yield
    finally:
        folder.chmod(mode)


def rows(word: str) -> list[dict[str, str]]:
    return [{"text": f"{word} {number}"} for number in range(5)]


def says(root: Root, folder: Path) -> bool:
    """Whether the status or the log names the folder and why."""
    status = root.status() if os.access(root.settings.state_dir, os.X_OK) else None
    told = [status["reason"], *status["warnings"]] if status else []
    told += [f"{event.get('error', '')} {event.get('reason', '')}" for event in root.log() if event["level"] != "info"]
    return any(str(folder) in line and "ermission denied" in line for line in told)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_living_daemon_says_so_and_goes_on_when_it_is_open_again(
    make_root: Callable[..., Root], through: tuple[str, ...], name: str
) -> None:
    root = make_root(behaviour={}, tables=TABLES, through=through)
    daemon = root.start()
    root.drop("before.jsonl", rows("before"))
    root.finished("before.jsonl")
    folder = root.path / name
    with closed(folder):
        if name.startswith("inbox/"):  # what brings a file into done/ and failed/
            root.drop("bad.jsonl", b"no row\n")
        root.drop("a.jsonl", rows("a"))
        wait_until(lambda: says(root, folder), what=f"the daemon to say that it may not enter {name}")
    jobs = [root.finished(other) for other in ("a.jsonl", *(["bad.jsonl"] if name.startswith("inbox/") else []))]
    assert [job.state for job in jobs] == [JobState.SUCCEEDED, JobState.REJECTED][: len(jobs)], jobs
    assert jobs[0].attempts_without_progress == 0
    assert daemon.poll() is None
    assert len(list_versions(root.settings.model_dir)) == 2
    assert root.stop() == 0
    assert "Traceback" not in root.errors()
    assert_sound(root)


def starts(root: Root) -> bool:
    """Whether a daemon comes up; one that does not has ended."""
    try:
        root.start()
    except AssertionError as error:
        if "the daemon ended" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("name", FOLDERS)
def test_a_start_says_so_in_a_sentence_or_waits_and_the_next_one_finishes(
    make_root: Callable[..., Root], through: tuple[str, ...], name: str
) -> None:
    root = make_root(behaviour={}, tables=TABLES, through=through)
    root.start()
    root.drop("before.jsonl", rows("before"))
    root.finished("before.jsonl")
    assert root.stop() == 0
    folder = root.path / name
    root.drop("a.jsonl", rows("a"))
    with closed(folder):
        if starts(root):
            wait_until(lambda: says(root, folder) or root.job("a.jsonl"), what="a word of it, or work without it")
            assert root.stop() == 0
        else:
            assert str(folder) in root.errors(), root.errors()
    assert "Traceback" not in root.errors(), root.errors()
    assert not list(root.settings.state_dir.glob("*unreadable*"))
    root.start()
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED
    assert root.stop() == 0
    assert len(list_versions(root.settings.model_dir)) == 2
    assert_sound(root)


def test_a_file_that_may_not_be_read_is_told_in_status_and_log_and_taken_when_it_may(
    make_root: Callable[..., Root], through: tuple[str, ...]
) -> None:
    """Once in the log, first in status."""
    root = make_root(behaviour={}, tables=TABLES, through=through)
    root.start()
    path = root.path / "beside.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    path.chmod(0)
    path.rename(root.settings.inbox_dir / "closed.jsonl")
    wait_until(lambda: root.events("file.unreadable"), what="a word in the log")
    wait_until(lambda: (root.status() or {})["waiting"], what="it in status")
    assert {event["file"] for event in root.events("file.unreadable")} >= {"closed.jsonl"}
    (root.settings.inbox_dir / "closed.jsonl").chmod(0o644)
    assert root.finished("closed.jsonl").state is JobState.SUCCEEDED
    assert len([event for event in root.events("file.unreadable") if event["file"] == "closed.jsonl"]) == 1
