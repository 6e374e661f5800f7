"""One training at a time among several daemons of one machine: a lock file that they share.

The lock is a flock(2) on an open file that the trainer inherits: it lasts as long as either of the two lives, so that a
trainer that outlives its daemon still keeps the others away, and nothing has to be cleaned up after a crash.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path

from daemon.job import utc_now
from daemon.text import escape
from guard.atomic import write_all


class GpuLock:
    """The lock at `path`; None: there is nobody to share with, and it is always ours."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._fd: int | None = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What a trainer has to inherit."""
        return () if self._fd is None else (self._fd,)

    def take(self, owner: str) -> str:
        """Try to get it for `owner`, a text that the others show; returns why not, empty when it is ours.

        Raises OSError when the file cannot be made.
        """
        if self.path is None or self._fd is not None:
            return ""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(fd)
            os.close(fd)
            return f"the GPU is in use by {holder}"
        # Only for people: on a full disk the lock holds all the same.
        with suppress(OSError):
            os.ftruncate(fd, 0)
            write_all(fd, json.dumps({"owner": owner, "since": utc_now()}).encode())
        self._fd = fd
        return ""

    def give(self) -> None:
        """Let go; a trainer that inherited it keeps it until it ends."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _holder(fd: int) -> str:
    try:
        told = json.loads(os.pread(fd, 4096, 0))
        return f"{escape(str(told['owner']))} since {escape(str(told['since']))}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another daemon"
