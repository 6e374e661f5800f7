"""LocalExecutor: the trainer as a child process of this machine, in a process group of its own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from daemon.executors.base import Exit
from daemon.gpu import GpuLock
from daemon.job import RunSpec
from daemon.processes import ProcessIdentity, identify, oom_kills
from daemon.run_dir import LOG_NAME, begin_attempt, read_identity, write_identity


class LocalExecutor:
    """Starts `command RUN_DIR`; stdout and stderr go to `trainer.log` there."""

    def __init__(self, command: Sequence[str], *, gpu: GpuLock | None = None) -> None:
        self._command = list(command)
        self._gpu = gpu or GpuLock(None)
        self._children: dict[Path, subprocess.Popen[bytes]] = {}
        self._adopted: dict[Path, ProcessIdentity] = {}
        self._killed: set[Path] = set()  # by us
        self._environment: dict[str, str] = {}  # of the latest trainer, beyond ours
        self._oom_kills = 0  # of the machine, when the latest trainer was launched

    def launch(self, spec: RunSpec) -> None:
        """Write the specification, start the process, note its identity."""
        run_dir = begin_attempt(spec)
        self._environment = {"CUDA_VISIBLE_DEVICES": spec.gpu} if spec.gpu else {}
        self._oom_kills = oom_kills()
        self._killed.discard(run_dir)
        child = self._spawn(run_dir)
        self._children[run_dir] = child
        identity = identify(child.pid)
        # A crash before this line leaves a trainer without a record: its own death signal ends it, and until then the
        # model lock keeps a second one from doing harm.
        if identity is not None:
            try:
                write_identity(run_dir, identity)
            except BaseException:  # a trainer that the next daemon could not recognise must not run
                self._signal(run_dir, signal.SIGKILL)
                self._children.pop(run_dir).wait()
                raise

    def _spawn(self, run_dir: Path) -> subprocess.Popen[bytes]:
        """Start the process, its output in the run directory."""
        with (run_dir / LOG_NAME).open("ab") as log:
            return subprocess.Popen(
                [*self._command, str(run_dir)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **self._environment},
                pass_fds=self._inherited(),
            )

    def _inherited(self) -> tuple[int, ...]:
        """Open files that a trainer keeps for as long as it lives: the GPU's lock."""
        return self._gpu.descriptors

    def owns(self, run_dir: Path) -> bool:
        """Whether the trainer is a child that was not reaped yet."""
        return run_dir in self._children

    def adopt(self, run_dir: Path) -> bool:
        """Recognise a living trainer of an earlier daemon by pid, start time and boot."""
        identity = read_identity(run_dir)
        if identity is None or not identity.alive:
            return False
        self._adopted[run_dir] = identity
        return True

    def poll(self, run_dir: Path) -> Exit | None:
        """Return how the trainer ended, None while it runs."""
        child = self._children.get(run_dir)
        if child is None:
            identity = self._adopted.get(run_dir)
            return None if identity is not None and identity.alive else Exit()
        if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        # What it may have left in its group; before it is reaped, because its pid may be given again afterwards.
        self._signal(run_dir, signal.SIGKILL)
        code = child.wait()
        del self._children[run_dir]
        out_of_memory = code == -signal.SIGKILL and run_dir not in self._killed and oom_kills() > self._oom_kills
        return Exit(signal=-code, out_of_memory=out_of_memory) if code < 0 else Exit(code=code)

    def request_stop(self, run_dir: Path) -> None:
        """Send SIGTERM to the trainer itself."""
        child = self._children.get(run_dir)
        identity = self._adopted.get(run_dir)
        if child is not None:  # not reaped before `poll` does it, so its pid is its own
            os.kill(child.pid, signal.SIGTERM)
        elif identity is not None and identity.alive:
            os.kill(identity.pid, signal.SIGTERM)

    def kill(self, run_dir: Path) -> None:
        """Send SIGKILL to the whole process group."""
        self._killed.add(run_dir)
        identity = self._adopted.get(run_dir)
        if identity is None or identity.alive:
            self._signal(run_dir, signal.SIGKILL)

    def close(self) -> None:
        """Do nothing: nothing is kept between launches."""

    def _signal(self, run_dir: Path, number: signal.Signals) -> None:
        child = self._children.get(run_dir)
        identity = self._adopted.get(run_dir)
        group = child.pid if child is not None else identity.pid if identity is not None else 0
        if group > 1:
            try:
                os.killpg(group, number)
            except ProcessLookupError:
                return  # the group is empty already
