"""Left alone: jobs and dropped files over which the daemon died even while they were given up. Nothing touches them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from daemon.errors import NotFound
from daemon.job import Job
from daemon.store import JobStore

LEFT_ALONE_KEY = "left_alone"  # of the store's controls
MOST_FILES = 100

FileMark = tuple[str, str, int]  # priority, name and inode of a dropped file


class LeftAlone:
    """What is left alone. A job is until it changes, as by `dropforge retry`; a file until another has its name."""

    def __init__(self, store: JobStore | None = None) -> None:
        self._store = store
        value: Mapping[str, Any] = (store.control(LEFT_ALONE_KEY) if store is not None else None) or {}
        self._jobs: dict[str, str] = dict(value.get("jobs") or {})  # id -> when it changed last; "" without a row
        self.files: list[FileMark] = [(priority, name, inode) for priority, name, inode in value.get("files") or ()]

    def has(self, job_id: str, updated_at: str = "") -> bool:
        """Whether a job is left alone; `updated_at` as its row has it now, "" for a folder without a row."""
        return self._jobs.get(job_id) == updated_at

    def add_job(self, job_id: str, updated_at: str = "") -> None:
        """Leave a job alone from now on. Raises StoreError."""
        self._jobs = {known: at for known, at in self._jobs.items() if self._is_as_it_was(known, at)}
        self._jobs[job_id] = updated_at
        self._save()

    def add_file(self, mark: FileMark) -> None:
        """Leave a dropped file alone from now on. Raises StoreError."""
        self.files = [*(known for known in self.files if known[:2] != mark[:2]), mark][-MOST_FILES:]
        self._save()

    def _is_as_it_was(self, job_id: str, updated_at: str) -> bool:
        try:
            job: Job | None = self._store.get(job_id) if self._store is not None else None
        except NotFound:
            job = None
        return (job.updated_at if job is not None else "") == updated_at

    def _save(self) -> None:
        if self._store is not None:
            self._store.set_control(LEFT_ALONE_KEY, {"jobs": self._jobs, "files": self.files})
