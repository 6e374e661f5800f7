"""Who has a file open for writing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path


class WriterState(Enum):
    """Whether a process of this machine has a file open for writing."""

    ABSENT = auto()
    PRESENT = auto()
    UNKNOWN = auto()  # not our file and not our processes: the kernel does not say


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A process that has the file open for writing."""

    pid: int
    command: str


def writer_state(descriptor: int) -> WriterState:
    """Tell whether a process has the file open for writing.

    A read lease is granted only while none has. `descriptor` is open for reading. The lease is given back at once; an
    open in between waits for microseconds. Where leases are not to be had (another owner's file, a network file
    system), /proc is searched.
    """
    try:
        # A broken lease raises SIGIO, which would end this process; SIGURG is ignored by default.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EBUSY):
            return WriterState.PRESENT
        found = os.fstat(descriptor)
        return WriterState.PRESENT if find_writer(found.st_dev, found.st_ino) is not None else WriterState.UNKNOWN
    with suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return WriterState.ABSENT


def find_writer(device: int, inode: int) -> Writer | None:
    """Find a process that has the file open for writing, among those that we may inspect."""
    for pid in _processes():
        folder = f"/proc/{pid}/fd"
        try:
            numbers = os.listdir(folder)  # noqa: PTH208  thousands of times: without Path objects
        except OSError:
            continue  # it ended, or it is not ours
        for number in numbers:
            with suppress(OSError, ValueError, IndexError):
                found = os.stat(f"{folder}/{number}")  # noqa: PTH116  likewise
                if (found.st_dev, found.st_ino) == (device, inode) and _opened_for_writing(pid, number):
                    return Writer(pid=pid, command=_command(pid))
    return None


def _processes() -> Iterator[int]:
    own = os.getpid()
    return (int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit() and int(entry.name) != own)


def _opened_for_writing(pid: int, number: str) -> bool:
    text = Path(f"/proc/{pid}/fdinfo/{number}").read_text(encoding="ascii", errors="replace")
    flags = next(line.split()[1] for line in text.splitlines() if line.startswith("flags:"))
    return int(flags, 8) & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    return "?"
