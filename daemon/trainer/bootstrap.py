"""How a trainer process imports its libraries: quickly, quietly, and without starting CUDA.

Once CUDA has started, no process may be forked, and rows are tokenised in forks.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from daemon.trainer.attempt import Engine

# What transformers and the Hub's client read once, when they are imported. No telemetry, no progress bars.
LIBRARY_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "warning",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def set_library_environment() -> None:
    """Set LIBRARY_ENVIRONMENT, except what the user has set."""
    for name, value in LIBRARY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def load_engine() -> Engine:
    """Import the engine that trains in this process; takes seconds."""
    set_library_environment()
    with collector_paused():
        import_peft()
        from daemon.trainer.train import train

    return train


@contextmanager
def collector_paused() -> Iterator[None]:
    """Import without garbage collection, a fifth quicker with torch and transformers.

    What was imported stays for good: the collector never looks at it again, and forks share its pages.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def import_peft() -> None:
    """Import peft before anything else does, and without bitsandbytes, whose import starts CUDA.

    peft does without until a model is loaded, and finds it then.
    """
    if "bitsandbytes" in sys.modules or find_spec("bitsandbytes") is None:
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # importlib's own way to say that it is not there
    try:
        import peft  # noqa: F401  for its place in sys.modules
    finally:
        del sys.modules["bitsandbytes"]
