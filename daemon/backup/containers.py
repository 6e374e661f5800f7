"""What writing and reading a backup share: its forms, a tar file or a folder of snapshots, and what goes wrong with them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from daemon.errors import ConfigError, DropforgeError
from guard.atomic import fsync_dir

BLOCK_BYTES = 2**20
FSYNCS_AT_ONCE = 32
TAR_SUFFIXES = {".tar": "", ".tar.gz": "gz", ".tgz": "gz", ".tar.zst": "zst"}
# Archives that somebody may take this program to write: a folder of that name would be a surprise.
FOREIGN_SUFFIXES = (".zip", ".7z", ".xz", ".bz2", ".gz", ".zst", ".tbz2", ".txz", ".tzst")
INCOMPLETE = ".incomplete-"  # a snapshot that is being written; removed by the next backup into the same folder
MAX_WINDOW_BYTES = 2**27


class ChangedWhileRead(Exception):
    """A file was cut short or replaced while it was copied."""


class DamagedBackup(DropforgeError):
    """A backup that is not as it was written, or was never one."""


class Readable(Protocol):
    """The content of a file."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes; none at the end."""
        ...


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing in a backup. `stream` is of a file, and read before the next entry is asked for."""

    name: str
    kind: str  # "file" | "folder" | "link"
    mode: int = 0
    target: str = ""
    stream: Readable | None = None


def tar_compression(path: Path) -> str | None:
    """Return how a tar file of this name is compressed ("", "gz", "zst"); None when the name is a folder's.

    Raises ConfigError for the name of another kind of archive.
    """
    name = path.name.lower()
    for suffix, compression in TAR_SUFFIXES.items():
        if name.endswith(suffix):
            return compression
    if name.endswith(FOREIGN_SUFFIXES):
        raise ConfigError(
            operation="use",
            subject=path,
            cause="a backup is no archive of this kind",
            hint=f"end its name in {', '.join(TAR_SUFFIXES)}, or name a folder",
        )
    return None


def make_durable(files: Iterable[Path], folders: Iterable[Path]) -> None:
    """Make new files and then their folders durable, many at once: the disk commits them together. Raises OSError."""
    with ThreadPoolExecutor(max_workers=FSYNCS_AT_ONCE) as pool:
        for paths, act in ((files, _fsync_new), (folders, fsync_dir)):
            for _ in pool.map(act, paths):
                pass


def _fsync_new(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
        forget_cached(descriptor)
    finally:
        os.close(descriptor)


def forget_cached(descriptor: int) -> None:
    """Have what is verified come from the disk, where the system can do that."""
    with suppress(OSError):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
