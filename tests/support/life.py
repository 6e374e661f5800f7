"""One daemon's life in a process that can be ended at any of its own durable steps.

    python -P life.py ROOT [KILL_AT]

Runs `dropforge run --once` on ROOT with every COMMIT of the store and every rename counted and noted in
`ROOT/points.txt`; before number KILL_AT the process ends by SIGKILL. Renames of the status and progress files are not
counted: how many there are depends on the clock, and nothing depends on them.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

root, kill_at = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
points = os.open(root / "points.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
count = 0


def point(name: str) -> None:
    global count  # noqa: PLW0603  this process has one counter
    count += 1
    os.write(points, f"{count} {name}\n".encode())
    if count == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


class CountedConnection(sqlite3.Connection):
    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        if sql == "COMMIT":
            point("COMMIT")
        return super().execute(sql, *args)


real_connect = sqlite3.connect
sqlite3.connect = lambda *args, **kwargs: real_connect(*args, **{**kwargs, "factory": CountedConnection})  # type: ignore[assignment]
for name in ("rename", "replace"):
    real = getattr(os, name)

    def counted(src: Any, dst: Any, *args: Any, real: Any = real, name: str = name, **kwargs: Any) -> None:
        if "status.json" not in str(dst):
            point(f"{name} {Path(os.fsdecode(dst)).name}")
        real(src, dst, *args, **kwargs)

    setattr(os, name, counted)

from daemon import config, logs  # noqa: E402  they must see the counted functions
from daemon.service import Service  # noqa: E402  likewise

settings = config.load(root)
sys.exit(Service(settings, log=logs.configure(settings, terminal=False)).run(once=True))
