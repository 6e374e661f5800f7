"""`python -m daemon.trainer.fork_server CHANNEL IDLE_SECONDS BASE`: has the imports done, and forks one child for each job.

Imports only: nothing here touches CUDA, and there is no thread but the main one, or no child is made. A child is handed to
the daemon as its own (its parent here ends at once, and the daemon is the subreaper), so whatever becomes of this process
afterwards means nothing to it.
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
from daemon.trainer.attempt import end
from daemon.trainer.bootstrap import collector_paused, import_peft

MOST_DESCRIPTORS = 8
REQUEST_BYTES = 65_536
# What a run imports on its way beyond the three libraries.
ON_THE_WAY = (
    "daemon.trainer.train",
    "daemon.trainer.card",
    "guard.callback",
    "peft.utils.transformers_weight_conversion",
    "torch.utils.serialization.config",
    "numpy.ctypeslib",
)
# So that no library starts threads of its own when it is imported.
QUIET = {
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


def serve(channel: socket.socket, *, idle_seconds: float, run: Callable[[Path], int]) -> None:
    """Fork a child for every request until the daemon is gone, or nothing came for `idle_seconds`."""
    if reason := unfit():
        print(f"no trainer can be kept warm: {reason}", file=sys.stderr)
        _send(channel, refused=reason)
        return
    _send(channel, ready=True)
    channel.settimeout(idle_seconds)
    while True:
        try:
            text, descriptors, _, _ = socket.recv_fds(channel, REQUEST_BYTES, MOST_DESCRIPTORS)
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
    """Why this process must not be forked; empty when it may be."""
    threads = [Path(entry.path, "comm").read_text().strip() for entry in os.scandir("/proc/self/task")]
    if len(threads) > 1:
        return f"a library has started threads: {', '.join(threads)}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA has been started"
    return ""


def _fork(channel: socket.socket, run_dir: Path, descriptors: list[int], run: Callable[[Path], int]) -> int:
    """The pid of a child that is in a session of its own, is the daemon's, and only then begins."""
    told, tell = os.pipe()
    wait, go = os.pipe()
    between = os.fork()
    if between == 0:
        child = os.fork()
        if child:
            os._exit(0)  # the child is the daemon's from here on
        _become_trainer(channel, descriptors[0], (told, go), tell, wait)
        end(lambda: run(run_dir))  # no way back into the server's loop
    os.close(tell)
    os.close(wait)
    os.waitpid(between, 0)
    with os.fdopen(told) as text:
        pid = int(text.read())
    os.close(go)
    return pid


def _become_trainer(channel: socket.socket, log: int, others: tuple[int, int], tell: int, wait: int) -> None:
    os.setsid()  # first: who knows the pid may signal the group
    channel.close()
    for descriptor in others:
        os.close(descriptor)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(nothing)
    os.close(log)
    os.write(tell, str(os.getpid()).encode())
    os.close(tell)
    os.read(wait, 1)  # ends when the process between has
    os.close(wait)
    for name in QUIET:
        os.environ.pop(name, None)


def preload(base: str) -> None:
    """Import what every run imports, and the module of the base model's architecture."""
    with collector_paused():
        import_peft()
        for name in ON_THE_WAY:
            importlib.import_module(name)
        with suppress(OSError, ValueError, ImportError, AttributeError):
            kind = json.loads(Path(base, "config.json").read_bytes())["model_type"]
            if re.fullmatch(r"[a-z0-9_]+", kind):
                importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")


def run_forked(run_dir: Path) -> int:
    """A run in a fork of this process; where CUDA cannot be started in one, in the same process begun anew.

    It cannot when something asked the driver for GPUs before the fork: torch does where NVML is missing, as in containers that
    were given `compute` alone. That is known only in the fork.
    """
    from torch.cuda import _is_in_bad_fork

    if _is_in_bad_fork():
        os.execv(sys.executable, [sys.executable, "-P", "-m", "daemon.trainer", str(run_dir)])  # noqa: S606  no shell is wanted
    from daemon.trainer.__main__ import run_here

    return run_here(run_dir)


def _send(channel: socket.socket, **message: object) -> None:
    channel.send(json.dumps(message).encode())


def main(run: Callable[[Path], int], load: Callable[[str], None]) -> None:
    """The process itself: end with the daemon, import, serve."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is the daemon's to hear
    load(sys.argv[3])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    serve(channel, idle_seconds=float(sys.argv[2]), run=run)


if __name__ == "__main__":
    from daemon.trainer.__main__ import settle_environment

    settle_environment()
    main(run_forked, preload)
