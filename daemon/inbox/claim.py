"""Claiming: a row in the store first, then the rename into the job's folder, then a check of what was renamed.

Durable is the row alone. The next start repeats a rename that a power cut took back; what came of it is made durable before
the job is queued (`daemon.inbox.validation`).
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from daemon.config import Settings
from daemon.errors import NotFound, is_gone
from daemon.inbox import layout
from daemon.inbox.archive import Archive, claim_file, return_pair, unclaim_sidecar
from daemon.inbox.candidates import SettledFile
from daemon.inbox.settle import FileStat
from daemon.inbox.watcher import identity_of
from daemon.job import FailureKind, Job, JobState, Priority, new_job_id
from daemon.store import JobStore, TransitionRefused
from daemon.text import escape


class NotClaimed(Exception):
    """A settled file that did not become a job. `waits`: it lies in the inbox still, and is tried again later."""

    def __init__(self, reason: str, *, waits: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.waits = waits


def claim(settings: Settings, store: JobStore, archive: Archive, file: SettledFile, log: Any) -> Job:
    """Make a job of a settled file. Raises NotClaimed, StoreError."""
    # Folders are compared: on an overlay, as in a container, a file's own device is another than its folder's.
    if _device(file.folder) != _device(settings.inbox_dir / layout.PROCESSING):
        raise NotClaimed("inbox/processing is on another file system; files are taken by renaming", waits=True)
    job = store.add(_plan_job(settings, store, file))
    try:
        taken = claim_file(settings, job, file.path, file.sidecar)
        unchanged = file.stat.same_content(FileStat.of(taken.lstat()))
    except OSError as failure:
        waits = not is_gone(failure)
        reason = (
            f"it could not be moved: {failure.strerror or failure}"
            if waits
            else "it was removed from the inbox before it could be taken"
        )
        log.warning("file.not_claimed", file=escape(job.name), job=job.id, reason=reason)
        try:
            unclaim_sidecar(settings, job)
        except OSError as error:
            log.error("file.not_moved", job=job.id, error=str(error))
        _close(archive, job, reason)
        raise NotClaimed(reason, waits=waits) from failure
    if not unchanged:
        reason = "it changed, or another took its place, while it was being taken; what lies there is watched anew"
        try:
            returned = return_pair(settings, job, file.folder)
        except OSError as error:  # the archive tries it again, as `cancel_request` says
            log.error("file.not_moved", job=job.id, error=str(error))
        else:
            log.warning("file.replaced", file=file.shown, job=job.id, now=escape(returned.name))
        _close(archive, job, reason, cancel_request="return")
        raise NotClaimed(reason, waits=False)
    log.info("file.claimed", file=file.shown, job=job.id, priority=job.priority.value, owner=job.owner)
    if file.sidecar_ignored:
        log.warning("file.sidecar_ignored", job=job.id, file=file.shown, reason=file.sidecar_ignored)
    return job


def take_out(
    settings: Settings, store: JobStore, archive: Archive, path: Path, *, priority: Priority, reason: str
) -> bool:
    """Move a dropped file, with its sidecar, out of the inbox as a job that failed for `reason`.

    For a file that the daemon cannot handle: nothing of it is read. Returns whether its name is free then; only
    datasets are moved. Raises StoreError, OSError.
    """
    if not os.path.lexists(path):
        return True
    if layout.name_kind(path.name) is not layout.NameKind.DATA:
        return False
    found = path.lstat()
    job_id = _free_id(settings, store)
    job = store.add(
        Job(
            id=job_id,
            name=path.name,
            state=JobState.CLAIMED,
            priority=priority,
            path=str(layout.processing_dir(settings, job_id) / path.name),
            source=str(path),
            source_inode=found.st_ino,
            size_bytes=found.st_size,
            owner=found.st_uid,
            reason=reason,
        )
    )
    sidecar = path.with_name(layout.sidecar_name(path.name))
    claim_file(settings, job, path, sidecar if os.path.lexists(sidecar) else None)
    archive.finish(job, JobState.FAILED, reason, failure=FailureKind.INTERNAL)
    return True


def _plan_job(settings: Settings, store: JobStore, file: SettledFile) -> Job:
    job_id = _free_id(settings, store)
    return Job(
        id=job_id,
        name=file.candidate.name,
        state=JobState.CLAIMED,
        priority=file.candidate.priority,  # until its sidecar is read, with its rows
        path=str(layout.processing_dir(settings, job_id) / file.candidate.name),
        source=str(file.path),
        source_inode=file.stat.inode,
        size_bytes=file.stat.size_bytes,
        owner=file.stat.owner,
        notes=(file.sidecar_ignored,) if file.sidecar_ignored else (),
        continues=file.candidate.continued_job,
        reason="its rows are being checked",
    )


def _free_id(settings: Settings, store: JobStore) -> str:
    job_id = new_job_id()
    while _is_used(settings, store, job_id):  # four hex digits a second are few in a burst
        job_id = new_job_id()
    return job_id


def _is_used(settings: Settings, store: JobStore, job_id: str) -> bool:
    if os.path.lexists(layout.processing_dir(settings, job_id)):
        return True
    try:
        store.get(job_id)
    except NotFound:
        return False
    return True


def _close(archive: Archive, job: Job, reason: str, **fields: Any) -> None:
    """End the job of a claim that was taken back."""
    with suppress(TransitionRefused):  # a command cancelled it at this moment
        archive.finish(job, JobState.CANCELLED, reason, **fields)


def _device(folder: Path) -> int | None:
    identity = identity_of(folder)
    return identity[0] if identity else None
