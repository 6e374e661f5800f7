"""One process at a time works on a model directory.

The lock is a flock(2) on `.lock`: the kernel drops it when its holder dies, so a dead holder needs no
clean-up. What the holder wrote into the file only tells people who it is.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from .atomic import PathLike, make_folder_durable, write_all
from .errors import ModelLocked, NotLocked, StorageError, storage_errors
from .json_text import parse_json
from .layout import LOCK_NAME

# A holder writes its name right after it got the lock; a contender that comes in between waits this long for
# it.
_NAME_WAIT_SECONDS = 0.5
# `is_locked` holds a lock for as long as it takes to close a file.
_LOOKS, _LOOK_SECONDS = 25, 0.002

_held: weakref.WeakSet[ModelLock] = weakref.WeakSet()


class ModelLock:
    """The lock of one model directory: `with ModelLock(model_dir, owner="trainer"):`.

    Raises ModelLocked, which names the holder, when it is taken. Creates the model directory when it is
    missing. Not re-entrant; a forked child does not hold it.
    """

    def __init__(self, model_dir: PathLike, *, owner: str) -> None:
        self.model_dir = Path(model_dir)
        self.owner = owner
        self._fd: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    def acquire(self) -> None:
        """Take the lock. Raises ModelLocked, StorageError."""
        if self._fd is not None:
            raise RuntimeError(f"the lock of {self.model_dir} is already held by this object")
        path = self.model_dir / LOCK_NAME
        with storage_errors("lock", self.model_dir):
            make_folder_durable(self.model_dir)
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            except OSError as exc:
                if exc.errno == errno.ELOOP:
                    raise StorageError(
                        operation="lock",
                        path=self.model_dir,
                        cause=f"{LOCK_NAME} is a symbolic link",
                        hint="remove the link",
                    ) from exc
                raise
            try:
                _take(fd)
                # Only for people: on a full disk the lock holds all the same.
                with suppress(OSError):
                    os.ftruncate(fd, 0)
                    write_all(fd, (json.dumps(describe_self(self.owner)) + "\n").encode())
            except BlockingIOError as exc:
                holder = _read_holder(fd)
                os.close(fd)
                raise ModelLocked(
                    operation="lock",
                    path=self.model_dir,
                    cause=f"it is in use by {_name_holder(holder)}",
                    hint="wait for it, or stop it; a dead process never holds this lock",
                    holder=holder,
                ) from exc
            except BaseException:
                os.close(fd)
                raise
        self._fd = fd
        _held.add(self)

    def release(self) -> None:
        """Give the lock back; does nothing when it is not held.

        The file stays: removing it would let two processes lock two files of one name.
        """
        fd, self._fd = self._fd, None
        _held.discard(self)
        if fd is not None:
            with suppress(OSError):
                os.ftruncate(fd, 0)
            os.close(fd)

    def __enter__(self) -> ModelLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_locked(model_dir: PathLike) -> bool | None:
    """Whether any process holds the lock of the model directory; None when this process may not look."""
    try:
        fd = os.open(Path(model_dir) / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for this moment, which who takes the lock waits out
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(fd)
    return False


def _take(fd: int) -> None:
    """Lock the open file. Raises BlockingIOError when another process holds it, and not for a look of `is_locked`."""
    for _ in range(_LOOKS):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOOK_SECONDS)
        else:
            return
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _forget_in_child() -> None:
    # A forked data loader worker would otherwise keep the lock after the death of the process that took it.
    for lock in list(_held):
        if lock._fd is not None:
            os.close(lock._fd)
            lock._fd = None
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def is_locked_here(model_dir: PathLike) -> bool:
    """Whether this process holds the lock of the model directory."""
    return any(lock.is_held and _same_folder(lock.model_dir, Path(model_dir)) for lock in list(_held))


def _same_folder(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def require_lock(model_dir: PathLike, operation: str) -> None:
    """Raise NotLocked unless this process holds the lock of `model_dir`."""
    if not is_locked_here(model_dir):
        raise NotLocked(
            operation=operation,
            path=model_dir,
            cause="this process does not hold its lock",
            hint="with ModelLock(model_dir, owner=...): ...",
        )


@contextmanager
def locked(model_dir: PathLike, *, owner: str) -> Iterator[None]:
    """Hold the lock for the block: this process's own, or a new one."""
    if is_locked_here(model_dir):
        yield
        return
    with ModelLock(model_dir, owner=owner):
        yield


def describe_self(owner: str) -> dict[str, Any]:
    """Describe this process as a lock's holder.

    Process id, boot id and start time together name one process for good.
    """
    return {
        "pid": os.getpid(),
        "owner": owner,
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "boot_id": _boot_id(),
        "start_ticks": start_ticks(os.getpid()),
    }


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None without one."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The name, in parentheses, may hold anything; the fields after it are numbers. Start time is field 22.
    return int(status[status.rindex(b")") + 2 :].split()[19])


def _read_holder(fd: int) -> dict[str, Any]:
    deadline = time.monotonic() + _NAME_WAIT_SECONDS
    while True:
        try:
            holder = parse_json(os.pread(fd, 65_536, 0))
        except (OSError, ValueError):
            holder = None
        if isinstance(holder, dict) and _may_be_alive(holder):
            return holder
        if time.monotonic() > deadline:
            return holder if isinstance(holder, dict) else {}
        time.sleep(0.01)


def _may_be_alive(holder: dict[str, Any]) -> bool:
    """False for what a holder before the present one left: the present one is about to write its own name."""
    pid = holder.get("pid")
    if holder.get("boot_id") != _boot_id() or not isinstance(pid, int):
        return holder.get("host") != socket.gethostname()  # another machine's processes cannot be looked up
    return start_ticks(pid) == holder.get("start_ticks")


def _name_holder(holder: dict[str, Any]) -> str:
    if not holder:
        return "a process that has not written its name"
    where = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
    return f"{holder.get('owner')} ({where})"
