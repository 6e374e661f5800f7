"""The daemon's errors: what was tried, on what, why it failed, what to do; the class fixes the exit code."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

SQLITE_FULL = 13  # sqlite3.SQLITE_FULL, of a library that is imported in daemon.store alone


class DropforgeError(Exception):
    """One failed operation, as one sentence and a hint.

    `str(error)` is `cannot OPERATION SUBJECT: CAUSE`, with `hint: HINT` on a second line when there is one.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, *, operation: str, subject: str | Path = "", cause: str, hint: str = "") -> None:
        self.operation = operation
        self.subject = str(subject)
        self.cause = cause
        self.hint = hint
        super().__init__(operation, self.subject, cause, hint)

    @property
    def sentence(self) -> str:
        """The error without its hint, on one line."""
        target = f" {self.subject}" if self.subject else ""
        return f"cannot {self.operation}{target}: {self.cause}"

    def __str__(self) -> str:
        return f"{self.sentence}\nhint: {self.hint}" if self.hint else self.sentence


class ConfigError(DropforgeError):
    """Settings that are missing, misspelt or out of range."""

    exit_code = 2


class InvalidSettings(ConfigError):
    """Settings with faults, a sentence each."""

    def __init__(self, *, operation: str, subject: str | Path, faults: Sequence[str], hint: str) -> None:
        super().__init__(operation=operation, subject=subject, cause="; ".join(faults), hint=hint)
        self.faults = tuple(faults)


class RejectedData(DropforgeError):
    """A dataset that cannot be trained as it is."""

    exit_code = 3


class NotFound(DropforgeError):
    """A job, version or file that is not there."""

    exit_code = 4


class RootHeld(DropforgeError):
    """Another daemon owns this root."""

    exit_code = 5


class TryLater(DropforgeError):
    """Nothing is wrong; it cannot be done at this moment."""

    exit_code = 75


class StoreError(DropforgeError):
    """The job store cannot be read or written now; the daemon holds until it can, rather than guess."""

    is_of_machine: ClassVar[bool] = True


def is_no_space(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, says that the disk or a quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == SQLITE_FULL:
            return True
        error = error.__cause__
    return False


def is_gone(error: OSError) -> bool:
    """Whether an error says that a file was moved or removed by another process."""
    return error.errno in (errno.ENOENT, errno.ESTALE)


# Errors of the machine, which pass when it is mended, whatever file or job met them.
_OF_MACHINE = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EACCES),
        *(errno.EPERM, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN),
        *(errno.EAGAIN, errno.EBUSY),
    }
)


def is_of_machine(error: BaseException) -> bool:
    """Whether an error says nothing of the file or job in hand: the disk, the store, or the system refused."""
    if isinstance(error, StoreError):
        return error.is_of_machine
    return isinstance(error, TryLater) or (isinstance(error, OSError) and error.errno in _OF_MACHINE)


class Unexpected(Exception):
    """What nobody foresaw, with what was being done, and to which job or dropped file; its cause has the traceback."""

    def __init__(self, step: str, *, job: str, file: tuple[str, str] | None, cause: Exception) -> None:
        super().__init__(step)
        self.step = step
        self.job = job
        self.file = file  # priority and name
        self.__cause__ = cause

    def __str__(self) -> str:
        cause = self.__cause__
        return f"an unexpected error while it was {self.step}: {type(cause).__name__}: {cause}"
