"""The doorbell: inotify says that something may have arrived; what is there, a look at the folder says.

Watches are flat and ask for arrivals only. Nothing waits in a queue of ours: watchdog's reading thread notes the name
and rings, so a burst costs microseconds an event, an overflow loses nothing but the notes, and our own renames out of
the folder are not seen at all. A canary file shows at every rescan that events still arrive.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from watchdog.observers.inotify_c import CallbackId, InotifyConstants, InotifyEvent, InotifyFD, Mask

from daemon.job import Priority

CANARY = ".dropforge-canary"
MAX_NOTES = 20_000  # names noted between two ticks; beyond, a scan finds them and they settle like any other
REBUILD_TRIES = 2  # canaries that may be missed before polling takes over
RETRY_WATCH_SECONDS = 60.0  # between attempts to leave polling again

# Types whose changes by other machines (or by a process behind FUSE) raise no events here.
REMOTE_TYPES = frozenset(
    {
        "9p", "afs", "beegfs", "ceph", "cifs", "coda", "fuse", "fuseblk", "gfs2", "gpfs", "lustre", "ncpfs", "nfs",
        "nfs4", "ocfs2", "orangefs", "smb3", "smbfs", "virtiofs", "vboxsf", "vmhgfs", "wekafs",
    }
)  # fmt: skip

_ARRIVALS = Mask(
    InotifyConstants.IN_MOVED_TO
    | InotifyConstants.IN_CREATE
    | InotifyConstants.IN_CLOSE_WRITE
    | InotifyConstants.IN_DELETE_SELF
    | InotifyConstants.IN_MOVE_SELF
    | InotifyConstants.IN_ONLYDIR
)
_LOST = InotifyConstants.IN_DELETE_SELF | InotifyConstants.IN_MOVE_SELF | InotifyConstants.IN_UNMOUNT

# watchdog warns of an overflow by itself; without a handler Python would print that to stderr.
logging.getLogger("watchdog").addHandler(logging.NullHandler())


class Rings(Protocol):
    """Something that wakes the service; safe from any thread."""

    def set(self) -> None: ...


@dataclass
class Note:
    """What was heard of one name since the last look."""

    closes: int = 0  # times a writer closed it
    renamed_in: bool = False


@dataclass(frozen=True, kw_only=True)
class Heard:
    """Everything since the last look; `scan` when names may be missing."""

    notes: Mapping[tuple[Priority, str], Note]
    scan: bool


class _Ear:
    """watchdog's callback for one folder. An exception here would end the thread that reads: it only notes."""

    def __init__(self, watch: FolderWatch, priority: Priority) -> None:
        self._watch = watch
        self._priority = priority

    def on_event(self, event: InotifyEvent) -> None:
        with suppress(Exception):  # a bell that cannot be rung; the next rescan comes without it
            self._watch.hear(self._priority, event.name, event.mask)

    def on_watch_deleted(self, wd: int) -> None:
        with suppress(Exception):
            self._watch.lose()

    def on_queue_overflow(self) -> None:
        if self._priority is Priority.NORMAL:  # every folder is told; it counts once
            with suppress(Exception):
                self._watch.overflow()


