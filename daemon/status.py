"""The status file: one value, written whole, from which a reader can tell a living daemon from a dead one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from daemon.job import Job, Progress, utc_now
from daemon.processes import ProcessIdentity, boot_id, identify
from daemon.text import escape

SCHEMA_VERSION = 1
RECENT_JOBS = 20
WAITING_FILES = 50  # of more, the count is told


@dataclass(frozen=True, kw_only=True)
class StatusSnapshot:
    """What `status.json` says; the keys are public."""

    status: str  # starting | idle | training | waiting | paused | stopping | stopped
    reason: str
    schema_version: int = SCHEMA_VERSION
    pid: int = 0
    start_ticks: int = 0  # with boot_id: which process this pid meant
    boot_id: str = ""
    timestamp: str = ""  # heartbeat, UTC ISO 8601
    status_interval: float = 0.0  # seconds between heartbeats
    watch_mode: str = ""
    queue: Mapping[str, int] = field(default_factory=dict)  # jobs by state, and deferred files
    job: Mapping[str, Any] | None = None
    waiting: tuple[Mapping[str, Any], ...] = ()  # files in the inbox that are not taken yet, with why
    left_alone: tuple[Mapping[str, Any], ...] = ()  # what lies there and will not be taken, with why
    recent: tuple[Mapping[str, Any], ...] = ()
    model: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()


def write_status(path: Path, snapshot: StatusSnapshot) -> None:
    """Replace the status file by one rename. Not fsynced: after a crash of the machine it is of no use. Raises OSError."""
    me = identify(os.getpid())
    stamped = {
        **asdict(snapshot),
        "pid": os.getpid(),
        "start_ticks": me.start_ticks if me else 0,
        "boot_id": boot_id(),
        "timestamp": utc_now(),
    }
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(_finite(stamped), indent=1, ensure_ascii=True, allow_nan=False), encoding="ascii")
    beside.replace(path)


def read_status(path: Path) -> dict[str, Any] | None:
    """The status file's content with `alive` added: whether the daemon that wrote it still lives; None without a file.

    Raises ValueError when the file is not a status file.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    if not isinstance(content, dict) or "status" not in content:
        raise ValueError("not a status file")
    writer = ProcessIdentity(
        pid=int(content.get("pid", 0)),
        start_ticks=int(content.get("start_ticks", 0)),
        boot_id=str(content.get("boot_id", "")),
    )
    content["alive"] = writer.alive and content["status"] != "stopped"
    written = datetime.fromisoformat(str(content["timestamp"]))
    content["age_seconds"] = round((datetime.now(UTC) - written).total_seconds(), 1)
    return content


def running_job(job: Job, progress: Progress | None) -> dict[str, Any]:
    """The `job` object: the store's view of the running job and the trainer's own progress."""
    shown: dict[str, Any] = {
        "id": job.id,
        "dataset": escape(job.name),
        "rows": job.dataset.rows if job.dataset else None,
        "attempt": job.attempt,
        "started_at": job.started_at,
    }
    return shown | (asdict(progress) if progress else {"phase": "starting", "step": 0, "total_steps": 0})


def finished_job(job: Job) -> dict[str, Any]:
    """One entry of `recent`."""
    result = job.result
    return {
        "id": job.id,
        "dataset": escape(job.name),
        "state": job.state.value,
        "reason": escape(job.reason),
        "failure": job.failure.value if job.failure else None,
        "attempt": job.attempt,
        "version": job.version,
        "steps": result.steps_run if result else None,
        "held_out_before": result.held_out_before if result else None,
        "held_out_after": result.held_out_after if result else None,
        "updated_at": job.updated_at,
    }


def _finite(value: Any) -> Any:
    """NaN and infinity have no place in JSON; they read as null."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value
