"""What a run tells the daemon: events as they happen, its progress, and a typed result written last."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from daemon.job import Progress, RunResult, to_json, utc_now
from daemon.run_dir import EVENTS_NAME, PROGRESS_NAME, RESULT_NAME
from guard.atomic import write_atomic

PROGRESS_SECONDS = 0.2  # a step of the tiny model takes 10 ms; nobody reads faster than this


class RunWriter:
    """Writes into one run directory. Progress is replaced without fsync: after a crash it is of no use anyway."""

    def __init__(self, run_dir: Path, *, result_dir: Path | None = None) -> None:
        self._run_dir = run_dir
        self._result_dir = result_dir or run_dir
        self._events = (run_dir / EVENTS_NAME).open("a", encoding="ascii", buffering=1)
        self._progress = Progress(phase="starting")
        self._written = 0.0

    def event(self, name: str, **data: Any) -> None:
        """Append one event; the daemon carries it into its log under the same name."""
        self._events.write(json.dumps({"at": utc_now(), "event": name, **data}, default=str) + "\n")

    def progress(self, **fields: Any) -> None:
        """Change some fields of the progress; a new phase is written at once, steps at most every PROGRESS_SECONDS."""
        before = self._progress
        self._progress = replace(before, at=utc_now(), **fields)
        now = time.monotonic()
        if self._progress.phase == before.phase and now - self._written < PROGRESS_SECONDS:
            return
        self._written = now
        beside = self._run_dir / f".{PROGRESS_NAME}.{os.getpid()}"
        beside.write_text(to_json(self._progress), encoding="ascii")
        beside.replace(self._run_dir / PROGRESS_NAME)

    def result(self, result: RunResult) -> None:
        """Write the result durably; it is the last word of the attempt."""
        write_atomic(self._result_dir / RESULT_NAME, to_json(result, indent=1))
