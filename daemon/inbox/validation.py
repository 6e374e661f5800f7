"""From claimed to queued: every claimed file gets its pass, and what the pass found decides.

Good rows are queued with the recipe frozen; content that was trained before ends as a duplicate; everything else is
refused with a report.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from daemon.config import Settings
from daemon.dataset.requests import Reply, Request
from daemon.dataset.rows import Rules
from daemon.errors import NotFound
from daemon.inbox import archive, layout
from daemon.inbox.filing import Filing
from daemon.inbox.layout import sidecar_name
from daemon.inbox.sidecar import RejectedSidecar, read_sidecar
from daemon.inbox.validation_pool import ValidationPool
from daemon.inbox.watcher import Rings
from daemon.job import Dataset, Job, JobState, utc_now
from daemon.store import JobStore
from daemon.text import escape

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0  # before a file that changed under its pass is passed again


@dataclass
class _Again:
    """A job whose file changed while it was read."""

    name: str
    due: float
    pause: float
    since: str


class Validator:
    """The claimed jobs of one root, and the passes over their files. One thread calls everything."""

    def __init__(self, settings: Settings, store: JobStore, *, filing: Filing, wakeup: Rings, log: Any) -> None:
        self.settings = settings
        self._filing = filing
        self._store = store
        self._log = log
        self._passes = ValidationPool(wakeup, log)
        self._asked: set[str] = set()  # jobs whose pass is under way
        self._again: dict[str, _Again] = {}

    def open(self) -> None:
        """Start the child for ordinary files, and pass what an earlier daemon had claimed."""
        self._passes.warm_up()
        self.adopt()

    def close(self) -> None:
        """End the passes; their jobs stay claimed and are passed again at the next start."""
        self._passes.close()
        self._asked.clear()

    def busy(self) -> tuple[tuple[str, int, int], ...]:
        """Job, bytes read and size of each file in its pass."""
        return self._passes.busy()

    def unsteady(self) -> Iterator[tuple[str, str]]:
        """Name and since when, of claimed files that somebody still writes to."""
        return ((escape(again.name), again.since) for again in self._again.values())

    def next_due(self, now: float) -> float | None:
        """Seconds until a file is to be passed again."""
        return min((max(0.0, again.due - now) for again in self._again.values()), default=None)

    def tick(self) -> None:
        """Act on what the passes found, and pass again what had changed under its pass."""
        for reply in self._passes.collect():
            self._asked.discard(reply.job_id)
            job = self._claimed(reply.job_id)
            if job is None:
                self._again.pop(reply.job_id, None)
            else:
                try:
                    self._conclude(job, reply)
                except OSError as error:  # a full disk: the job stays claimed, and is passed again at the next rescan
                    self._log.error("dataset.not_concluded", job=job.id, error=str(error))
        now = time.monotonic()
        for job_id, again in list(self._again.items()):
            if again.due <= now:
                again.due = float("inf")
                job = self._claimed(job_id)
                if job is None:
                    del self._again[job_id]
                else:
                    self.ask(job)

    def adopt(self) -> None:
        """Pass the jobs that are claimed and not under way: after a start, after a retry of a refused file."""
        for job in self._store.jobs({JobState.CLAIMED}):
            if job.id not in self._asked and job.id not in self._again:
                self.ask(job)

    def ask(self, job: Job) -> None:
        """Send a claimed job's file to its pass, under the rules that its sidecar leaves in force.

        The sidecar is read where it lies now: a crash between claim and pass, and a person who mends it before a
        retry, are the same case.
        """
        path = layout.locate(self.settings, job)
        if path is None:
            self.cancel(job, "its file is gone from processing/")
            return
        sidecar_path = path.with_name(sidecar_name(job.name))
        if os.path.lexists(sidecar_path):  # False as well for a name that is too long to be one
            try:
                sidecar = read_sidecar(sidecar_path, self.settings.recipe)
            except RejectedSidecar as error:
                self.reject(job, f"{error.sentence}; {error.hint}")
                return
            wanted = (sidecar.overrides, sidecar.force, sidecar.priority or job.priority)
            if wanted != (job.overrides, job.force, job.priority):
                overrides, force, priority = wanted
                job = self._store.update(job.id, overrides=overrides, force=force, priority=priority)
        rules = Rules.of(self.settings.recipe.with_overrides(job.overrides).data)
        self._asked.add(job.id)
        self._passes.ask(Request(job_id=job.id, path=str(path), rules=rules), job.size_bytes)

    def reject(self, job: Job, reason: str) -> None:
        """The file cannot be trained: claimed -> rejected, file to failed/."""
        moved = self._store.transition(job.id, JobState.CLAIMED, JobState.REJECTED, reason, finished_at=utc_now())
        self._filing.file(moved)

    def cancel(self, job: Job, reason: str, **fields: Any) -> None:
        """Nothing is to be trained: claimed -> cancelled, with a note beside the file."""
        moved = self._store.transition(
            job.id, JobState.CLAIMED, JobState.CANCELLED, reason, finished_at=utc_now(), **fields
        )
        self._filing.file(moved)

    def _claimed(self, job_id: str) -> Job | None:
        """The job, unless a person cancelled it meanwhile."""
        try:
            job = self._store.get(job_id)
        except NotFound:
            return None
        return job if job.state is JobState.CLAIMED else None

    def _conclude(self, job: Job, reply: Reply) -> None:
        if reply.kind == "changed":
            before = self._again.get(job.id)
            pause = min(LONGEST_PAUSE_SECONDS, before.pause * 2) if before else FIRST_PAUSE_SECONDS
            since = before.since if before else utc_now()
            self._again[job.id] = _Again(name=job.name, due=time.monotonic() + pause, pause=pause, since=since)
            return
        self._again.pop(job.id, None)
        if reply.report is not None and (reply.report.bad_rows or reply.report.reason):
            archive.write_rows_report(layout.processing_dir(self.settings, job.id), reply.report)
        if reply.dataset is not None:
            self._queue(job, reply.dataset)
        else:
            self.reject(job, reply.report.reason if reply.report is not None else reply.message)

    def _queue(self, job: Job, dataset: Dataset) -> None:
        """The rows are good: a duplicate of trained content ends here, all else waits for its turn."""
        self._log.info(
            "dataset.checked",
            job=job.id,
            rows=dataset.rows,
            format=dataset.format,
            size_bytes=dataset.size_bytes,
            digest=dataset.digest,
            skipped_rows=dataset.skipped_rows,
            unused_keys=dict(dataset.unused_keys),
            warnings=[f"{warning.message} ({warning.rows} rows)" for warning in dataset.warnings],
        )
        trained = [] if job.force else self._store.with_digest(dataset.digest, {JobState.SUCCEEDED})
        if trained:
            first = trained[0]
            reason = f"duplicate of job {first.id}, version {first.version or '?'}"
            self.cancel(job, reason, dataset=dataset, duplicate_of=first.id)
            return
        recipe = self.settings.recipe.with_overrides(job.overrides).model_dump(mode="json")
        self._store.transition(
            job.id,
            JobState.CLAIMED,
            JobState.QUEUED,
            "waits for its turn",
            dataset=dataset,
            recipe=recipe,
            size_bytes=dataset.size_bytes,
        )
        self._log.info("job.queued", job=job.id)
