"""`dropforge` processes as forks of one that has its imports done, where starting an interpreter is not the point.

    server = ForkServer(environment())
    process = server.start(["--root", path, "run"], stdout=log, stderr=log, env=environment())

A fork does what `python -m daemon ARGUMENTS` does, in a process of its own: a pid, an environment, signals, an exit
code, and the end of an interpreter. A third of a CPU second less each, and there are hundreds of them. What it starts of
our own programs is forked as well (see forked_children): with `training`, by a process that has torch imported.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from daemon.trainer.bootstrap import set_library_environment
from daemon.trainer.fork_server import QUIET, preload
from tests.support.forked_children import PARENTS, end_quickly, same_start, serve_children, show_command

REQUEST_BYTES = 1 << 20
ROOM = "-" * 400  # for the command lines of forks
STREAMS = 3  # standard input, output and error; the fourth descriptor of a request carries the answer


class Forked:
    """As much of subprocess.Popen as tests use."""

    def __init__(self, answers: int, arguments: Sequence[str]) -> None:
        self.args = list(arguments)
        self.returncode: int | None = None
        self._answers = os.fdopen(answers, "rb", buffering=0)
        self.pid = int(self._answers.read(16))

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.returncode = os.waitstatus_to_exitcode(int(self._answers.read(16)))
            self._answers.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code. Raises subprocess.TimeoutExpired."""
        if self.returncode is None and not select.select([self._answers], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The process that forks, and our end of the channel to it."""

    def __init__(self, env: Mapping[str, str], through: Sequence[str] = (), *, training: bool = False) -> None:
        """`through`: a command that starts the process; `training`: it imports the training libraries."""
        self._env = dict(env)
        libraries = QUIET if training else {}
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(*through, sys.executable, "-P", "-m", "tests.support.forked", str(theirs.fileno())),
                    *("training" if training else "light", ROOM),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**self._env, **libraries},
            )

    def suits(self, env: Mapping[str, str]) -> bool:
        """Whether a fork can do with this environment, or an interpreter has to be started with it."""
        return same_start(env, self._env)

    def start(
        self, arguments: Sequence[str], *, stdout: int, stderr: int, env: Mapping[str, str], before: Sequence[Any] = ()
    ) -> Forked:
        """Start `dropforge ARGUMENTS` with nothing to read, and these descriptors to write to.

        `before`: a function that the process calls first, as `module:name` and its arguments.
        """
        request = json.dumps(
            {"arguments": list(arguments), "env": dict(env), "cwd": str(Path.cwd()), "before": list(before)}
        ).encode()
        answers, theirs = os.pipe()
        nothing = os.open(os.devnull, os.O_RDONLY)
        try:
            socket.send_fds(self._channel, [request], [nothing, stdout, stderr, theirs])
        finally:
            os.close(theirs)
            os.close(nothing)
        return Forked(answers, arguments)

    def run(
        self, arguments: Sequence[str], *, env: Mapping[str, str], timeout: float, before: Sequence[Any] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run `dropforge ARGUMENTS` to its end; returns what subprocess.run would, with both streams as text."""
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            process = self.start(arguments, stdout=stdout.fileno(), stderr=stderr.fileno(), env=env, before=before)
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            for stream in (stdout, stderr):
                stream.seek(0)
            return subprocess.CompletedProcess(process.args, code, stdout.read().decode(), stderr.read().decode())


# -- the server


def serve(channel: socket.socket, *, training: bool) -> list[str]:
    """Fork a child for every request until the test process is gone. Returns in each child, with its arguments."""
    while True:
        text, descriptors, _, _ = socket.recv_fds(channel, REQUEST_BYTES, STREAMS + 1)
        if not text:
            os._exit(0)
        keeper = os.fork()
        if keeper == 0:
            answers = descriptors[STREAMS]
            child = os.fork()
            if child == 0:
                channel.detach()
                return become(json.loads(text), descriptors, training=training)
            channel.close()
            for descriptor in descriptors[:STREAMS]:
                os.close(descriptor)
            os.write(answers, f"{child:<16}".encode())
            os.write(answers, f"{os.waitpid(child, 0)[1]:<16}".encode())
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        while True:  # take leave of keepers whose child has ended
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break


def become(request: Mapping[str, Any], descriptors: Sequence[int], *, training: bool) -> list[str]:
    """Take on the streams, the folder and the environment that were asked for."""
    for number in range(STREAMS):
        os.dup2(descriptors[number], number)
    os.closerange(STREAMS, 1024)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    random.seed()
    show_command([sys.executable, "-P", "-m", "daemon", *request["arguments"]])
    if PARENTS.intersection(request["arguments"]):
        serve_children(training=training)
    if request["before"]:
        place, *values = request["before"]
        module, _, name = place.partition(":")
        getattr(importlib.import_module(module), name)(*values)
    return list(request["arguments"])


def main() -> None:
    """Import what every command does, then serve; ends as `python -m daemon` in the children."""
    import daemon.service  # noqa: F401  for its place in sys.modules
    import tests.support.fake_trainer  # noqa: F401  and this
    from daemon.cli.main import main as run_command_line

    channel, training = socket.socket(fileno=int(sys.argv[1])), sys.argv[2] == "training"
    if training:
        set_library_environment()
        preload("")
    gc.freeze()
    sys.argv[1:] = serve(channel, training=training)
    if training:
        end_quickly(run_command_line)
    run_command_line()


if __name__ == "__main__":
    main()
