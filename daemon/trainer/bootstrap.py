"""How a trainer imports its libraries: without starting CUDA, after which no process may be forked, and quickly."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


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
    """Import peft before anything else does, without bitsandbytes, which asks every GPU for its kind when it is imported.

    peft does without until a model is loaded, and finds it then.
    """
    if "bitsandbytes" in sys.modules or find_spec("bitsandbytes") is None:
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # importlib's own way to say that it is not there
    try:
        import peft  # noqa: F401  for its place in sys.modules
    finally:
        del sys.modules["bitsandbytes"]
