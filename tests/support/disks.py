"""Small disks for tests: a tmpfs, mounted, filled and remounted, which takes root; and one that fails on purpose."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def on_another_disk(path: Path) -> Path:
    """Return a folder for temporary files that is on another file system than `path`; skips the test without one."""
    for folder in map(Path, ("/dev/shm", "/tmp", "/var/tmp")):
        if folder.is_dir() and os.access(folder, os.W_OK) and folder.stat().st_dev != path.stat().st_dev:
            return folder
    pytest.skip("no second file system here")


@contextmanager
def mounted(path: Path, size: str, *, options: str = "") -> Iterator[None]:
    """A tmpfs of this size on `path`, away again afterwards."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(filter(None, (f"size={size}", options))), "tmpfs", path],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def remount(path: Path, options: str) -> None:
    """Change the options of a mounted disk."""
    subprocess.run(["mount", "-o", f"remount,{options}", path], check=True)


@contextmanager
def full(path: Path) -> Iterator[None]:
    """A disk without one free block."""
    filler = path / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4096"], capture_output=True, check=False)
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def without_inodes(path: Path) -> Iterator[None]:
    """A disk that holds as many files as it can."""
    folder = path / "fillers"
    folder.mkdir()
    made = []
    try:
        for number in range(1_000_000):
            made.append(folder / str(number))
            made[-1].touch()
    except OSError:
        made.pop()
    try:
        yield
    finally:
        for file in made:
            file.unlink()
        folder.rmdir()


def build_failing_disk(folder: Path) -> Path:
    """The library of faults.c, to be preloaded."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to build the failing disk with")
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library
