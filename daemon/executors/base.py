"""The executor's contract with the scheduler: start, adopt, poll, stop and kill one trainer a job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from daemon.job import RunSpec
from daemon.processes import signal_name


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How a trainer process ended. Both None: it is gone, and its parent was another daemon."""

    code: int | None = None
    signal: int | None = None
    out_of_memory: bool = False  # an OOM kill happened during the run and we sent no SIGKILL

    def __str__(self) -> str:
        if self.out_of_memory:
            return "killed by the kernel, which was out of memory"
        if self.signal is not None:
            return f"killed by {signal_name(self.signal)}"
        return "gone" if self.code is None else f"exit code {self.code}"


class Executor(Protocol):
    """Runs one trainer a job. A run is identified by its run directory, also after a restart of the daemon."""

    def launch(self, spec: RunSpec) -> None:
        """Start the attempt that `spec` describes; returns as soon as it is started. Raises OSError."""

    def owns(self, run_dir: Path) -> bool:
        """Whether this executor itself started the trainer of `run_dir`, and has not reported its end yet."""

    def adopt(self, run_dir: Path) -> bool:
        """Take charge of a trainer that an earlier daemon left in `run_dir`; False when none is alive."""

    def poll(self, run_dir: Path) -> Exit | None:
        """Return how the trainer ended, None while it runs."""

    def request_stop(self, run_dir: Path) -> None:
        """Ask the trainer to seal a checkpoint and leave."""

    def kill(self, run_dir: Path) -> None:
        """Kill the trainer with everything it started, at once."""

    def close(self) -> None:
        """Release what is kept only for the next launch; a running trainer goes on."""
