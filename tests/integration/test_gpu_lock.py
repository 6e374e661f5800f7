"""The lock that daemons of one machine share, tried by accounts that trust each other in nothing; and a broken driver."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daemon.gpu import TMPFILES_LINE, GpuLock
from daemon.job import JobState
from tests.support.root import Root, wait_until

ALICE, BOB, MALLORY = 4001, 4002, 4003
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acting as other accounts takes root")


@contextmanager
def as_account(uid: int, work: Callable[[], str]) -> Iterator[str]:
    """Do `work` in a process of another account; it lives on, with what it holds, until the end of the block."""
    said, tell = os.pipe()
    go_on, leave = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(leave)
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            os.umask(0o077)
            os.write(tell, (work() or "taken").encode())
        except BaseException as error:
            os.write(tell, repr(error).encode())
        os.read(go_on, 1)
        os._exit(0)
    for descriptor in (tell, go_on):
        os.close(descriptor)
    try:
        yield os.read(said, 10_000).decode()
    finally:
        os.close(leave)
        os.waitpid(child, 0)
        os.close(said)


@pytest.fixture
def folder(open_tmp_path: Path) -> Path:
    """A folder as /run/dropforge is."""
    shared = open_tmp_path / "locks"
    shared.mkdir()
    shared.chmod(0o1777)
    return shared


def take(folder: Path, owner: str) -> Callable[[], str]:
    return lambda: GpuLock(folder / "dropforge-GPU-0.lock").acquire(owner)


def squat_file(path: Path) -> None:
    path.touch(mode=0o600)


def squat_link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


SQUATTERS: dict[str, Callable[[Path], None]] = {
    "a closed file": squat_file,
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path, 0o666),
    "a link": squat_link,
}


@needs_root
def test_accounts_take_turns_whoever_came_first(folder: Path) -> None:
    with as_account(ALICE, take(folder, "the daemon of alice")) as alice:
        assert alice == "taken"
        with as_account(BOB, take(folder, "the daemon of bob")) as bob:
            assert "in use by the daemon of alice" in bob
    with as_account(BOB, take(folder, "the daemon of bob")) as bob:
        assert bob == "taken"
        with as_account(ALICE, take(folder, "the daemon of alice")) as alice:
            assert "in use by the daemon of bob" in alice
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o666]


@needs_root
@pytest.mark.parametrize("squatter", SQUATTERS)
def test_nobody_closes_the_lock_to_others_by_coming_first(folder: Path, squatter: str) -> None:
    def squat() -> str:
        SQUATTERS[squatter](folder / "dropforge-GPU-0.lock")
        return ""

    with (
        as_account(MALLORY, squat) as mallory,
        as_account(ALICE, take(folder, "the daemon of alice")) as alice,
        as_account(BOB, take(folder, "the daemon of bob")) as bob,
    ):
        assert (mallory, alice) == ("taken", "taken")
        assert "in use by the daemon of alice" in bob


def test_a_folder_that_cannot_be_used_is_told_with_what_to_do(make_root: Callable[..., Root], tmp_path: Path) -> None:
    (tmp_path / "locks").touch()  # no folder
    root = make_root(behaviour={}, tables={"executor": {"gpu_lock": str(tmp_path / "locks" / "gpu.lock")}})
    root.start()
    root.drop("a.jsonl", [{"text": "a"}])
    status = wait_until(lambda: (now := root.status()) and "GPU lock" in now["reason"] and now)
    assert status
    assert TMPFILES_LINE[:20] in status["reason"]
    (tmp_path / "locks").unlink()
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED


def test_a_daemon_that_starts_with_a_broken_driver_waits_for_it(make_root: Callable[..., Root], tmp_path: Path) -> None:
    """The CPU in its place would take days, and make another run of it."""
    pytest.importorskip("pynvml", reason="nvidia-ml-py (extra gpu) is not installed")
    devices = tmp_path / "dev"
    devices.mkdir()
    (devices / "nvidia0").touch()
    root = make_root(behaviour={}, before=("tests.support.injected:put", "daemon.gpu:DEVICES", str(devices)))
    root.start()
    root.drop("a.jsonl", [{"text": "a"}])
    status = wait_until(lambda: (now := root.status()) and "driver" in now["reason"] and now)
    assert status
    assert status["status"] == "waiting"
    job = root.job("a.jsonl")
    assert job is not None
    assert (job.state, job.attempt) == (JobState.QUEUED, 0)
    (devices / "nvidia0").unlink()
    assert root.finished("a.jsonl").attempt == 1
