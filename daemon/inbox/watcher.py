"""Watching folders: inotify tells that something may have arrived; a scan of the folder tells what is there.

Watches are flat and ask for arrivals only. watchdog's reading thread records the name and wakes the service, so a burst
costs microseconds an event, an overflow loses names that a scan finds, and our own renames out of a folder raise no
event. A canary file shows at every rescan that events still arrive.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from watchdog.observers.inotify_c import CallbackId, InotifyConstants, InotifyEvent, InotifyFD, Mask

from daemon.job import Priority
from daemon.wakeup import SupportsSet

CANARY = ".dropforge-canary"
MAX_NAMES = 20_000  # names recorded between two ticks; beyond, a scan finds them and they settle like any other
RESTART_TRIES = 2  # canaries that may be missed before polling takes over
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


@dataclass
class NameEvents:
    """Events of one name since the last batch."""

    closes: int = 0  # times a writer closed it
    renamed_in: bool = False


@dataclass(frozen=True, kw_only=True)
class EventBatch:
    """Events since the last batch; `scan` when names may be missing."""

    names: Mapping[tuple[Priority, str], NameEvents]
    scan: bool


class _EventHandler:
    """watchdog's callback for one folder. It raises nothing: that would end the thread that reads."""

    def __init__(self, watcher: FolderWatcher, priority: Priority) -> None:
        self._watcher = watcher
        self._priority = priority

    def on_event(self, event: InotifyEvent) -> None:
        with suppress(Exception):  # the service cannot be woken; the next rescan comes without that
            self._watcher.record(self._priority, event.name, event.mask)

    def on_watch_deleted(self, wd: int) -> None:
        with suppress(Exception):
            self._watcher.record_loss()

    def on_queue_overflow(self) -> None:
        if self._priority is Priority.NORMAL:  # each folder's handler is called; it counts once
            with suppress(Exception):
                self._watcher.record_overflow()


