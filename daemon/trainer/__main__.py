"""`python -m daemon.trainer RUN_DIR`: one attempt at one job, in a process of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from daemon.trainer.attempt import Engine, conduct, end
from daemon.trainer.bootstrap import collector_paused, import_peft


def settle_environment() -> None:
    """What transformers and the Hub's client read once, when they are imported. No telemetry, no progress bars."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def load() -> Engine:
    """The engine that trains in this process; takes seconds."""
    settle_environment()
    with collector_paused():
        import_peft()
        from daemon.trainer.train import train

    return train


def run_here(run_dir: Path) -> int:
    """One attempt, in this process or in several of this machine; returns the exit code."""
    return conduct(run_dir, load, load_several=_load_several)


def _load_several() -> Engine:
    settle_environment()
    from daemon.trainer.launcher import run_several

    return run_several


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m daemon.trainer RUN_DIR")
    end(lambda: run_here(Path(sys.argv[1])))
