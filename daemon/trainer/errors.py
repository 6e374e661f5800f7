"""A run's failure, typed; torch-free so that every part of the trainer can raise it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from daemon.errors import is_no_space
from daemon.job import FailureKind, MemoryMeasure
from guard import WeightsNotFinite

# A run whose disk has less room than this cannot go on, whatever its error was.
MIN_FREE_BYTES = 1024 * 1024


class RunFailure(Exception):
    """The run cannot succeed as things are; the kind decides what the daemon does next."""

    def __init__(
        self, kind: FailureKind, message: str, *, hint: str = "", tried: tuple[MemoryMeasure, ...] = ()
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.hint = hint
        self.tried = tried  # of OUT_OF_MEMORY: what did not suffice

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with every attribute: it crosses from the processes that tokenise."""
        return _rebuild, (self.kind, self.message, self.hint, self.tried)


def _rebuild(kind: FailureKind, message: str, hint: str, tried: tuple[MemoryMeasure, ...]) -> RunFailure:
    return RunFailure(kind, message, hint=hint, tried=tried)


class Interrupted(Exception):
    """The run was asked to stop before it had anything to save."""


@contextmanager
def report_full_disk(staging_dir: Path) -> Iterator[None]:
    """Report a full disk as RunFailure(NO_SPACE).

    torch and safetensors lose the system's error ("unexpected pos 64 vs 0"), so the disk of `staging_dir` itself is asked.
    What the run was staging is removed: it is torn, and the daemon needs the bytes to write down what happened. Sealed
    checkpoints have left `staging_dir` and stay.
    """
    try:
        yield
    except (RunFailure, Interrupted, WeightsNotFinite):
        raise
    except Exception as error:
        if not (is_no_space(error) or is_full(staging_dir)):
            raise
        for torn in staging_dir.iterdir():
            shutil.rmtree(torn, ignore_errors=True)
        raise RunFailure(
            FailureKind.NO_SPACE,
            f"the disk of {staging_dir.parent} is full",
            hint="free some space; the run goes on from its last sealed checkpoint",
        ) from error


def is_full(folder: Path) -> bool:
    """Return whether the file system, or the user's quota on it, lacks MIN_FREE_BYTES."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            os.posix_fallocate(probe.fileno(), 0, MIN_FREE_BYTES)
    except OSError as error:
        return is_no_space(error)
    return False
