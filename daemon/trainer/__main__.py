"""`python -m daemon.trainer RUN_DIR`: one attempt at one job, in a process of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from daemon.trainer.session import Engine, conduct


def _load() -> Engine:
    # Before transformers is imported: it reads these once.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from daemon.trainer.train import train

    return train


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m daemon.trainer RUN_DIR")
    sys.exit(conduct(Path(sys.argv[1]), _load))
