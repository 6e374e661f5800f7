"""One process at a time; the other learns who it is; a dead one holds nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import guard
from guard.lock import is_locked, is_locked_here

HOLDER = """
import sys, guard
lock = guard.ModelLock(sys.argv[1], owner=sys.argv[2])
try:
    lock.acquire()
except guard.ModelLocked as error:
    print("locked", error.holder.get("owner"), flush=True)
else:
    print("held", flush=True)
    sys.stdin.read()
"""


class Contender:
    """Another process that takes the lock, says what came of it, and holds it until it is told to end."""

    def __init__(self, folder: Path, owner: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, folder, owner],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline().strip()

    def end(self, number: int = 0) -> None:
        if number:
            self.process.send_signal(number)
        self.process.communicate()


def test_one_wins_and_the_other_names_the_holder(tmp_path: Path) -> None:
    other = Contender(tmp_path, "trainer of job 7")
    assert other.said == "held"
    with pytest.raises(guard.ModelLocked) as error:
        guard.ModelLock(tmp_path, owner="test").acquire()
    assert error.value.holder["pid"] == other.process.pid
    assert f"in use by trainer of job 7 (process {other.process.pid} on " in str(error.value)
    assert error.value.exit_code == 5
    other.end()
    with guard.ModelLock(tmp_path, owner="test"):
        pass


def test_of_many_at_once_exactly_one_wins(tmp_path: Path) -> None:
    contenders: list[Contender] = []
    threads = [
        threading.Thread(target=lambda n=n: contenders.append(Contender(tmp_path, f"number {n}")))  # type: ignore[misc]
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = [contender.said for contender in contenders]
    assert said.count("held") == 1
    (winner,) = (contender for contender in contenders if contender.said == "held")
    owner = json.loads((tmp_path / ".lock").read_text())["owner"]
    assert set(said) - {"held"} == {f"locked {owner}"}
    for contender in contenders:
        contender.end()
    assert winner.process.returncode == 0


def test_a_dead_holder_is_taken_over(tmp_path: Path) -> None:
    other = Contender(tmp_path, "killed")
    other.end(signal.SIGKILL)
    with guard.ModelLock(tmp_path, owner="test"):
        assert json.loads((tmp_path / ".lock").read_text())["owner"] == "test"


def test_what_a_dead_holder_wrote_is_not_taken_for_the_present_one(tmp_path: Path) -> None:
    """The file may name somebody who died while the present holder has not written yet: then nobody is
    named.
    """
    Contender(tmp_path, "killed").end(signal.SIGKILL)
    left = (tmp_path / ".lock").read_text()
    other = Contender(tmp_path, "alive")
    (tmp_path / ".lock").write_text(left)  # as it would read in between

    def write_late() -> None:
        status = {**json.loads(left), "owner": "alive", "pid": other.process.pid}
        fields = Path(f"/proc/{other.process.pid}/stat").read_text().rpartition(") ")[2].split()
        (tmp_path / ".lock").write_text(json.dumps({**status, "start_ticks": int(fields[19])}))

    timer = threading.Timer(0.1, write_late)
    timer.start()
    with pytest.raises(guard.ModelLocked, match="in use by alive"):
        guard.ModelLock(tmp_path, owner="test").acquire()
    timer.join()
    other.end()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """Data loader workers are forked; they may outlive a killed trainer for a while."""
    lock = guard.ModelLock(tmp_path, owner="test")
    lock.acquire()
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go[1])  # or the end of the parent would not end the wait below
        os.write(ready[1], b"1" if lock.is_held else b"0")
        os.read(go[0], 1)
        os._exit(0)
    try:
        assert os.read(ready[0], 1) == b"0"
        lock.release()
        other = Contender(tmp_path, "next")
        assert other.said == "held"
        other.end()
    finally:
        os.close(go[1])
        os.waitpid(child, 0)


def test_the_lock_is_seen_by_this_process_and_released_by_the_block(tmp_path: Path) -> None:
    assert not is_locked_here(tmp_path)
    with guard.ModelLock(tmp_path / "model", owner="test") as lock:
        assert is_locked_here(tmp_path / "model")
        assert is_locked_here(f"{tmp_path}/./model")
        assert not is_locked_here(tmp_path)
        with pytest.raises(RuntimeError, match="already held"):
            lock.acquire()
        with pytest.raises(guard.ModelLocked, match="in use by test"):
            guard.ModelLock(tmp_path / "model", owner="again").acquire()
    assert not is_locked_here(tmp_path / "model")
    assert (tmp_path / "model" / ".lock").read_text() == ""
    lock.release()  # once more does nothing


def test_a_lock_file_that_is_a_symlink_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".lock").symlink_to("victim")
    with pytest.raises(guard.StorageError, match="symbolic link"):
        guard.ModelLock(tmp_path, owner="test").acquire()
    assert (tmp_path / "victim").read_text() == "precious"


def test_who_looks_whether_a_lock_is_held_keeps_nobody_from_taking_it(tmp_path: Path) -> None:
    """A look holds a shared lock for a moment; a daemon that starts in this moment must not take it for another daemon."""
    assert is_locked(tmp_path) is False
    with guard.ModelLock(tmp_path, owner="test"):
        assert is_locked(tmp_path) is True
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            is_locked(tmp_path)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        for _ in range(200):
            with guard.ModelLock(tmp_path, owner="test"):
                pass
    finally:
        stop.set()
        looker.join()
    assert is_locked(tmp_path) is False


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming an account that may not look takes root")
def test_a_lock_that_may_not_be_read_is_not_called_free(open_tmp_path: Path) -> None:
    with guard.ModelLock(open_tmp_path, owner="test"):
        (open_tmp_path / ".lock").chmod(0o600)
        child = os.fork()
        if child == 0:
            os.setuid(4002)
            os._exit(0 if is_locked(open_tmp_path) is None else 1)
        assert os.waitpid(child, 0)[1] == 0