class FolderWatch:
    """Watches folders, by priority; polling where events do not come. One thread calls everything but the callbacks."""

    def __init__(self, folders: Mapping[Priority, Path], wakeup: Rings, log: Any) -> None:
        self._folders = dict(folders)
        self._wakeup = wakeup
        self._log = log
        self._lock = threading.Lock()
        self._notes: dict[tuple[Priority, bytes], Note] = {}
        self._scan = True
        self._lost = False
        self._canaries_heard: set[Priority] = set()
        self._canaries_sent: set[Priority] = set()
        self._identities: dict[Priority, tuple[int, int]] = {}
        self._inotify: InotifyFD | None = None
        self._missed = 0
        self._retry_at = 0.0
        self.polling_reason = "not watching yet"
        self.overflows = 0
        self.rebuilds = 0

    @property
    def mode(self) -> str:
        """`inotify`, or `polling (why)`."""
        return "inotify" if self._inotify is not None else f"polling ({self.polling_reason})"

    @property
    def polling(self) -> bool:
        """Whether only scans find files."""
        return self._inotify is None

    def start(self, now: float) -> None:
        """Begin to watch; falls back to polling, never raises for lack of events."""
        remote = remote_type(self._folders[Priority.NORMAL])
        if remote is not None:
            self._poll(f"{remote} sends no events of other machines", float("inf"))
            return
        try:
            inotify = InotifyFD()
        except OSError as error:
            self._poll(error.strerror or str(error), now + RETRY_WATCH_SECONDS)
            return
        try:
            inotify.start()
            self._identities = {}
            for priority, folder in self._folders.items():
                identity = identity_of(folder)
                if identity is not None:
                    inotify.add_callback(
                        os.fsencode(folder), _ARRIVALS, _Ear(self, priority), CallbackId(list(Priority).index(priority))
                    )
                    self._identities[priority] = identity
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread could be started
            inotify.stop()
            self._poll(getattr(error, "strerror", None) or str(error), now + RETRY_WATCH_SECONDS)
            return
        self._inotify = inotify
        self._lost = False
        self._canaries_sent.clear()
        self._scan = True

    def stop(self) -> None:
        """End watching; the canaries are removed."""
        self._close()
        for folder in self._folders.values():
            with suppress(OSError):
                (folder / CANARY).unlink()

    def take(self) -> Heard:
        """What was heard since the last call."""
        with self._lock:
            notes, self._notes = self._notes, {}
            scan, self._scan = self._scan, False
        return Heard(notes={(priority, os.fsdecode(name)): note for (priority, name), note in notes.items()}, scan=scan)

    def check(self, now: float) -> None:
        """Once a rescan: are these still the folders that are watched, and do events still arrive?"""
        current = {priority: found for priority, path in self._folders.items() if (found := identity_of(path))}
        if self._inotify is None:
            if now >= self._retry_at:
                self.start(now)
            return
        silent = self._canaries_sent - self._canaries_heard
        if self._lost or current != self._identities:
            self._rebuild(now, "a watched folder was moved, deleted or mounted over")
        elif silent:
            self._missed += 1
            if self._missed > REBUILD_TRIES:
                self._close()
                self._poll("events stopped arriving", now + RETRY_WATCH_SECONDS)
                return
            self._rebuild(now, "events stopped arriving")
        else:
            self._missed = 0
        self._send_canaries()

    def hear(self, priority: Priority, name: bytes, mask: int) -> None:
        """One event; called in watchdog's thread."""
        if mask & _LOST:
            self.lose()
            return
        if name == CANARY.encode():
            self._canaries_heard.add(priority)
            return
        if name.startswith(b"."):
            return
        with self._lock:
            if len(self._notes) >= MAX_NOTES:
                self._scan = True
            else:
                note = self._notes.setdefault((priority, name), Note())
                note.closes += bool(mask & InotifyConstants.IN_CLOSE_WRITE)
                note.renamed_in |= bool(mask & InotifyConstants.IN_MOVED_TO)
        self._wakeup.set()

    def lose(self) -> None:
        """A watch is gone; called in watchdog's thread."""
        self._lost = self._scan = True
        self._wakeup.set()

    def overflow(self) -> None:
        """The kernel dropped events; called in watchdog's thread."""
        with self._lock:
            self._notes.clear()
            self._scan = True
            self.overflows += 1
        self._wakeup.set()

    @property
    def lost(self) -> bool:
        """A watch is gone: `check` should not wait for the next rescan."""
        return self._lost and self._inotify is not None

    def _rebuild(self, now: float, reason: str) -> None:
        self.rebuilds += 1
        self._log.warning("inbox.watch_rebuilt", reason=reason)
        self._close()
        self.start(now)

    def _poll(self, reason: str, retry_at: float) -> None:
        if self.polling_reason != reason:
            self._log.warning("inbox.polling", reason=reason)
        self.polling_reason = reason
        self._retry_at = retry_at
        self._missed = 0
        self._scan = True

    def _close(self) -> None:
        if self._inotify is not None:
            self._inotify.stop()
            self._inotify.join(timeout=1.0)
            self._inotify = None

    def _send_canaries(self) -> None:
        """Open and close a hidden file for writing. It stays, so that the folder's own times do not move."""
        self._canaries_heard.clear()
        self._canaries_sent.clear()
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        for priority in self._identities:
            with suppress(OSError):  # a folder that we may not write to cannot be proved, and claims will say so
                os.close(os.open(self._folders[priority] / CANARY, flags, 0o600))
                self._canaries_sent.add(priority)


def identity_of(folder: Path) -> tuple[int, int] | None:
    """Device and inode of a directory; None when there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _read_mounts() -> str:
    return Path("/proc/self/mountinfo").read_text("utf-8", "replace")


def remote_type(folder: Path, *, read_mounts: Callable[[], str] = _read_mounts) -> str | None:
    """The file system's type when events cannot be trusted there (NFS, SMB, FUSE, ...), else None."""
    kind = mounted_type(folder, read_mounts=read_mounts)
    return kind if kind is not None and (kind in REMOTE_TYPES or kind.startswith("fuse.")) else None


def mounted_type(folder: Path, *, read_mounts: Callable[[], str] = _read_mounts) -> str | None:
    """The type of the file system that a folder lies on, None when it cannot be told."""
    try:
        device = folder.stat().st_dev
        mounts = read_mounts()
    except OSError:
        return None
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in reversed(mounts.splitlines()):  # the last mount of a device is the one on top
        fields, _, rest = line.partition(" - ")
        if fields.split()[2:3] == [wanted] and rest:
            return rest.split()[0]
    return None
