"""`python -m daemon.trainer.worker RUN_DIR`, under torchrun: one of the processes that share a run."""

from __future__ import annotations

import sys
from pathlib import Path

from daemon.run_dir import worker_dir
from daemon.trainer import distributed
from daemon.trainer.__main__ import load
from daemon.trainer.attempt import conduct, end


def run_share(run_dir: Path) -> int:
    """This process's share of the run; returns the exit code."""
    code = conduct(run_dir, load, member=worker_dir(run_dir, distributed.process()))
    distributed.leave()
    return code


if __name__ == "__main__":
    end(lambda: run_share(Path(sys.argv[1])))
