"""A disk whose power can be cut: an ext4 file system on a loop device that keeps what was fsynced, and little else.

Journal commits and write-back by age are put off for longer than a test takes, and a rename has no file written for it, so
that what nobody fsynced is in memory alone. A cut is a copy of the image below the file system, taken while every process
that works there is stopped and the device is at rest: what a disk holds when its power goes at that moment.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.root import children_of, wait_until

IMAGE_BYTES = 2 * 2**30  # sparse; a run wants to see 1.2 GiB free
COMMIT_SECONDS = 3600  # until the journal is committed without being asked
QUIET_SECONDS = 0.002  # two looks at the device, this far apart, see the same counters
TOOLS = ("mkfs.ext4", "losetup", "mount", "umount")


def why_no_disk() -> str:
    """Say why such a disk cannot be had here; empty when it can."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not installed"
    if os.geteuid() != 0:
        return "only root may mount an image"
    found = _run("losetup", "--find", check=False)
    return f"no loop device: {found.stderr.strip()}" if found.returncode else ""


class Disk:
    """The disk, mounted at `mount_point` while `mounted` lasts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mount_point = folder / "disk"
        self.mount_point.mkdir(parents=True)
        self._image = folder / "image"
        with self._image.open("xb") as image:
            image.truncate(IMAGE_BYTES)
        # Nothing is left for the kernel to initialise by and by: each write to the device is one that somebody caused.
        lazy = "lazy_itable_init=0,lazy_journal_init=0"
        _run("mkfs.ext4", "-q", "-F", "-m", "0", "-N", "8192", "-J", "size=8", "-E", lazy, str(self._image))
        self._device = ""

    @contextmanager
    def mounted(self, image: Path | None = None) -> Iterator[Path]:
        """Mount the disk, or a cut of it, at its one place; a cut's journal is replayed."""
        device = _run("losetup", "--find", "--show", str(image or self._image)).stdout.strip()
        try:
            options = f"commit={COMMIT_SECONDS},noauto_da_alloc,noatime"
            _run("mount", "-t", "ext4", "-o", options, device, str(self.mount_point))
            self._device = device
            try:
                yield self.mount_point
            finally:
                wait_until(self._unmount, 30, f"{self.mount_point} to be unmounted")
        finally:
            self._device = ""
            _run("losetup", "--detach", device)

    def _unmount(self) -> bool:
        return _run("umount", str(self.mount_point), check=False).returncode == 0

    def sync(self) -> None:
        """Make everything durable, as it is long after the last change."""
        _run("sync", "--file-system", str(self.mount_point))

    def cut(self, to: Path) -> None:
        """Copy what the disk holds now. The caller has stopped every process that writes to it."""
        while True:
            before = self._writes()
            time.sleep(QUIET_SECONDS)
            if before != self._writes():
                continue
            _run("cp", "--sparse=always", str(self._image), str(to))
            if before == self._writes():
                return

    def _writes(self) -> tuple[int, int, int]:
        """Writes and flushes that the device has done, and what it is doing."""
        fields = Path(f"/sys/block/{Path(self._device).name}/stat").read_text().split()
        return int(fields[4]), int(fields[15]), int(fields[8])


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process and all that descend from it, the oldest first; a call that is under way comes to its end before."""
    pids: list[int] = []
    waiting = [pid]
    try:
        while waiting:
            current = waiting.pop()
            with suppress(ProcessLookupError):
                os.kill(current, signal.SIGSTOP)
                pids.append(current)
                wait_until(lambda current=current: _is_at_rest(current), what=f"process {current} to stop")
            waiting += [child for child, _ in children_of(current) if child not in pids and child not in waiting]
        yield
    finally:
        for current in pids:
            with suppress(ProcessLookupError):
                os.kill(current, signal.SIGCONT)


def _is_at_rest(pid: int) -> bool:
    """Whether each thread of a process is stopped; one that is gone is at rest as well."""
    try:
        states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:
        return False  # a thread ended meanwhile
    return all(state in "TtZX" for state in states)


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stderr}"
    return done
