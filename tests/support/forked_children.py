"""Our own programs as forks, where a process that tests forked would start an interpreter for them.

A daemon starts trainers and readers of datasets, `dropforge check` starts `daemon.trainer.check`: each of them would import,
for 0.2 to 3 CPU seconds, what the process was forked with. `serve_children` gives a process a server of its own, forked
before there are threads, locks and open files. From then on `subprocess.Popen` has that one fork what it can, and starts
all else as ever. The fork is a child of the process, with its streams, folder, environment, session and command line.
"""

from __future__ import annotations

import ctypes
import fcntl
import inspect
import json
import os
import random
import runpy
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from daemon.processes import adopt_orphans, die_with_parent
from daemon.trainer.attempt import exit_process

REQUEST_BYTES = 1 << 20
STREAMS = 3  # standard input, output and error; what a child inherits beyond them follows
MAX_DESCRIPTORS = 64
HIGH = 32  # or above: where descriptors of a request wait for the numbers that they shall have; a daemon may have few
# Variables that the loader, the interpreter and the modules at their import read, and nobody afterwards.
EARLY = ("LD_", "PYTHON", "LANG", "LC_", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM", "OMP_", "MALLOC_")
LIGHT = ("daemon", "daemon.dataset", "daemon.verification")
PARENTS = {"run", "check", "preview", "merge", "submit", "init", "demo"}  # our commands that start programs of ours
# Those that import torch: only where it has been imported. The preview does without it, and has to start without it.
TRAINING = (
    "daemon.trainer",
    "daemon.trainer.check",
    "daemon.trainer.merge",
    "daemon.trainer.tiny_model",
)
SCRIPTS = {"fake_trainer.py": False, "slow_trainer.py": True}  # whether it imports torch


def same_start(env: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether an interpreter that was started with one environment is as if started with the other."""
    names = {name for name in {*env, *other} if name.startswith(EARLY)} - {"PYTHONPATH"}
    paths = [set(filter(None, one.get("PYTHONPATH", "").split(os.pathsep))) for one in (env, other)]
    return paths[0] == paths[1] and all(env.get(name) == other.get(name) for name in names)


def program_of(arguments: Sequence[str], *, training: bool) -> list[str] | None:
    """Return module (or script) and arguments of a command that a fork can do, None for any other."""
    if arguments[:2] != [sys.executable, "-P"]:
        return None
    if arguments[2:3] == ["-m"] and arguments[3] in (LIGHT + TRAINING if training else LIGHT):
        return list(arguments[3:])
    script = Path(arguments[2])
    if script.parent == Path(__file__).parent and script.name in SCRIPTS and (training or not SCRIPTS[script.name]):
        return list(arguments[2:])
    return None


# -- the process that has children


def serve_children(*, training: bool) -> None:
    """Let this process's `subprocess.Popen` have our own programs forked. Call it first: nothing may be open yet."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    if os.fork() == 0:
        ours.close()
        die_with_parent(parent)
        exit_process(lambda: _serve(theirs))
    theirs.close()
    adopt_orphans()
    started_with = dict(os.environ)
    lock = threading.Lock()
    names = list(inspect.signature(subprocess.Popen._execute_child).parameters)[1:]  # type: ignore[attr-defined]

    class Popen(subprocess.Popen[Any]):
        """subprocess's own, except that it has some commands forked."""

        def _execute_child(self, *values: Any) -> None:
            asked = dict(zip(names, values, strict=True))
            program = _fit(asked, started_with, training=training)
            if program is None:
                super()._execute_child(*values)  # type: ignore[misc]
                return
            request = {
                "program": program,
                "command": list(map(os.fsdecode, asked["args"])),
                "cwd": os.fsdecode(asked["cwd"] or Path.cwd()),
                "env": dict(asked["env"] or os.environ),
                "umask": _umask(),
                "new_session": bool(asked["start_new_session"]),
                "inherited": list(asked["pass_fds"]),
            }
            pipes = zip((asked["p2cread"], asked["c2pwrite"], asked["errwrite"]), range(STREAMS), strict=True)
            streams = [number if pipe == -1 else pipe for pipe, number in pipes]
            with lock:
                socket.send_fds(ours, [json.dumps(request).encode()], [*streams, *asked["pass_fds"]])
                self.pid = int(ours.recv(32))
            self._child_created = True
            pipe_names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
            self._close_pipe_fds(*(asked[name] for name in pipe_names))  # type: ignore[attr-defined]

    subprocess.Popen = Popen  # type: ignore[misc]


def _fit(asked: Mapping[str, Any], started_with: Mapping[str, str], *, training: bool) -> list[str] | None:
    """Return the program to fork, None when the command or a wish about its process needs a start."""
    if asked["shell"] or isinstance(asked["args"], str | bytes | os.PathLike) or asked["executable"] is not None:
        return None
    if asked["preexec_fn"] is not None or not asked["close_fds"] or asked["umask"] >= 0:
        return None
    if any(asked[name] is not None for name in ("uid", "gid", "gids")) or asked.get("process_group", -1) >= 0:
        return None
    if not same_start(asked["env"] or os.environ, started_with):
        return None
    return program_of(list(map(os.fsdecode, asked["args"])), training=training)


def _umask() -> int:
    """This process's, without a moment in which it is another."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("Umask:")[2].split()[0], 8)


# -- the server and its forks


def _serve(channel: socket.socket) -> int:
    """Fork a child for every request until the process that asks is gone."""
    while True:
        text, descriptors, _, _ = socket.recv_fds(channel, REQUEST_BYTES, MAX_DESCRIPTORS)
        if not text:
            return 0
        gate_read, gate_write = os.pipe()  # closed once the child is the asking process's own
        pid_read, pid_write = os.pipe()
        between = os.fork()
        if between == 0:
            child = os.fork()
            if child:
                os.write(pid_write, str(child).encode())
                os._exit(0)
            os.close(gate_write)
            os.read(gate_read, 1)
            exit_process(partial(_run, json.loads(text), descriptors))
        os.waitpid(between, 0)
        os.close(gate_read)
        os.close(gate_write)
        os.close(pid_write)
        channel.send(os.read(pid_read, 32))
        for descriptor in (pid_read, *descriptors):
            os.close(descriptor)


def _run(request: Mapping[str, Any], descriptors: Sequence[int]) -> int:
    """Become the process that was asked for; returns its exit code."""
    if request["new_session"]:
        os.setsid()
    numbers = [*range(STREAMS), *request["inherited"]]
    above = max(HIGH, *(number + 1 for number in numbers))
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, above) for descriptor in descriptors]
    os.closerange(0, above)
    for descriptor, number in zip(high, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    random.seed()
    show_command(request["command"])
    program, *arguments = request["program"]
    if program == "daemon" and PARENTS.intersection(arguments):
        serve_children(training="torch" in sys.modules)
    sys.argv[:] = [program, *arguments]
    run: Callable[..., Any] = runpy.run_path
    options: dict[str, Any] = {}
    if not program.endswith(".py"):
        run, options = runpy.run_module, {"alter_sys": True}
    try:
        run(program, run_name="__main__", **options)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def show_command(command: Sequence[str]) -> None:
    """Let /proc/self/cmdline show this command, as far as there is room over the one that it was started with."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end
    text = b"\0".join(map(os.fsencode, command))[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def end_quickly(run: Callable[[], object]) -> NoReturn:
    """Call `run` and end as `exit_process` does: torch takes long to be taken apart."""

    def called() -> int:
        run()
        return 0

    exit_process(called)
