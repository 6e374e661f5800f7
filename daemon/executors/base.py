"""What the scheduler asks of an executor, whatever runs the trainer in the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from daemon.job import RunSpec
from daemon.processes import signal_name


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How a trainer process ended. Both None: it is gone and nobody of us was its parent."""

    code: int | None = None
    signal: int | None = None
    out_of_memory: bool = False  # the kernel killed something for want of memory meanwhile, and this was not us

    def __str__(self) -> str:
        if self.out_of_memory:
            return "killed by the kernel, which was out of memory"
        if self.signal is not None:
            return f"killed by {signal_name(self.signal)}"
        return "gone" if self.code is None else f"exit code {self.code}"


class Executor(Protocol):
    """Runs one trainer a job. A run is known by its run directory, also to the daemon's next life."""

    def launch(self, spec: RunSpec) -> None:
        """Start the attempt that `spec` describes; returns as soon as it is started. Raises OSError."""

    def adopt(self, run_dir: Path) -> bool:
        """Take charge of a trainer that an earlier daemon left in `run_dir`; False when none is alive."""

    def poll(self, run_dir: Path) -> Exit | None:
        """None while it runs."""

    def ask(self, run_dir: Path) -> None:
        """Ask the trainer to seal a checkpoint and leave."""

    def end(self, run_dir: Path) -> None:
        """End the trainer with everything it started, at once."""

    def close(self) -> None:
        """Give up what is only kept for the next launch; a running trainer goes on."""
