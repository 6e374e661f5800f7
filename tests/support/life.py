"""Ends a `dropforge` process at any of its own durable steps.

Every COMMIT of the store and every rename is counted and noted in a file; before a given one the process ends by
SIGKILL. Renames of the status and progress files are not counted: how many there are depends on the clock, and nothing
depends on them.
"""

from __future__ import annotations

import os
import signal
import sqlite3
from typing import Any


def kill_at(number: int, points_path: str) -> None:
    """Count from now on in this process, and kill it before point `number`; with 0 never."""
    points = os.open(points_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    count = 0

    def point(name: str) -> None:
        nonlocal count
        count += 1
        os.write(points, f"{count} {name}\n".encode())
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    class CountedConnection(sqlite3.Connection):
        def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
            if sql == "COMMIT":
                point("COMMIT")
            return super().execute(sql, *args)

    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **kwargs: connect(*args, **{**kwargs, "factory": CountedConnection})  # type: ignore[assignment]
    for name in ("rename", "replace"):
        _count(name, point)


def _count(name: str, point: Any) -> None:
    real = getattr(os, name)

    def counted(src: Any, dst: Any, *args: Any, **kwargs: Any) -> None:
        if "status.json" not in str(dst):
            point(f"{name} {os.path.basename(os.fsdecode(dst))}")  # noqa: PTH119  pathlib would call what is counted
        real(src, dst, *args, **kwargs)

    setattr(os, name, counted)
