"""What is done to a process from outside: an error that nobody foresaw, a sudden end, a place that lies elsewhere."""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

_OTHER_DATASET = re.compile(r"Dataset changed: \S+ → ")  # a later job's verdict names the dataset before it


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


def train(run_dir: str, killed_at: int) -> NoReturn:
    """Be the trainer of a run, killed at the end of a step: its weights have moved, no checkpoint knows of it; 0: never."""
    from daemon.trainer.__main__ import main
    from daemon.trainer.callbacks import MonitorCallback

    ended = MonitorCallback.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return ended(self, args, state, control, **kwargs)

    MonitorCallback.on_step_end = on_step_end  # type: ignore[method-assign]
    sys.exit(main(Path(run_dir)))
