"""An error that nobody foresaw, or a sudden end, brought to the daemon wherever a certain file or job is in hand."""

from __future__ import annotations

import importlib
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

_OTHER_DATASET = re.compile(r"Dataset changed: \S+ -> ")  # a later job's verdict names the dataset before it


def fail(place: str, word: str, most: int, count_path: str) -> None:
    """Let `module:Class.method` raise when its arguments tell of `word`, `most` times at most.

    Each time is noted in a file, so that it counts over several lives.
    """

    def throw() -> None:
        raise ZeroDivisionError("thrown by the test")

    _do(throw, place, word, most, Path(count_path))


def die(place: str, word: str, most: int, count_path: str) -> None:
    """Let the daemon die there as by a fault in native code, or by the watchdog: nothing in it is told."""
    _do(lambda: os.kill(os.getpid(), signal.SIGKILL), place, word, most, Path(count_path))


def _do(deed: Callable[[], None], place: str, word: str, most: int, count: Path) -> None:
    module, _, name = place.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real = getattr(owner, last)

    def failing(*args: Any, **kwargs: Any) -> Any:
        thrown = len(count.read_bytes()) if count.exists() else 0
        if thrown < most and any(word in _OTHER_DATASET.sub("", repr(value)) for value in (*args, *kwargs.values())):
            count.write_bytes(b"x" * (thrown + 1))
            deed()
        return real(*args, **kwargs)

    setattr(owner, last, failing)


def put(place: str, value: str) -> None:
    """Set `module:NAME`, a path, for this process."""
    module, _, name = place.partition(":")
    setattr(importlib.import_module(module), name, Path(value))
