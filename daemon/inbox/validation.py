"""From claimed to queued: every claimed file is validated, and the report decides.

Good rows are queued with the recipe frozen; content that was trained before ends as a duplicate; everything else is
refused with a report. Before that the file, its sidecar and their places are durable, by the child that read them and by
one fsync of each shared folder for all that were claimed by then: what status calls queued survives a power cut.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from daemon.config import Settings
from daemon.dataset.requests import Reply, Request, SidecarRequest, SidecarWish
from daemon.dataset.rows import Rules
from daemon.errors import NotFound
from daemon.in_hand import InHand
from daemon.inbox import layout
from daemon.inbox.archive import Archive, sync_claims, write_rows_report
from daemon.inbox.duplicates import changed_settings
from daemon.inbox.validation_pool import ValidationPool
from daemon.job import Dataset, Job, JobState, utc_now
from daemon.recipe import DataSettings
from daemon.store import JobStore, TransitionRefused
from daemon.text import escape
from daemon.wakeup import SupportsSet

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0  # before a file that changed meanwhile is validated again


@dataclass
class _Repeat:
    """A job whose file changed while it was read."""

    name: str
    due: float
    pause: float
    since: str


class Validator:
    """The claimed jobs of one root. One thread calls everything."""

    def __init__(
        self,
        settings: Settings,
        store: JobStore,
        archive: Archive,
        *,
        wakeup: SupportsSet,
        in_hand: InHand,
        log: Any,
    ) -> None:
        self.settings = settings
        self._store = store
        self._archive = archive
        self._in_hand = in_hand
        self._log = log
        self._pool = ValidationPool(wakeup, log)
        self._submitted: set[str] = set()  # jobs whose file is in the pool
        self._unsynced: dict[str, Path] = {}  # of these, whose claim may not be on disk yet -> where it was dropped
        self._repeats: dict[str, _Repeat] = {}

    def open(self) -> None:
        """Start the child for ordinary files."""
        self._pool.warm_up()

    def close(self) -> None:
        """End the children; their jobs stay claimed and are validated at the next start."""
        self._pool.close()
        self._submitted.clear()
        self._unsynced.clear()

    def busy(self) -> tuple[tuple[str, int, int], ...]:
        """Return job, bytes read and size of each file in the pool."""
        return self._pool.busy()

    def unsteady(self) -> Iterator[tuple[str, str]]:
        """Return name, and since when, of claimed files that are still written to."""
        return ((escape(repeat.name), repeat.since) for repeat in self._repeats.values())

    def next_due(self, now: float) -> float | None:
        """Return the seconds until a file is validated again; None when none is."""
        return min((max(0.0, repeat.due - now) for repeat in self._repeats.values()), default=None)

    def tick(self) -> None:
        """Act on the pool's replies, and submit again what had changed while it was read."""
        for job, reply in self._collect():
            with self._in_hand.handling("checked", job=job.id):
                try:
                    self._apply(job, reply)
                except TransitionRefused:
                    continue  # a command cancelled it at this moment
                except (
                    OSError
                ) as error:  # a full disk: the job stays claimed, and is submitted again at the next rescan
                    self._log.error("dataset.not_concluded", job=job.id, error=str(error))
        for job_id in tuple(self._pool.reading()):
            if self._claimed(job_id) is None:  # a command cancelled it: the next file need not wait for its end
                self._pool.cancel(job_id)
                self._submitted.discard(job_id)
        now = time.monotonic()
        for job_id, repeat in list(self._repeats.items()):
            if repeat.due <= now:
                repeat.due = float("inf")
                again = self._claimed(job_id)
                if again is None:
                    del self._repeats[job_id]
                else:
                    self.submit(again)

    def _collect(self) -> list[tuple[Job, Reply]]:
        """Return the pool's replies with their jobs, whose claims are durable now."""
        found = []
        for reply in self._pool.collect():
            self._submitted.discard(reply.job_id)
            job = self._claimed(reply.job_id)
            if job is None:
                self._repeats.pop(reply.job_id, None)
            else:
                found.append((job, reply))
        if any(job.id in self._unsynced for job, _ in found):
            try:
                sync_claims(self.settings, self._unsynced.values())
            except OSError as error:  # they stay claimed, and are submitted again at the next rescan
                self._log.error("dataset.not_concluded", job=found[0][0].id, error=str(error))
                return []
            self._unsynced.clear()
        return found

    def adopt_claimed(self) -> None:
        """Submit the claimed jobs that are not in the pool, as after a start or a retry."""
        for job in self._store.jobs({JobState.CLAIMED}):
            if job.id not in self._submitted and job.id not in self._repeats:
                self.submit(job)

    def submit(self, job: Job) -> None:
        """Send a claimed job's file to the pool, under its sidecar's rules.

        The sidecar is read where it lies now: a crash after the claim, and a sidecar that was mended before a retry,
        are the same case.
        """
        with self._in_hand.handling("sent to be checked", job=job.id):
            try:
                self._submit(job)
            except TransitionRefused:
                return  # a command cancelled it at this moment
            except OSError as error:  # it stays claimed, and is submitted again at the next rescan
                self._log.error("dataset.not_concluded", job=job.id, error=str(error))

    def _submit(self, job: Job) -> None:
        path = layout.locate(self.settings, job)
        if path is None:
            self._archive.finish(job, JobState.CANCELLED, "its file is gone from processing/")
            return
        refusal = _lost_content(job, path)
        sidecar, sidecar_path = None, path.with_name(layout.sidecar_name(job.name))
        recipe, limits = self.settings.recipe, self.settings.limits
        if os.path.lexists(sidecar_path):  # False as well for a name that is too long to be one
            sidecar = SidecarRequest(
                path=str(sidecar_path), recipe=recipe.model_dump(mode="json"), limits=limits.model_dump(mode="json")
            )
        self._submitted.add(job.id)
        self._unsynced[job.id] = Path(job.source).parent
        rules = Rules.of(recipe.data, limits)
        request = Request(job_id=job.id, path=str(path), rules=rules, durable=True, refusal=refusal, sidecar=sidecar)
        self._pool.submit(request, job.size_bytes, job.owner)

    def _claimed(self, job_id: str) -> Job | None:
        """The job, unless it was cancelled meanwhile."""
        try:
            job = self._store.get(job_id)
        except NotFound:
            return None
        return job if job.state is JobState.CLAIMED else None

    def _apply(self, job: Job, reply: Reply) -> None:
        if reply.kind == "changed":
            before = self._repeats.get(job.id)
            pause = min(LONGEST_PAUSE_SECONDS, before.pause * 2) if before else FIRST_PAUSE_SECONDS
            since = before.since if before else utc_now()
            self._repeats[job.id] = _Repeat(name=job.name, due=time.monotonic() + pause, pause=pause, since=since)
            return
        self._repeats.pop(job.id, None)
        if reply.report is not None and (reply.report.bad_rows or reply.report.reason):
            write_rows_report(layout.processing_dir(self.settings, job.id), reply.report)
        job = self._with_wish(job, reply.wish or SidecarWish())
        if reply.dataset is not None:
            self._queue(job, reply.dataset)
        else:
            found = reply.report
            reason, hint = (found.reason, found.hint) if found is not None else (reply.message, reply.hint)
            self._archive.finish(job, JobState.REJECTED, reason, hint=hint)

    def _with_wish(self, job: Job, wish: SidecarWish) -> Job:
        """Record what the job's sidecar asks for, as far as it says something new."""
        notes = job.notes
        if wish.ignored and wish.ignored not in notes:
            notes = (*notes, wish.ignored)
            self._log.warning("file.sidecar_ignored", job=job.id, file=escape(job.name), reason=wish.ignored)
        asked: dict[str, Any] = {
            "overrides": wish.overrides,
            "force": job.force or wish.force,
            "priority": wish.priority or job.priority,
            "notes": notes,
        }
        if all(getattr(job, name) == value for name, value in asked.items()):
            return job
        return self._store.update(job.id, expected=JobState.CLAIMED, **asked)

    def _queue(self, job: Job, dataset: Dataset) -> None:
        """Queue a job whose rows are good, unless it is a duplicate of trained content."""
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
        recipe = self.settings.recipe.with_overrides(job.overrides)
        if self._archive.finish_duplicate(job, dataset, recipe.data):
            return
        if notes := self._trained_otherwise(job, dataset, recipe.data):
            dataset = replace(dataset, notes=(*dataset.notes, *notes))
        self._store.transition(
            job.id,
            JobState.CLAIMED,
            JobState.QUEUED,
            "waits for its turn",
            dataset=dataset,
            recipe=recipe.model_dump(mode="json"),
            size_bytes=dataset.size_bytes,
        )
        self._log.info("job.queued", job=job.id)

    def _trained_otherwise(self, job: Job, dataset: Dataset, data: DataSettings) -> list[str]:
        """Say that the same file was trained before under other settings, which is why it is trained again."""
        before = [] if job.force else self._store.trained(dataset.digest)
        if not before:
            return []
        changed = "; ".join(changed_settings(before[-1], dataset, data))
        version = before[-1].version or "?"
        return [f"job {before[-1].id} trained the same file as version {version}, with other settings: {changed}"]


def _lost_content(job: Job, path: Path) -> tuple[str, str] | None:
    """Why a file that has become empty since it was claimed is refused, and what to do; None for any other."""
    if not job.size_bytes or path.lstat().st_size:
        return None
    reason = (
        f"it is empty, and had {job.size_bytes} bytes when it was dropped: it was cut, or was not on disk yet when the"
    )
    return f"{reason} machine lost its power", "drop it again"
