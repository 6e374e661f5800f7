"""The folders of finished jobs go to done/ and failed/; what cannot be moved now is moved when it can be."""

from __future__ import annotations

from typing import Any

from daemon.config import Settings
from daemon.errors import DropforgeError, NotFound
from daemon.inbox import archive
from daemon.job import FINAL_STATES, Job
from daemon.store import JobStore


class Filing:
    """Remembers what is left to move. A restart finds it by itself: it lies in processing/."""

    def __init__(self, settings: Settings, store: JobStore, log: Any) -> None:
        self.settings = settings
        self._store = store
        self._log = log
        self._left: dict[str, str] = {}  # job -> why its folder was not moved

    def file(self, job: Job) -> None:
        """Move a finished job's folder, or remember it."""
        try:
            archive.settle_files(self.settings, job)
        except (DropforgeError, OSError) as error:
            if job.id not in self._left:
                self._log.error("file.not_moved", job=job.id, error=str(error))
            self._left[job.id] = str(error)
            return
        if self._left.pop(job.id, None):
            self._log.info("file.moved", job=job.id)

    def again(self) -> None:
        """Try what is left."""
        for job_id in list(self._left):
            try:
                job = self._store.get(job_id)
            except NotFound:
                job = None
            if job is None or job.state not in FINAL_STATES:
                del self._left[job_id]  # a person put it back
            else:
                self.file(job)

    def warnings(self) -> list[str]:
        """One sentence while something is left."""
        if not self._left:
            return []
        why = next(iter(self._left.values()))
        return [f"{len(self._left)} finished files could not be moved out of processing/ yet: {why}"]
