"""The child processes that read datasets for the daemon: one for ordinary files, one that large files do not block.

A child is asked and answers through pipes; a thread per child only waits for its answers and rings. A child that dies
is a fact about the file that it was reading: it is asked once more in a fresh one, then the file is refused.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from daemon.dataset.requests import Reply, Request
from daemon.inbox.watcher import Rings
from daemon.job import from_json, to_json
from daemon.processes import child_environment, describe_exit

# -P: the working directory is no place to import from.
SERVE = (sys.executable, "-P", "-m", "daemon.dataset", "serve")
LARGE_BYTES = 32 * 2**20  # read in the lane for large files
PIPELINED = 64  # requests that a child may have at once, so that it never waits for the daemon's disk
IDLE_SECONDS = 600.0  # an unused child ends after so long
MAX_TRIES = 2


@dataclass
class _Asked:
    request: Request
    size_bytes: int
    tries: int = 0
    bytes_read: int = 0


class _Child:
    """One running child and what it still owes; `replies` fills from its reading thread, None is its end."""

    def __init__(self, wakeup: Rings) -> None:
        self.process = subprocess.Popen(
            [*SERVE, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
            env=child_environment(),
        )
        self.replies: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        self.owed: deque[_Asked] = deque()
        self.last_used = time.monotonic()
        stdout = self.process.stdout
        threading.Thread(
            target=_listen, args=(stdout, self.replies, wakeup), name="dataset-replies", daemon=True
        ).start()

    def ask(self, asked: _Asked) -> None:
        self.owed.append(asked)
        self.last_used = time.monotonic()
        if self.process.stdin is not None:
            with suppress(OSError):  # it has died; its end is in `replies`
                self.process.stdin.write(to_json(asked.request).encode() + b"\n")
                self.process.stdin.flush()

    def end(self) -> None:
        with suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        self.process.kill()
        self.process.wait()


@dataclass
class _Lane:
    waiting: deque[_Asked] = field(default_factory=deque)
    child: _Child | None = None


class ValidationPool:
    """Runs dataset passes in child processes; never blocks. `ask`, then `collect` at each tick."""

    def __init__(self, wakeup: Rings, log: Any) -> None:
        self._wakeup = wakeup
        self._log = log
        self._small, self._large = _Lane(), _Lane()

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the running children."""
        return tuple(lane.child.process.pid for lane in self._lanes() if lane.child)

    def warm_up(self) -> None:
        """Start the child for ordinary files now, so that the first drop does not wait for it."""
        if self._small.child is None:
            self._small.child = _Child(self._wakeup)

    def ask(self, request: Request, size_bytes: int) -> None:
        """Queue one file."""
        lane = self._large if size_bytes >= LARGE_BYTES else self._small
        lane.waiting.append(_Asked(request, size_bytes))
        self._feed(lane)

    def collect(self) -> Iterator[Reply]:
        """What has been answered since the last call; a child that died twice over a file answers `failed`."""
        for lane in self._lanes():
            child = lane.child
            while child is not None:
                try:
                    reply = child.replies.get_nowait()
                except queue.Empty:
                    break
                if reply is None:
                    yield from self._bury(lane, child)
                    break
                yield from self._take(child, reply)
            self._feed(lane)
            if lane.child and not lane.child.owed and time.monotonic() - lane.child.last_used > IDLE_SECONDS:
                lane.child.end()
                lane.child = None

    def busy(self) -> tuple[tuple[str, int, int], ...]:
        """Job, bytes read and size of each file that is being read or waits for it."""
        return tuple(
            (asked.request.job_id, asked.bytes_read, asked.size_bytes)
            for lane in self._lanes()
            for asked in (*(lane.child.owed if lane.child else ()), *lane.waiting)
        )

    def forget(self, job_id: str) -> None:
        """A job was cancelled: do not begin its pass; one that has begun is answered into the void."""
        for lane in self._lanes():
            lane.waiting = deque(asked for asked in lane.waiting if asked.request.job_id != job_id)

    def close(self) -> None:
        """End all children; what they had not answered is asked again at the next start."""
        for lane in self._lanes():
            if lane.child is not None:
                lane.child.end()
                lane.child = None
            lane.waiting.clear()

    def _lanes(self) -> tuple[_Lane, _Lane]:
        return self._small, self._large

    def _feed(self, lane: _Lane) -> None:
        while lane.waiting:
            if lane.child is None:
                lane.child = _Child(self._wakeup)
            if len(lane.child.owed) >= (PIPELINED if lane is self._small else 1):
                return
            lane.child.ask(lane.waiting.popleft())

    def _take(self, child: _Child, reply: Reply) -> Iterator[Reply]:
        child.last_used = time.monotonic()
        if reply.kind == "progress":
            for asked in child.owed:
                if asked.request.job_id == reply.job_id:
                    asked.bytes_read = reply.bytes_read
            return
        if child.owed and child.owed[0].request.job_id == reply.job_id:
            child.owed.popleft()
            yield reply

    def _bury(self, lane: _Lane, child: _Child) -> Iterator[Reply]:
        """The file that a dead child was reading is the first that it owes; the others go to the next child."""
        child.end()
        lane.child = None
        how = describe_exit(child.process.returncode)
        for asked in reversed(child.owed):
            lane.waiting.appendleft(asked)
        if not child.owed:
            self._log.warning("dataset.child_ended", how=how)
            return
        first = lane.waiting[0]
        first.tries += 1
        first.bytes_read = 0
        self._log.warning("dataset.child_died", job=first.request.job_id, how=how, tries=first.tries)
        if first.tries >= MAX_TRIES:
            lane.waiting.popleft()
            yield Reply(job_id=first.request.job_id, kind="failed", message=f"the process that read it died: {how}")


def _listen(stdout: IO[bytes] | None, replies: queue.SimpleQueue[Reply | None], wakeup: Rings) -> None:
    if stdout is not None:
        with suppress(ValueError, OSError):
            for line in stdout:
                replies.put(from_json(line, Reply))
                wakeup.set()
    replies.put(None)
    with suppress(OSError):  # the bell may be gone when the daemon leaves
        wakeup.set()


def pass_once(request: Request) -> Reply:
    """One pass in a child of its own, waited for; for commands. Answers `failed` when the child dies."""
    child = subprocess.run(
        [*SERVE, str(os.getpid())],
        input=to_json(request).encode() + b"\n",
        stdout=subprocess.PIPE,
        env=child_environment(),
        cwd="/",
        check=False,
    )
    if child.returncode == 0:
        for line in child.stdout.splitlines():
            reply = from_json(line, Reply)
            if reply.kind != "progress":
                return reply
    how = describe_exit(child.returncode)
    return Reply(job_id=request.job_id, kind="failed", message=f"the process that read it died: {how}")
