"""`python -m daemon.trainer RUN_DIR`: one attempt at one job, in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from daemon.trainer.attempt import Engine, exit_process, run_attempt
from daemon.trainer.bootstrap import load_engine, set_library_environment


def main(run_dir: Path) -> int:
    """Run one attempt, in this process or in several of this machine; returns the exit code."""
    return run_attempt(run_dir, load_engine, load_launcher=_load_launcher)


def _load_launcher() -> Engine:
    """Import the engine that starts several processes and trains in none."""
    set_library_environment()
    from daemon.trainer.launcher import launch

    return launch


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m daemon.trainer RUN_DIR")
    exit_process(lambda: main(Path(sys.argv[1])))
