"""In hand: the job or dropped file that the daemon handles now, noted where a sudden end leaves it to the next start.

A fault in native code, a kill by the watchdog or for memory raises no exception. So a note is made before each step over one
input, and taken away after it: what a start finds is what the daemon died over. It is one small write to a file that is
never fsynced, since the kernel keeps what a process wrote. A power cut says nothing of the input, and may or may not leave
the note: one of an earlier boot does not count.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from daemon.errors import Unexpected, is_of_machine
from daemon.processes import boot_id

NOTE_NAME = "in_hand"  # in state/
NOTE_BYTES = 4096  # a name of 255 bytes takes 1530 at most
EMPTY = b"\n" * NOTE_BYTES

File = tuple[str, str]  # priority and name


@dataclass(frozen=True, kw_only=True)
class SuddenEnd:
    """What an earlier daemon was doing, and to what, when it ended without a word."""

    step: str  # "idle" between two steps
    job: str  # "" when it was a file, or nothing
    file: File | None
    times: int  # so many daemons in a row ended in this step over it, and none has done the step in between
    lives: int  # so many daemons in a row ended over it, in whatever step
    giving_up: bool = False  # while it was given up

    @property
    def subject(self) -> tuple[str, File | None]:
        """The job or file."""
        return self.job, self.file


class InHand:
    """The note of one daemon. One without a path, as in a command, notes nothing."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.problem = ""  # why nothing can be noted now
        self._fd = -1
        self._boot_id = ""
        self._idle = b""  # what is noted between two steps
        self._steps: list[tuple[str, str, File | None]] = []  # that are being done, the innermost last
        self._notes: list[bytes] = []  # of these
        self._before: SuddenEnd | None = None  # how the daemon before this one ended
        self._is_done = False  # the step in which it ended, by now
        self.giving_up = False

    def open(self) -> SuddenEnd | None:
        """Begin to note. Returns over what the daemon before this one ended, at the first call. Raises OSError."""
        if self.path is None or self._fd >= 0:
            return None
        self._boot_id = boot_id()
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            text = os.pread(fd, NOTE_BYTES, 0)
            self._before = _end_in(text.partition(b"\n")[0], self._boot_id)
            self._idle = self._note("idle", "", None)
            os.pwrite(fd, EMPTY, 0)  # a disk that is full later has room for it already
        except OSError:
            os.close(fd)
            raise
        self._fd = fd
        self._write(self._idle)
        return self._before

    def close(self) -> None:
        """Note nothing any more: from now on the daemon is meant to end, and may be killed."""
        if self._fd >= 0:
            self._write(EMPTY)
            os.close(self._fd)
            self._fd, self.path = -1, None

    def handling(self, step: str, *, job: str = "", file: File | None = None) -> Handling:
        """Note a step, and attribute what goes wrong in it: `with in_hand.handling("claimed", file=...)`.

        No two places give a step the same name: one that was done counts as survived.
        """
        return Handling(self, step, job, file)

    def noted(self, step: str, *, job: str = "", file: File | None = None) -> Noted:
        """Note a step whose errors are told by others."""
        return Noted(self, step, job, file)

    def begin(self, step: str, job: str, file: File | None) -> None:
        """Note what is done next."""
        if self._fd >= 0:
            self._steps.append((step, job, file))
            self._notes.append(self._note(step, job, file))
            self._write(self._notes[-1])

    def end(self) -> None:
        """Take the latest note away; one around it counts again."""
        if self._notes:
            self._notes.pop()
            step, job, file = self._steps.pop()
            before = self._before
            if before is not None and before.step == step and before.subject == (job, file):
                self._is_done = True
            self._write(self._notes[-1] if self._notes else self._idle)

    def _note(self, step: str, job: str, file: File | None) -> bytes:
        before = self._before if self._before is not None and self._before.subject == (job, file) else None
        is_same_step = before is not None and before.step == step and not self._is_done
        note = {
            "step": step,
            "job": job,
            "file": file,
            "times": before.times if before is not None and is_same_step else 0,
            "lives": before.lives if before is not None else 0,
            "giving_up": self.giving_up,
            "boot_id": self._boot_id,
        }
        return json.dumps(note).encode("ascii")

    def _write(self, note: bytes) -> None:
        if self._fd < 0:
            return
        try:
            os.pwrite(self._fd, note + b"\n", 0)
            self.problem = ""
        except OSError as error:  # what a disk refuses holds the queue by itself
            self.problem = (
                f"{self.path} cannot be written: {error.strerror}; what crashes the daemon would not be known"
            )


class Noted:
    """One step over a job or a dropped file."""

    __slots__ = ("_file", "_in_hand", "_job", "_step")

    def __init__(self, in_hand: InHand, step: str, job: str, file: File | None) -> None:
        self._in_hand, self._step, self._job, self._file = in_hand, step, job, file

    def __enter__(self) -> None:
        """Note it."""
        self._in_hand.begin(self._step, self._job, self._file)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the note away."""
        self._in_hand.end()


class Handling(Noted):
    """A step whose errors are the input's own: what the machine refuses passes as it is, the rest is Unexpected."""

    __slots__ = ()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the note away; raises Unexpected."""
        self._in_hand.end()
        if isinstance(error, Exception) and not isinstance(error, Unexpected) and not is_of_machine(error):
            raise Unexpected(self._step, job=self._job, file=self._file, cause=error)


def _end_in(line: bytes, boot: str) -> SuddenEnd | None:
    """The sudden end that a note tells of; None when it is empty, torn, or of another boot."""
    try:
        note: dict[str, Any] = json.loads(line)
        if note["boot_id"] != boot:
            return None
        file = note["file"]
        return SuddenEnd(
            step=str(note["step"]),
            job=str(note["job"]),
            file=(str(file[0]), str(file[1])) if file else None,
            times=int(note["times"]) + 1,
            lives=int(note["lives"]) + 1,
            giving_up=bool(note["giving_up"]),
        )
    except (ValueError, TypeError, KeyError, IndexError):
        return None
