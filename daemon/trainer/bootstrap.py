"""Libraries whose import would start CUDA: no process may be forked after that, and tokenising and warm start fork."""

from __future__ import annotations

import sys
from importlib.util import find_spec


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
