"""`python -m daemon.trainer.worker RUN_DIR`, under torchrun: one of the processes that share a run."""

from __future__ import annotations

import sys
from pathlib import Path

from daemon.run_dir import worker_dir
from daemon.trainer import distributed
from daemon.trainer.attempt import exit_process, run_attempt
from daemon.trainer.bootstrap import load_engine


def main(run_dir: Path) -> int:
    """Compute this process's share of the run; returns the exit code."""
    code = run_attempt(run_dir, load_engine, worker_dir=worker_dir(run_dir, distributed.rank()))
    distributed.destroy_process_group()
    return code


if __name__ == "__main__":
    exit_process(lambda: main(Path(sys.argv[1])))
