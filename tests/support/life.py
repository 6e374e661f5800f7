"""One `dropforge` command in a process that can be ended at any of its own durable steps.

    python -P life.py ROOT KILL_AT COMMAND...       (`run` is `run --once`)

Every COMMIT of the store and every rename is counted and noted in `ROOT/points.txt`; before number KILL_AT the process
ends by SIGKILL, with 0 never. Renames of the status and progress files are not
counted: how many there are depends on the clock, and nothing depends on them.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

root, kill_at, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
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

from daemon.cli.main import main  # noqa: E402  it must see the counted functions

sys.argv = ["dropforge", "--root", str(root), *command, *(["--once"] if command == ["run"] else [])]
main()
