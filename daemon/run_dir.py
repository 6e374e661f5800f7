"""What a trainer tells through its run directory: `events.jsonl`, `progress.json` and, last, `result.json`.

Everything may be torn by a crash, missing, or unreadable for the moment; none of that is an error here. The result says
what became of the run, and a run without one is lost.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from daemon.job import Progress, RunResult, from_json

EVENTS_NAME = "events.jsonl"
PROGRESS_NAME = "progress.json"
RESULT_NAME = "result.json"


class RunReader:
    """One run directory, read from where an earlier attempt's events end."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._bytes_read = _size(run_dir / EVENTS_NAME)

    def read(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and facts of each event since the last call. Whole lines only: the trainer may be in the middle of one."""
        try:
            with (self._run_dir / EVENTS_NAME).open("rb") as events:
                events.seek(self._bytes_read)
                text = events.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._bytes_read += len(whole)
        return _parse(whole)

    def progress(self) -> Progress | None:
        """Where the trainer is."""
        found: Progress | None = _read(self._run_dir / PROGRESS_NAME, Progress)
        return found

    def result(self) -> RunResult | None:
        """What the attempt did; None while it runs, and when it was lost."""
        found: RunResult | None = _read(self._run_dir / RESULT_NAME, RunResult)
        return found


def sealed_step(run_dir: Path) -> int:
    """The last step that a run has told to be sealed; its checkpoints lie in the model directory. 0: none."""
    step = 0
    try:
        text = (run_dir / EVENTS_NAME).read_bytes()
    except OSError:
        return step
    for name, facts in _parse(text):
        if name in ("run.started", "checkpoint.sealed"):
            step = int(facts.get("step", facts.get("start_step", 0)))
    return step


def _parse(lines: bytes) -> list[tuple[str, dict[str, Any]]]:
    told = []
    for line in lines.splitlines():
        try:
            event = json.loads(line)
            name = str(event.pop("event"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # torn by a crash of the trainer
        event.pop("at", None)
        told.append((name, event))
    return told


def _read(path: Path, kind: Any) -> Any:
    try:
        return from_json(path.read_bytes(), kind)
    except (OSError, ValueError):
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