class FolderWatcher:
    """Watches folders, by priority; polls where events do not come. One thread calls everything but the callbacks."""

    def __init__(self, folders: Mapping[Priority, Path], wakeup: SupportsSet, log: Any) -> None:
        self._folders = dict(folders)
        self._wakeup = wakeup
        self._log = log
        self._lock = threading.Lock()
        self._events: dict[tuple[Priority, bytes], NameEvents] = {}
        self._scan = True
        self._lost = False
        self._canaries_seen: set[Priority] = set()
        self._canaries_sent: set[Priority] = set()
        self._identities: dict[Priority, tuple[int, int]] = {}
        self._inotify: InotifyFD | None = None
        self._missed = 0
        self._retry_at = 0.0
        self.polling_reason = ""  # none while it does not watch
        self.overflows = 0

    @property
    def mode(self) -> str:
        """`inotify`, or `polling (why)`; empty while it does not watch."""
        if self._inotify is not None:
            return "inotify"
        return f"polling ({self.polling_reason})" if self.polling_reason else ""

    @property
    def polling(self) -> bool:
        """Whether only scans find files."""
        return self._inotify is None

    def start(self, now: float) -> None:
        """Begin to watch; without events, poll."""
        remote = remote_type(self._folders[Priority.NORMAL])
        if remote is not None:
            self._fall_back(f"{remote} sends no events of other machines", float("inf"))
            return
        try:
            inotify = InotifyFD()
        except OSError as error:
            self._fall_back(error.strerror or str(error), now + RETRY_WATCH_SECONDS)
            return
        try:
            inotify.start()
            self._identities = {}
            for priority, folder in self._folders.items():
                identity = identity_of(folder)
                if identity is not None:
                    inotify.add_callback(
                        os.fsencode(folder),
                        _ARRIVALS,
                        _EventHandler(self, priority),
                        CallbackId(list(Priority).index(priority)),
                    )
                    self._identities[priority] = identity
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread could be started
            inotify.stop()
            self._fall_back(getattr(error, "strerror", None) or str(error), now + RETRY_WATCH_SECONDS)
            return
        self._inotify = inotify
        self._lost = False
        self._canaries_sent.clear()
        self._scan = True

    def stop(self) -> None:
        """End watching and remove the canaries."""
        self._close()
        self.polling_reason = ""
        for folder in self._folders.values():
            with suppress(OSError):
                (folder / CANARY).unlink()

    def drain(self) -> EventBatch:
        """Return the events since the last call."""
        with self._lock:
            names, self._events = self._events, {}
            scan, self._scan = self._scan, False
        return EventBatch(
            names={(priority, os.fsdecode(name)): events for (priority, name), events in names.items()}, scan=scan
        )

    def verify(self, now: float) -> None:
        """Watch anew when folders were replaced or events stopped arriving; called at each rescan."""
        current = {priority: found for priority, path in self._folders.items() if (found := identity_of(path))}
        if self._inotify is None:
            if now >= self._retry_at:
                self.start(now)
            return
        silent = self._canaries_sent - self._canaries_seen
        if self._lost or current != self._identities:
            self._restart(now, "a watched folder was moved, deleted or mounted over")
        elif silent:
            self._missed += 1
            if self._missed > RESTART_TRIES:
                self._close()
                self._fall_back("events stopped arriving", now + RETRY_WATCH_SECONDS)
                return
            self._restart(now, "events stopped arriving")
        else:
            self._missed = 0
        self._send_canaries()

    def record(self, priority: Priority, name: bytes, mask: int) -> None:
        """Record one event; called in watchdog's thread."""
        if mask & _LOST:
            self.record_loss()
            return
        if name == CANARY.encode():
            self._canaries_seen.add(priority)
            return
        if name.startswith(b"."):
            return
        with self._lock:
            if len(self._events) >= MAX_NAMES:
                self._scan = True
            else:
                events = self._events.setdefault((priority, name), NameEvents())
                events.closes += bool(mask & InotifyConstants.IN_CLOSE_WRITE)
                events.renamed_in |= bool(mask & InotifyConstants.IN_MOVED_TO)
        self._wakeup.set()

    def record_loss(self) -> None:
        """Record that a watch is gone; called in watchdog's thread."""
        self._lost = self._scan = True
        self._wakeup.set()

    def record_overflow(self) -> None:
        """Record that the kernel dropped events; called in watchdog's thread."""
        with self._lock:
            self._events.clear()
            self._scan = True
            self.overflows += 1
        self._wakeup.set()

    @property
    def lost(self) -> bool:
        """Whether a watch is gone: `verify` should not wait for the next rescan."""
        return self._lost and self._inotify is not None

    def _restart(self, now: float, reason: str) -> None:
        self._log.warning("inbox.watch_rebuilt", reason=reason)
        self._close()
        self.start(now)

    def _fall_back(self, reason: str, retry_at: float) -> None:
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
        """Open and close a hidden file for writing.

        It stays, so that the folder's own times do not move.
        """
        self._canaries_seen.clear()
        self._canaries_sent.clear()
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        for priority in self._identities:
            with suppress(OSError):  # a folder that we may not write to cannot be proved, and claims will say so
                os.close(os.open(self._folders[priority] / CANARY, flags, 0o600))
                self._canaries_sent.add(priority)


def identity_of(folder: Path) -> tuple[int, int] | None:
    """Return device and inode of a directory; None when there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _read_mounts() -> str:
    return Path("/proc/self/mountinfo").read_text("utf-8", "replace")


def remote_type(folder: Path, *, read_mounts: Callable[[], str] = _read_mounts) -> str | None:
    """Return the file system's type where events cannot be trusted (NFS, SMB, FUSE, ...), else None."""
    kind = mounted_type(folder, read_mounts=read_mounts)
    return kind if kind is not None and (kind in REMOTE_TYPES or kind.startswith("fuse.")) else None


def mounted_type(folder: Path, *, read_mounts: Callable[[], str] = _read_mounts) -> str | None:
    """Return the type of a folder's file system; None when it is not known."""
    try:
        device = folder.stat().st_dev
        mounts = read_mounts()
    except OSError:
        return None
    device_number = f"{os.major(device)}:{os.minor(device)}"
    for line in reversed(mounts.splitlines()):  # the last mount of a device is the one on top
        fields, _, rest = line.partition(" - ")
        if fields.split()[2:3] == [device_number] and rest:
            return rest.split()[0]
    return None
