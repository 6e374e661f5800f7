"""An error that nobody foresaw, thrown into the daemon from outside wherever a certain file or job is in hand."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

_OTHER_DATASET = re.compile(r"Dataset changed: \S+ -> ")  # a later job's verdict names the dataset before it


def fail(place: str, word: str, most: int, count_path: str) -> None:
    """Let `module:Class.method` raise when its arguments tell of `word`, `most` times at most.

    Each time is noted in a file, so that it counts over several lives.
    """
    module, _, name = place.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real = getattr(owner, last)
    count = Path(count_path)

    def failing(*args: Any, **kwargs: Any) -> Any:
        thrown = len(count.read_bytes()) if count.exists() else 0
        if thrown < most and any(word in _OTHER_DATASET.sub("", repr(value)) for value in (*args, *kwargs.values())):
            count.write_bytes(b"x" * (thrown + 1))
            raise ZeroDivisionError("thrown by the test")
        return real(*args, **kwargs)

    setattr(owner, last, failing)


def put(place: str, value: str) -> None:
    """Set `module:NAME`, a path, for this process."""
    module, _, name = place.partition(":")
    setattr(importlib.import_module(module), name, Path(value))
