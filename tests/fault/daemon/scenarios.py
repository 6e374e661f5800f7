"""What the killed process was doing; see tests/fault/guard/scenarios.py."""

from __future__ import annotations

from pathlib import Path

import guard
from daemon import recovery, versions


def promote(model_dir: str) -> None:
    """What the scheduler does with a finished candidate."""
    folder = Path(model_dir)
    with guard.ModelLock(folder, owner="promotion"):
        version = versions.promote(folder, folder / ".staging" / "candidate-b", job_id="b", record={"rows": 2})
        guard.mark_finished(folder, version.name)


def set_aside(store: str) -> None:
    """What a start does with a store that it cannot read."""
    recovery.set_aside(Path(store))
