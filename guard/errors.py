"""The guard's errors: what could not be done, to what, why, and what to do about it.

The class of an error fixes the exit code of the command.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXIT_FAILED, EXIT_USAGE, EXIT_STALE, EXIT_NOT_FOUND, EXIT_LOCKED = 1, 2, 3, 4, 5
EXIT_INTERRUPTED = 130


class GuardError(Exception):
    """`cannot OPERATION PATH: CAUSE`, and on a second line the hint."""

    exit_code: int = EXIT_FAILED

    def __init__(
        self,
        *,
        operation: str,
        path: str | os.PathLike[str],
        cause: str,
        hint: str = "",
        exit_code: int | None = None,
    ) -> None:
        super().__init__(cause)
        self.operation, self.path, self.cause, self.hint = operation, os.fspath(path), cause, hint
        if exit_code is not None:
            self.exit_code = exit_code

    def __str__(self) -> str:
        first = f"cannot {self.operation} {self.path}: {self.cause}"
        return f"{first}\nhint: {self.hint}" if self.hint else first

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call the class with the cause alone; these errors cross process pools.
        return _rebuild, (type(self), self.__dict__.copy())


def _rebuild(cls: type[GuardError], fields: dict[str, Any]) -> GuardError:
    error = cls.__new__(cls)
    Exception.__init__(error, fields["cause"])
    error.__dict__.update(fields)
    return error


class UsageError(GuardError):
    """The request itself is wrong.

    A bad argument, an unreadable recipe, a key file open to others.
    """

    exit_code = EXIT_USAGE


class NotFound(GuardError):
    """There is no such file, folder or set."""

    exit_code = EXIT_NOT_FOUND


class FileUnreadable(GuardError):
    """A file could not be read from its first byte to its last."""


class DatasetUnreadable(FileUnreadable):
    """The dataset could not be read from its first byte to its last."""


class FileChanged(GuardError):
    """A file changed while it was read, so that no digest describes it."""


class MetadataTooNew(GuardError):
    """The metadata was written by a later version of this program.

    It is neither judged nor overwritten.
    """


class MetadataUnusable(GuardError):
    """The metadata is not there, or not in a form that can be changed."""


class ModelLocked(GuardError):
    """Another process works on the model directory.

    `holder` is what that process wrote about itself; {} when it had not yet.
    """

    exit_code = EXIT_LOCKED

    def __init__(self, *, holder: dict[str, Any], **fields: Any) -> None:
        super().__init__(**fields)
        self.holder = holder


class NotLocked(GuardError):
    """A step that changes the model directory was called without its lock."""


class ClearRefused(GuardError):
    """Nothing was cleared, restored or purged; everything is as it was."""


class SealBroken(GuardError):
    """A checkpoint could not be sealed, or its seal does not verify."""


class SealKeyMissing(SealBroken):
    """A seal was made with a key, and none was given to verify it."""


class WeightsNotFinite(GuardError):
    """The weights to be sealed hold NaN or infinite values."""


class RunRefused(GuardError):
    """The Trainer is about to run from another state than was decided."""


class StorageError(GuardError):
    """The file system said no: full, read-only, not permitted, broken."""


_HINTS = {
    errno.ENOSPC: "the disk is full: free some space and try again",
    errno.EDQUOT: "the disk quota is used up: free some space and try again",
    errno.EACCES: "check who owns the folder, and its permissions",
    errno.EPERM: "check who owns the folder, and its permissions",
    errno.EROFS: "the file system is mounted read-only",
    errno.EXDEV: "the folder and its parts must be on one file system",
    errno.EIO: "the device reports an error: check the system log",
}


@contextmanager
def storage_errors(operation: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError of this operation."""
    try:
        yield
    except OSError as exc:
        raise StorageError(operation=operation, path=path, cause=explain_os_error(exc), hint=hint_for(exc)) from exc


def explain_os_error(exc: OSError) -> str:
    """Return an OSError's cause in words, with its file if it names one."""
    text = (exc.strerror or str(exc)).lower()
    return f"{text} ({exc.filename})" if exc.filename else text


def hint_for(exc: OSError) -> str:
    """Return what to do about an OSError; empty when nothing general can be said."""
    return _HINTS.get(exc.errno or 0, "")
