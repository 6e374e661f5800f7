"""`python -m daemon.trainer.fork_server CHANNEL IDLE_SECONDS BASE`: import the libraries once, fork a child for each job.

Nothing here touches CUDA, and there is no thread but the main one, or no child is made. A child becomes the daemon's own
(its parent here exits at once, and the daemon is the subreaper), so it does not depend on this process afterwards.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from daemon.processes import die_with_parent
from daemon.trainer.attempt import exit_process
from daemon.trainer.bootstrap import collector_paused, import_peft

MAX_DESCRIPTORS = 8
REQUEST_BYTES = 65_536
# What a run imports beyond the three libraries, some of it late.
PRELOADED_MODULES = (
    "daemon.trainer.train",
    "guard.callback",
    "peft.utils.transformers_weight_conversion",
    "torch.utils.serialization.config",
    "numpy.ctypeslib",
)
# So that no library starts threads of its own when it is imported; the children do without.
QUIET = {
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


def serve(channel: socket.socket, *, idle_seconds: float, run: Callable[[Path], int]) -> None:
    """Fork a child for every request until the daemon is gone, or nothing came for `idle_seconds`."""
    if reason := unfit():
        print(f"the fork server cannot serve: {reason}", file=sys.stderr)
        _send(channel, refused=reason)
        return
    _send(channel, ready=True)
    channel.settimeout(idle_seconds)
    while True:
        try:
            text, descriptors, _, _ = socket.recv_fds(channel, REQUEST_BYTES, MAX_DESCRIPTORS)
        except TimeoutError:
            return
        if not text:
            return
        reason = unfit()
        if reason:
            _send(channel, refused=reason)
            return
        _send(
            channel, pid=_fork(channel, Path(os.fsdecode(bytes.fromhex(json.loads(text)["run_dir"]))), descriptors, run)
        )
        for descriptor in descriptors:
            os.close(descriptor)


def unfit() -> str:
    """Return why this process must not be forked; empty when it may be."""
    threads = [Path(entry.path, "comm").read_text().strip() for entry in os.scandir("/proc/self/task")]
    if len(threads) > 1:
        return f"a library has started threads: {', '.join(threads)}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA has been started"
    return ""


def _fork(channel: socket.socket, run_dir: Path, descriptors: list[int], run: Callable[[Path], int]) -> int:
    """Fork a child that runs `run_dir` in a session of its own, as the daemon's child; returns its pid."""
    pid_read, pid_write = os.pipe()
    start_read, start_write = os.pipe()  # closed once the child is the daemon's
    intermediate = os.fork()
    if intermediate == 0:
        child = os.fork()
        if child:
            os._exit(0)  # the child is the daemon's from here on
        _become_trainer(channel, descriptors[0], (pid_read, start_write), pid_write, start_read)
        exit_process(lambda: run(run_dir))  # never back into the server's loop
    os.close(pid_write)
    os.close(start_read)
    os.waitpid(intermediate, 0)
    with os.fdopen(pid_read) as text:
        pid = int(text.read())
    os.close(start_write)
    return pid


def _become_trainer(channel: socket.socket, log: int, unused: tuple[int, int], pid_write: int, start_read: int) -> None:
    os.setsid()  # first: who knows the pid may signal the group
    channel.close()
    for descriptor in unused:
        os.close(descriptor)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(null)
    os.close(log)
    os.write(pid_write, str(os.getpid()).encode())
    os.close(pid_write)
    os.read(start_read, 1)  # returns when the intermediate process has exited
    os.close(start_read)
    for name in QUIET:
        os.environ.pop(name, None)


def preload(base: str) -> None:
    """Import what every run imports, and the module of the base model's architecture."""
    with collector_paused():
        import_peft()
        for name in PRELOADED_MODULES:
            importlib.import_module(name)
        with suppress(ImportError):  # a run goes on without it
            importlib.import_module("tensorboardX")
        with suppress(OSError, ValueError, ImportError, AttributeError):
            model_type = json.loads(Path(base, "config.json").read_bytes())["model_type"]
            if re.fullmatch(r"[a-z0-9_]+", model_type):
                importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")


def run_forked(run_dir: Path) -> int:
    """Run in a fork of this process or, where CUDA cannot start in a fork, in a fresh interpreter of the same pid.

    It cannot when something asked the driver for GPUs before the fork: torch does where NVML is missing, as in containers
    with the `compute` capability alone. Only the fork can know.
    """
    from torch.cuda import _is_in_bad_fork

    if _is_in_bad_fork():
        os.execv(sys.executable, [sys.executable, "-P", "-m", "daemon.trainer", str(run_dir)])  # noqa: S606  no shell is wanted
    from daemon.trainer.__main__ import main as run_in_process

    return run_in_process(run_dir)


def _send(channel: socket.socket, **message: object) -> None:
    channel.send(json.dumps(message).encode())


def main(run: Callable[[Path], int], load: Callable[[str], None]) -> None:
    """End with the daemon, import, serve."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the daemon
    load(sys.argv[3])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    serve(channel, idle_seconds=float(sys.argv[2]), run=run)


if __name__ == "__main__":
    from daemon.trainer.bootstrap import set_library_environment

    os.environ.update(QUIET)
    set_library_environment()
    main(run_forked, preload)
