"""How jobs end, told once: the canonical line of the log, and the hooks.

A job is ended by the scheduler, by a pass over its rows, or by a person whose command has no log of its own. All of them
move it through the store; what is told is read from there, so that every ending is told, whoever brought it about, also
one that came while no daemon ran. A crash between telling and remembering tells it again, never less than once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from daemon.errors import NotFound
from daemon.hooks import Hooks
from daemon.job import FINAL_STATES, OPEN_STATES, Job, JobState, JobTransition
from daemon.observability.status import finished_job
from daemon.store import JobStore
from daemon.text import escape

TOLD_KEY = "told"  # the last move that was looked at
REASON_CHARACTERS = 2000
# What the log says of a move, by the state that it leads to, and how severe that is.
_NAMES: Mapping[JobState, tuple[str, str]] = {
    JobState.SUCCEEDED: ("job.succeeded", "info"),
    JobState.FAILED: ("job.failed", "error"),
    JobState.CANCELLED: ("job.cancelled", "info"),
    JobState.REJECTED: ("job.rejected", "warning"),
}
_REQUEUED = ("job.requeued", "info")
_IN_THE_JOB = ("outcome", "failure", "message", "candidate")  # of a result: told as the job's own, or gone by now


class Endings:
    """Reads the moves of jobs and tells those that end one, or an attempt. One thread calls everything."""

    def __init__(self, store: JobStore, *, hooks: Hooks, log: Any) -> None:
        self._store = store
        self._hooks = hooks
        self._log = log
        told = store.control(TOLD_KEY)
        if told is None:  # a new store, or one of an older version, whose history was told as it happened
            told = store.last_transition()
            store.set_control(TOLD_KEY, told)
        self._told = int(told)

    def tell(self) -> None:
        """Tell what ended since the last call, in the order in which it did."""
        any_told, last = False, None
        for number, move in self._store.transitions_after(self._told):
            self._told = number
            ended = move.new in FINAL_STATES
            if not ended and (move.old, move.new) != (JobState.RUNNING, JobState.QUEUED):
                continue
            try:
                job = self._store.get(move.job_id)
            except NotFound:  # forgotten since, by `keep_jobs_days`
                continue
            name, level = _NAMES[JobState(move.new)] if ended else _REQUEUED
            getattr(self._log, level)(name, **canonical(job, move))
            any_told = True
            if ended:
                last = finished_job(job)
                self._hooks.fire("on_job_finished", {"job": last})
        if last is not None and not any(self._store.counts()[state] for state in OPEN_STATES):
            self._hooks.fire("on_queue_empty", {"job": last})
        if any_told:
            self._store.set_control(TOLD_KEY, self._told)


def canonical(job: Job, move: JobTransition) -> dict[str, Any]:
    """Everything about the end of a job or of one attempt, for one line of the log; what is not known is left out."""
    dataset, result = job.dataset, job.result
    line: dict[str, Any] = {
        "job": job.id,
        "dataset": escape(job.name),
        "was": move.old,
        "reason": escape(move.reason, most=REASON_CHARACTERS),
        "failure": job.failure,
        "attempt": job.attempt,
        "version": job.version,
        "duplicate_of": job.duplicate_of,
        "priority": job.priority,
        "force": job.force or None,
        "overrides": dict(job.overrides) or None,
        "base_model": job.recipe["model"]["model_name_or_path"] if job.recipe else None,
        "size_bytes": job.size_bytes,
    }
    if dataset is not None:
        line |= {
            "digest": dataset.digest,
            "format": dataset.format,
            "dataset_rows": dataset.rows,
            "skipped_rows": dataset.skipped_rows,
        }
    if result is not None:
        line |= {name: value for name, value in asdict(result).items() if name not in _IN_THE_JOB}
    line |= {
        "max_step": job.max_step if job.attempt else None,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "total_seconds": _seconds_between(job.created_at, move.at),
    }
    return {name: value for name, value in line.items() if value is not None and value != ""}


def _seconds_between(begin: str, end: str) -> float | None:
    """From one UTC time to another; None when either is not one."""
    try:
        return round((datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds(), 3)
    except ValueError:
        return None
