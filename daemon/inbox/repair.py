"""Mending the inbox after a crash, from both sides: the rows of the store, and the folders on disk.

A claim writes its row, then renames; a settled job changes its state, then moves its folder. Whatever lies between can
be told from what is there, and finished. Nothing is deleted but empty folders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from daemon.config import Settings
from daemon.errors import NotFound
from daemon.inbox import archive, layout
from daemon.inbox.layout import NameKind, name_kind, sidecar_name
from daemon.inbox.report import REPORT_JSON, REPORT_TEXT
from daemon.inbox.sidecar import RejectedSidecar, Sidecar, read_sidecar
from daemon.job import (
    FINAL_STATES,
    OPEN_STATES,
    Job,
    JobState,
    Priority,
    RunSpec,
    utc_now,
)
from daemon.run_dir import latest_spec, run_dir_of, sealed_step
from daemon.store import JobStore
from daemon.text import escape

_JOB_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4,}")
_OURS = frozenset({archive.ROWS_JSON, REPORT_JSON, REPORT_TEXT})


def repair(settings: Settings, store: JobStore, log: Any) -> Iterator[str]:
    """Finish every claim and every move that was begun. Yields what a person should look at. Raises OSError."""
    for job in store.jobs({JobState.CLAIMED}):
        _finish_claim(settings, store, job, log)
    folder = settings.inbox_dir / layout.PROCESSING
    latest = latest_spec(settings.state_dir)
    for path in sorted(folder.iterdir()):
        try:
            job = store.get(path.name)
        except NotFound:
            yield from _adopt(settings, store, path, log, run=latest if latest and latest.job_id == path.name else None)
            continue
        if job.state in FINAL_STATES:
            archive.settle_files(settings, job)
            log.info("file.settled_after_crash", job=job.id)
    for job in store.jobs(OPEN_STATES):
        path_of_job = layout.locate(settings, job)
        if path_of_job is not None and path_of_job.parent.parent != folder:
            archive.return_for_retry(settings, job)
            log.info("file.returned_after_crash", job=job.id)


def _finish_claim(settings: Settings, store: JobStore, job: Job, log: Any) -> None:
    """A row without its rename: the rename is done now, if the dropped file is still the one that the row means."""
    if layout.locate(settings, job) is not None:
        return
    source = Path(job.source)
    try:
        found = source.lstat()
        # Another size: it is being written again, and has to settle anew.
        same = (found.st_ino, found.st_size) == (job.source_inode, job.size_bytes)
    except OSError:
        same = False
    if same:
        sidecar = source.with_name(sidecar_name(job.name))
        archive.claim_file(settings, job, source, sidecar if os.path.lexists(sidecar) else None)
        archive.sync_claims(settings, [job])
        log.info("file.claimed_after_crash", job=job.id, file=escape(job.name))
        return
    archive.return_sidecar(settings, job)
    moved = store.transition(
        job.id,
        JobState.CLAIMED,
        JobState.CANCELLED,
        "it was removed from the inbox before it could be taken",
        finished_at=utc_now(),
    )
    archive.settle_files(settings, moved)


def _adopt(settings: Settings, store: JobStore, folder: Path, log: Any, *, run: RunSpec | None) -> Iterator[str]:
    """A folder without a row (the store was lost or set aside): its file becomes a job again, under the same id.

    The run that was launched last is taken for running: the scheduler then adopts its trainer, or concludes what it
    left. Every other file has its rows checked again.
    """
    if not folder.is_dir() or folder.is_symlink():
        yield f"{_shown(settings, folder)} does not belong there; it is left alone"
        return
    names = [entry.name for entry in folder.iterdir() if entry.name not in _OURS]
    if not names:
        with suppress(OSError):  # holds reports: left as it is
            folder.rmdir()
        return
    data = [name for name in names if name_kind(name) is NameKind.DATA]
    if len(data) != 1 or not _JOB_ID.fullmatch(folder.name):
        yield f"{_shown(settings, folder)} has no job and not one dataset; it is left alone"
        return
    path = folder / data[0]
    found = path.lstat()
    sidecar = Sidecar()
    with suppress(OSError, RejectedSidecar):  # told when the rows are checked
        if os.path.lexists(beside := folder / sidecar_name(path.name)):
            sidecar = read_sidecar(beside, settings.recipe)
    job = Job(
        id=folder.name,
        name=path.name,
        state=JobState.CLAIMED,
        priority=sidecar.priority or Priority.NORMAL,
        path=str(path),
        source=str(settings.inbox_dir / path.name),
        source_inode=found.st_ino,
        size_bytes=found.st_size,
        force=sidecar.force,
        overrides=sidecar.overrides,
        reason="found in processing/ without a record",
    )
    if run is not None:
        step = sealed_step(run_dir_of(settings.state_dir, job.id))
        job = replace(
            job, state=JobState.RUNNING, dataset=run.dataset, recipe=run.recipe, attempt=run.attempt, max_step=step
        )
    store.add(job)
    log.warning("file.adopted", job=folder.name, file=escape(path.name))


def _shown(settings: Settings, path: Path) -> str:
    return escape(str(path.relative_to(settings.root) if path.is_relative_to(settings.root) else path))
