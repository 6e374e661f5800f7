"""A disk that fills up while a run writes to it, told as what it is.

torch and safetensors lose the system's word on their way ("unexpected pos 64 vs 0"), so the disk itself is asked.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daemon.errors import is_no_space
from daemon.job import FailureKind
from daemon.trainer.errors import Interrupted, RunFailure
from guard import WeightsNotFinite

# A run whose disk has no room for so little cannot go on, whatever its error was.
LEAST_BYTES = 1024 * 1024


@contextmanager
def full_disk_is_told(staging_dir: Path) -> Iterator[None]:
    """Raise RunFailure(NO_SPACE) for what fails inside while the disk of `staging_dir` is full.

    What this run was staging is removed then: it is torn, nobody can use it, and the daemon needs its bytes to write
    down what happened. Sealed checkpoints have left `staging_dir` and stay.
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
    """Whether the file system, or our quota on it, has no room for LEAST_BYTES."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            os.posix_fallocate(probe.fileno(), 0, LEAST_BYTES)
    except OSError as error:
        return is_no_space(error)
    return False
