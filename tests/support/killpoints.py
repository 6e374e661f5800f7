"""Kill a process before (or after, or in the middle of) any of its calls that change the disk.

    for run in killed_runs("tests.fault.guard.scenarios:clear", prepare, tmp_path):
        ...  # run.root is what the killed process left behind

The target, `module:function`, is called with JSON arguments in a child process in which the functions of `os`
that change the disk, files opened for writing, and the statements of sqlite3 are counted. The n-th call ends
the child with SIGKILL. Nothing in the product knows about this. Calls made in C (torch, safetensors) are not
seen.

One server process imports the targets and forks a child a run, so that a run costs milliseconds; it must not
import anything that starts threads (torch).
"""

from __future__ import annotations

import builtins
import errno
import importlib
import io
import itertools
import json
import os
import pathlib
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# These decide at import which functions of os they use; they have to see the real ones.
_ = (pathlib, shutil, tempfile)

When = Literal["before", "after", "torn", "full"]
REPOSITORY = Path(__file__).resolve().parents[2]

_COUNTED = (
    *("rename", "replace", "mkdir", "rmdir", "unlink", "remove", "symlink", "link", "mkfifo", "mknod"),
    *("chmod", "fchmod", "lchown", "chown", "fchown", "utime", "setxattr", "removexattr"),
    *("truncate", "ftruncate", "posix_fallocate", "sendfile", "copy_file_range"),
    *("fsync", "fdatasync", "sync"),
)
_WRITES = ("write", "pwrite")
# What needs space: from the moment on that the disk is full, these fail, and the others go on working.
_ALLOCATING = {"write", "pwrite", "open", "mkdir", "symlink", "link", "posix_fallocate"}
# The intake touches the first in each folder as time passes, and the daemon overwrites the second for each step over an
# input: how often, depends on how busy the machine is.
UNCOUNTED = (".dropforge-canary", "/state/in_hand")
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`calls` lists what was counted, in order: `17 rename a -> b`. `error` is a traceback, `result` the
    value.
    """

    killed: bool
    calls: tuple[str, ...]
    result: Any = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class KilledRun:
    """`root` is the folder that the run worked in; `at` the number of the call, 0 for the run that
    completed.
    """

    root: Path
    at: int
    when: When
    outcome: Outcome

    def __str__(self) -> str:
        last = self.outcome.calls[-1] if self.outcome.calls else "-"
        return f"killed {self.when} call {self.at}: {last}" if self.at else "completed"


class KillServer:
    """`with KillServer() as server: server.run("module:function", {"root": ...}, kill_at=3)`."""

    def __enter__(self) -> KillServer:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.killpoints"],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def run(
        self, target: str, arguments: Mapping[str, Any], *, kill_at: int | None = None, when: When = "before"
    ) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"target": target, "arguments": dict(arguments), "kill_at": kill_at, "when": when}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the kill server ended with {self._process.wait()} in {target}")
        fields = json.loads(answer)
        return Outcome(**{**fields, "calls": tuple(fields["calls"])})


def killed_runs(
    target: str,
    prepare: Callable[[Path], Mapping[str, Any]],
    base: Path,
    *,
    whens: tuple[When, ...] = ("before", "torn"),
    keep_roots: bool = False,
    every: int = 1,
) -> Iterator[KilledRun]:
    """Run `target` once to its end, then once for every point at which it can be killed.

    `prepare` makes the starting state in the folder it is given and returns the arguments. "After call n" is
    the same state on the disk as "before call n + 1", so that one of them is enough; "torn" stops a write
    half way. With `every`, only at each so many calls. Raises AssertionError when the target fails on its own.
    """
    numbers = itertools.count()

    def start(server: KillServer, kill_at: int | None, when: When) -> KilledRun:
        root = base / f"run-{next(numbers):04}"
        root.mkdir(parents=True)
        outcome = server.run(target, prepare(root), kill_at=kill_at, when=when)
        if outcome.error is not None:
            raise AssertionError(f"{target} failed:\n{outcome.error}\n" + "\n".join(outcome.calls))
        return KilledRun(root=root, at=kill_at or 0, when=when, outcome=outcome)

    with KillServer() as server:
        whole = start(server, None, "before")
        assert whole.outcome.calls, f"{target} changes nothing"
        yield whole
        for when in whens:
            for index, call in enumerate(whole.outcome.calls, start=1):
                if index % every or (when == "torn" and call.split()[1] not in _WRITES):
                    continue
                run = start(server, index, when)
                assert run.outcome.killed, f"call {index} of {target} did not happen again: {call}"
                yield run
                if not keep_roots:
                    shutil.rmtree(run.root)


def full_disk_runs(
    target: str, prepare: Callable[[Path], Mapping[str, Any]], base: Path, *, every: int = 1
) -> Iterator[KilledRun]:
    """Run `target` once for every call (or each so many) that changes the disk, with a disk that is full from that call on.

    The target is not killed: it has to catch its own error and return what it makes of it.
    """
    with KillServer() as server:

        def start(number: int | None) -> KilledRun:
            root = base / f"full-{number or 0:04}"
            root.mkdir(parents=True)
            outcome = server.run(target, prepare(root), kill_at=number, when="full")
            assert outcome.error is None, f"{target} let an error through:\n{outcome.error}"
            return KilledRun(root=root, at=number or 0, when="full", outcome=outcome)

        whole = start(None)
        for number in range(every, len(whole.outcome.calls) + 1, every):
            run = start(number)
            yield run
            shutil.rmtree(run.root)


# -- the child


class _Counter:
    """Counts while `active`, and kills at the chosen call."""

    def __init__(self) -> None:
        self.active = False
        self.lock = threading.RLock()
        self.count = 0
        self.kill_at: int | None = None
        self.when: When = "before"
        self.log_fd = -1
        self.real_write = os.write

    def around(self, name: str, detail: str, call: Callable[[], Any], torn: Callable[[], Any] | None = None) -> Any:
        if not self.active or any(name in detail for name in UNCOUNTED):
            return call()
        with self.lock:
            self.count += 1
            mine = self.count == self.kill_at
            if self.when == "full" and self.kill_at is not None and self.count >= self.kill_at:
                if mine or name in _ALLOCATING:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), detail)
                return call()
            self.real_write(self.log_fd, f"C{self.count} {name} {detail}".replace("\n", "\\n").encode() + b"\n")
            if mine and self.when == "before":
                self.die()
            if mine and self.when == "torn":
                if torn is not None:
                    torn()
                self.die()
            result = call()
            if mine:
                self.die()
            return result

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()


_counter = _Counter()


def _install() -> None:
    for name in _COUNTED:
        if hasattr(os, name):
            _wrap(name)
    for name in _WRITES:
        _wrap_write(name)
    _wrap_open()
    sqlite3.connect = _counted_connect  # type: ignore[assignment]


def _wrap(name: str) -> None:
    real = getattr(os, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        detail = " -> ".join(_spell(item) for item in args[:2])
        return _counter.around(name, detail, lambda: real(*args, **kwargs))

    setattr(os, name, counted)


def _wrap_write(name: str) -> None:
    real = getattr(os, name)

    def counted(fd: int, data: Any, *rest: Any) -> Any:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return real(fd, data, *rest)
        half = bytes(data)[: len(data) // 2]
        detail = f"{len(data)} bytes to {_spell(fd)}"
        return _counter.around(name, detail, lambda: real(fd, data, *rest), lambda: real(fd, half, *rest))

    setattr(os, name, counted)


def _wrap_open() -> None:
    real_os_open, real_open = os.open, builtins.open

    def counted_os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if not flags & _WRITE_FLAGS:
            return real_os_open(path, flags, *args, **kwargs)
        opened: int = _counter.around("open", _spell(path), lambda: real_os_open(path, flags, *args, **kwargs))
        return opened

    def counted_open(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if not _counter.active or not set(mode) & set("wax+"):
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _CountedFile(
            file,
            mode.replace("b", "").replace("t", ""),
            closefd=closefd,
            opener=opener or (lambda path, flags: os.open(path, flags, 0o666)),
        )
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)  # type: ignore[arg-type]
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)

    os.open = counted_os_open
    builtins.open = counted_open
    io.open = counted_open


class _CountedFile(io.FileIO):
    def write(self, data: Any, /) -> int:
        whole = bytes(data)
        written: int = _counter.around(
            "write",
            f"{len(whole)} bytes to {_spell(self.fileno())}",
            lambda: io.FileIO.write(self, whole),
            lambda: io.FileIO.write(self, whole[: len(whole) // 2]),
        )
        return written

    def truncate(self, size: int | None = None, /) -> int:
        cut: int = _counter.around("ftruncate", _spell(self.fileno()), lambda: io.FileIO.truncate(self, size))
        return cut


class _CountedCursor(sqlite3.Cursor):
    def execute(self, sql: str, *args: Any) -> Any:
        return _around_sql(self.connection, sql, lambda: sqlite3.Cursor.execute(self, sql, *args))

    def executemany(self, sql: str, *args: Any) -> Any:
        return _around_sql(self.connection, sql, lambda: sqlite3.Cursor.executemany(self, sql, *args))

    def executescript(self, sql: str) -> Any:
        return _around_sql(self.connection, "script", lambda: sqlite3.Cursor.executescript(self, sql))


class _CountedConnection(sqlite3.Connection):
    def cursor(self, factory: Any = _CountedCursor) -> Any:
        return super().cursor(factory)

    def execute(self, sql: str, *args: Any) -> Any:  # the base class does not ask for our cursor
        return _around_sql(self, sql, lambda: sqlite3.Connection.execute(self, sql, *args))

    def commit(self) -> None:
        _around_sql(self, "COMMIT", lambda: sqlite3.Connection.commit(self))

    def __exit__(self, *args: Any) -> Any:
        return _around_sql(self, "COMMIT", lambda: sqlite3.Connection.__exit__(self, *args))


def _around_sql(connection: sqlite3.Connection, sql: str, call: Callable[[], Any]) -> Any:
    """Count what changes the file: within a transaction its COMMIT alone, since a kill before it undoes the rest."""
    first = sql.split(None, 1)[0].upper() if sql.split() else ""
    if first in ("SELECT", "EXPLAIN", "PRAGMA", "WITH", "BEGIN") or (connection.in_transaction and first != "COMMIT"):
        return call()
    return _counter.around("sqlite", " ".join(sql.split())[:100], call)


_real_connect = sqlite3.connect


def _counted_connect(*args: Any, **kwargs: Any) -> Any:
    kwargs.setdefault("factory", _CountedConnection)
    return _real_connect(*args, **kwargs)


def _spell(value: Any) -> str:
    if isinstance(value, int):
        try:
            return str(Path(f"/proc/self/fd/{value}").readlink())
        except OSError:
            return str(value)
    return os.fsdecode(value) if isinstance(value, str | bytes | os.PathLike) else repr(value)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a target prints must not be taken for an answer
    _install()
    for line in sys.stdin:
        request = json.loads(line)
        module, _, function = request["target"].partition(":")
        target = getattr(importlib.import_module(module), function)
        read_fd, write_fd = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read_fd)
            _run_child(target, request, write_fd)
        os.close(write_fd)
        with os.fdopen(read_fd, "rb") as log:
            lines = log.read().decode(errors="replace").splitlines()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = [json.loads(text[1:]) for text in lines if text.startswith("R")]
        answer: dict[str, Any] = {
            "killed": status == -signal.SIGKILL,
            "calls": [text[1:] for text in lines if text.startswith("C")],
            **(said[0] if said else {}),
        }
        if status not in (0, -signal.SIGKILL) and not said:
            answer["error"] = f"ended with {status}"
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _run_child(target: Callable[..., Any], request: Mapping[str, Any], log_fd: int) -> None:
    answer: dict[str, Any] = {}
    _counter.kill_at, _counter.when, _counter.log_fd = request["kill_at"], request["when"], log_fd
    _counter.active = True
    try:
        answer["result"] = target(**request["arguments"])
        json.dumps(answer)
    except BaseException:
        answer = {"error": traceback.format_exc()}
    finally:
        _counter.active = False
    _counter.real_write(log_fd, b"R" + json.dumps(answer).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    # As an imported module, so that the counter is one, not this script's copy of it.
    importlib.import_module("tests.support.killpoints")._serve()
