"""The child processes that validate datasets for the daemon.

One reads ordinary files and one large ones; while files of several owners wait, a few more read theirs.
Requests and replies go through pipes; a thread for each child waits for its replies and wakes the service. A file whose
child dies is validated once more in a new one, then it is refused.
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
from daemon.job import from_json, to_json
from daemon.processes import child_environment, describe_exit
from daemon.wakeup import SupportsSet

# -P: the working directory is no place to import from.
SERVE = (sys.executable, "-P", "-m", "daemon.dataset", "serve")
LARGE_BYTES = 32 * 2**20  # read in the lane for large files
PIPELINED = 64  # requests that a child has at once, so that it never waits for the daemon's disk
IDLE_SECONDS = 600.0  # an unused child ends after so long
MAX_TRIES = 2
MAX_LANES = 3  # for ordinary files, and as many for large ones: so many owners never wait for each other


@dataclass
class _Task:
    request: Request
    size_bytes: int
    tries: int = 0
    bytes_read: int = 0


class _Child:
    """One running child and its unanswered tasks; `replies` fills from its reading thread, None is its end."""

    def __init__(self, wakeup: SupportsSet) -> None:
        self.process = subprocess.Popen(
            [*SERVE, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
            env=child_environment(),
        )
        self.replies: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        self.in_flight: deque[_Task] = deque()
        self.last_used = time.monotonic()
        stdout = self.process.stdout
        threading.Thread(
            target=_read_replies, args=(stdout, self.replies, wakeup), name="dataset-replies", daemon=True
        ).start()

    def submit(self, task: _Task) -> None:
        self.in_flight.append(task)
        self.last_used = time.monotonic()
        if self.process.stdin is not None:
            with suppress(OSError):  # it has died; its end is in `replies`
                self.process.stdin.write(to_json(task.request).encode() + b"\n")
                self.process.stdin.flush()

    def end(self) -> None:
        with suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        self.process.kill()
        self.process.wait()


@dataclass
class _Lane:
    """Files that one child reads, one after the other: of one owner, as long as there are lanes enough."""

    large: bool
    owner: int | None = None
    waiting: deque[_Task] = field(default_factory=deque)
    child: _Child | None = None

    @property
    def load(self) -> int:
        """Files that wait here or are being read."""
        return len(self.waiting) + (len(self.child.in_flight) if self.child else 0)


class ValidationPool:
    """Validates datasets in child processes; never blocks. `submit`, then `collect` at each tick."""

    def __init__(self, wakeup: SupportsSet, log: Any) -> None:
        self._wakeup = wakeup
        self._log = log
        self._small = _Lane(large=False)
        self._all = [self._small, _Lane(large=True)]

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the running children."""
        return tuple(lane.child.process.pid for lane in self._lanes() if lane.child)

    def warm_up(self) -> None:
        """Start the child for ordinary files before the first drop."""
        if self._small.child is None:
            self._small.child = _Child(self._wakeup)

    def submit(self, request: Request, size_bytes: int, owner: int | None = None) -> None:
        """Queue one file; those of one `owner` are read one after the other, and hold up nobody else's."""
        lane = self._lane_of(owner, large=size_bytes >= LARGE_BYTES)
        lane.waiting.append(_Task(request, size_bytes))
        self._feed(lane)

    def collect(self) -> Iterator[Reply]:
        """Return the replies since the last call; `failed` for a file over which two children died."""
        for lane in self._lanes():
            child = lane.child
            while child is not None:
                try:
                    reply = child.replies.get_nowait()
                except queue.Empty:
                    break
                if reply is None:
                    yield from self._replace(lane, child)
                    break
                yield from self._receive(child, reply)
            self._feed(lane)
            if lane.child and not lane.child.in_flight and time.monotonic() - lane.child.last_used > IDLE_SECONDS:
                lane.child.end()
                lane.child = None

    def busy(self) -> tuple[tuple[str, int, int], ...]:
        """Return job, bytes read and size of each file that is in the pool."""
        return tuple(
            (task.request.job_id, task.bytes_read, task.size_bytes)
            for lane in self._lanes()
            for task in (*(lane.child.in_flight if lane.child else ()), *lane.waiting)
        )

    def reading(self) -> Iterator[str]:
        """Return the jobs whose files are read now."""
        return (lane.child.in_flight[0].request.job_id for lane in self._lanes() if lane.child and lane.child.in_flight)

    def cancel(self, job_id: str) -> None:
        """Forget a file; the child that reads it ends, and another goes on with the next."""
        for lane in self._lanes():
            lane.waiting = deque(task for task in lane.waiting if task.request.job_id != job_id)
            child = lane.child
            if child is None or not child.in_flight or child.in_flight[0].request.job_id != job_id:
                continue
            child.end()
            lane.child = None
            lane.waiting.extendleft(reversed([task for task in child.in_flight if task.request.job_id != job_id]))
            self._feed(lane)

    def close(self) -> None:
        """End all children; what they had not answered is submitted again at the next start."""
        for lane in self._lanes():
            if lane.child is not None:
                lane.child.end()
                lane.child = None
            lane.waiting.clear()

    def _lanes(self) -> tuple[_Lane, ...]:
        return tuple(self._all)

    def _lane_of(self, owner: int | None, *, large: bool) -> _Lane:
        """The owner's lane, else an idle one, else a new one, else the one with least to do."""
        lanes = [lane for lane in self._all if lane.large is large]
        for lane in lanes:
            if lane.load and lane.owner == owner:
                return lane
        least = min(lanes, key=lambda lane: lane.load)
        if least.load and len(lanes) < MAX_LANES:
            least = _Lane(large=large)
            self._all.append(least)
        if not least.load:
            least.owner = owner
        return least

    def _feed(self, lane: _Lane) -> None:
        while lane.waiting:
            if lane.child is None:
                lane.child = _Child(self._wakeup)
            if len(lane.child.in_flight) >= (1 if lane.large else PIPELINED):
                return
            lane.child.submit(lane.waiting.popleft())

    def _receive(self, child: _Child, reply: Reply) -> Iterator[Reply]:
        child.last_used = time.monotonic()
        if reply.kind == "progress":
            for task in child.in_flight:
                if task.request.job_id == reply.job_id:
                    task.bytes_read = reply.bytes_read
            return
        if child.in_flight and child.in_flight[0].request.job_id == reply.job_id:
            child.in_flight.popleft()
            yield reply

    def _replace(self, lane: _Lane, child: _Child) -> Iterator[Reply]:
        """Clean up after a dead child, and pass its tasks to the next one.

        The first of them is the file that it was reading.
        """
        child.end()
        lane.child = None
        ending = describe_exit(child.process.returncode)
        for task in reversed(child.in_flight):
            lane.waiting.appendleft(task)
        if not child.in_flight:
            self._log.warning("dataset.child_ended", how=ending)
            return
        first = lane.waiting[0]
        first.tries += 1
        first.bytes_read = 0
        self._log.warning("dataset.child_died", job=first.request.job_id, how=ending, tries=first.tries)
        if first.tries >= MAX_TRIES:
            lane.waiting.popleft()
            yield Reply(job_id=first.request.job_id, kind="failed", message=f"the process that read it died: {ending}")


def _read_replies(stdout: IO[bytes] | None, replies: queue.SimpleQueue[Reply | None], wakeup: SupportsSet) -> None:
    if stdout is not None:
        with suppress(ValueError, OSError):
            for line in stdout:
                replies.put(from_json(line, Reply))
                wakeup.set()
    replies.put(None)
    with suppress(OSError):  # the service may have ended
        wakeup.set()


def validate_once(request: Request) -> Reply:
    """Validate a file in a child of its own and wait for it; for commands.

    Replies `failed` when the child dies.
    """
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
    ending = describe_exit(child.returncode)
    return Reply(job_id=request.job_id, kind="failed", message=f"the process that read it died: {ending}")
