"""Where the files of jobs lie, and their moves: claim, settle, return.

    inbox/x.jsonl -> inbox/processing/<job id>/x.jsonl -> inbox/done/<job id>/ or inbox/failed/<job id>/

Each job has a folder of its own, so names never meet. A job's folder moves as a whole, by one rename, with the file,
its sidecar and its reports in it; every step can be repeated.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from daemon.config import Settings
from daemon.dataset import DatasetReport
from daemon.errors import NotFound
from daemon.inbox import layout
from daemon.inbox.report import REPORT_JSON, REPORT_TEXT, TrainerLog, report_json, report_text
from daemon.job import FINAL_STATES, Job, JobState, from_json, to_json
from daemon.run_dir import LOG_NAME, run_dir_of
from daemon.text import escape
from guard.atomic import fsync_dir, rename_durable, write_atomic

ROWS_JSON = "rows.json"  # what the pass found, kept beside the file until the report is written


def claim_file(settings: Settings, job: Job, source: Path, sidecar: Path | None) -> Path:
    """Rename a dropped file, and its sidecar, into the job's folder; the job's row is written already.

    The sidecar goes first: left behind alone, it would be taken for the next file of that name. `sync_claims` makes
    it durable. Raises OSError.
    """
    folder = layout.processing_dir(settings, job.id)
    folder.mkdir(exist_ok=True)
    if sidecar is not None:
        with suppress(FileNotFoundError):
            sidecar.rename(folder / sidecar.name)
    target = folder / job.name
    source.rename(target)
    return target


def sync_claims(settings: Settings, jobs: Iterable[Job]) -> None:
    """Make the renames of these claims durable: shared folders once for all of them. Raises OSError."""
    own = [layout.processing_dir(settings, job.id) for job in jobs]
    dropped = {Path(job.source).parent for job in jobs}
    for folder in (*own, settings.inbox_dir / layout.PROCESSING, *sorted(dropped)):
        with suppress(FileNotFoundError):  # a person may have moved it on already
            fsync_dir(folder)


def return_sidecar(settings: Settings, job: Job) -> None:
    """Put back the sidecar of a file that was not taken after all."""
    path = layout.processing_dir(settings, job.id) / layout.sidecar_name(job.name)
    if os.path.lexists(path):
        with suppress(OSError):
            return_to_inbox(path, Path(job.source).parent)


def settle_files(settings: Settings, job: Job, report: DatasetReport | None = None) -> Path:
    """Move a finished job's folder to done/ or failed/, with report.txt and report.json in it; returns that folder.

    The file of a cancelled job that a person wants back goes to the inbox first. Can be repeated, and is after a crash. `report` (default: what the pass left beside the file) tells of bad rows.
    Raises OSError, ValueError when the job is not finished.
    """
    if job.state not in FINAL_STATES:
        raise ValueError(f"job {job.id} is {job.state}")
    source, target = layout.processing_dir(settings, job.id), layout.final_dir(settings, job)
    if not source.is_dir():
        if target.is_dir():
            return target
        source.mkdir(parents=True)  # the file is gone; what became of the job is still worth telling
    if job.state is JobState.CANCELLED and job.cancel_request == "return":
        for name in (layout.sidecar_name(job.name), job.name):  # the file alone would be taken without its sidecar
            if os.path.lexists(source / name):
                return_to_inbox(source / name, layout.watched_folders(settings)[job.priority])
    found = report if report is not None else read_rows_report(source)
    deleted = job.state is JobState.SUCCEEDED and settings.inbox.on_success == "delete"
    log = run_dir_of(settings.state_dir, job.id) / LOG_NAME
    trainer = TrainerLog.read(log) if job.state is JobState.FAILED else None
    write_atomic(source / REPORT_JSON, report_json(job, found, file_deleted=deleted, trainer=trainer))
    write_atomic(source / REPORT_TEXT, report_text(job, found, file_deleted=deleted, trainer=trainer))
    if deleted:
        (source / job.name).unlink(missing_ok=True)
    target.parent.mkdir(exist_ok=True)
    if target.exists():
        rename_durable(target, _free_name(target))
    rename_durable(source, target)
    return target


def return_for_retry(settings: Settings, job: Job) -> Path:
    """Move a finished job's folder back to processing/; returns the file's path there. Can be repeated.

    Raises NotFound when its file is nowhere, OSError.
    """
    target = layout.processing_dir(settings, job.id)
    path = layout.locate(settings, job)
    if path is None:
        raise NotFound(
            operation="find the file of",
            subject=job.id,
            cause=f"{escape(job.name)} is in none of processing/, done/ and failed/",
            hint="drop it again",
        )
    if path.parent != target:
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            rename_durable(target, _free_name(target))
        rename_durable(path.parent, target)
    return target / job.name


def write_rows_report(folder: Path, report: DatasetReport) -> None:
    """Keep what the pass found beside the file, until its report is written."""
    write_atomic(folder / ROWS_JSON, to_json(report))


def read_rows_report(folder: Path) -> DatasetReport | None:
    """What `write_rows_report` kept; None when there is none."""
    try:
        return from_json((folder / ROWS_JSON).read_bytes(), DatasetReport)
    except (OSError, ValueError):
        return None


def remove_done(settings: Settings, job: Job) -> bool:
    """Delete a trained job's folder from done/, for keep_done_days. Returns whether it was there."""
    folder = settings.inbox_dir / layout.DONE / job.id
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return False
    fsync_dir(folder.parent)
    return True


def return_to_inbox(path: Path, inbox_folder: Path) -> Path:
    """Put a file that was taken by mistake back under its name, or under a free one like it. Never replaces a file."""
    target = inbox_folder / path.name
    number = 1
    while True:
        try:
            rename_durable(path, target)
        except FileExistsError:
            number += 1
            stem, dot, rest = path.name.partition(".")
            target = inbox_folder / f"{stem[:200]}-{number}{dot}{rest}"
        else:
            return target


def gone(error: OSError) -> bool:
    """Whether an error means that somebody else moved or removed the file."""
    return error.errno in (errno.ENOENT, errno.ESTALE)


def _free_name(path: Path) -> Path:
    number = 1
    while os.path.lexists(path.with_name(f"{path.name}~{number}")):
        number += 1
    return path.with_name(f"{path.name}~{number}")
