"""A queue from what lies on disk, for the day when its database cannot be read.

Finished jobs are told by the reports beside their files, trained ones also by the versions that they became; what is in
processing/ becomes a job again when the inbox is repaired. Nothing is lost and nothing is trained twice; what is lost
is the history of moves, which the set-aside file still holds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from daemon import versions
from daemon.config import Settings
from daemon.inbox import layout
from daemon.inbox.report import REPORT_JSON, parse_report
from daemon.job import FINAL_STATES, Dataset, FailureKind, Job, JobState
from daemon.run_dir import run_dir_of
from daemon.store import BrokenStore, JobStore
from guard.atomic import fsync_dir


def open_store(settings: Settings, log: Any) -> JobStore:
    """The root's store, checked; one that cannot be read is set aside and rebuilt.

    Raises NewerStore, StoreError (another process holds it), OSError.
    """
    path = settings.store_path
    try:
        return JobStore(path, check=True)
    except BrokenStore as error:
        aside = set_aside(path)
        log.error("store.set_aside", path=str(aside), reason=error.cause)
    store = JobStore(path)
    found = [store.add(job) for job in jobs_on_disk(settings)]
    log.warning("store.rebuilt", jobs=len(found), succeeded=sum(job.state is JobState.SUCCEEDED for job in found))
    return store


def set_aside(path: Path) -> Path:
    """Rename a database and its write-ahead log to names that say what they are; returns the database's new name."""
    stamp = f"unreadable-{datetime.fromtimestamp(time.time(), UTC):%Y%m%dT%H%M%S}"
    target = path.with_name(f"{path.name}.{stamp}")
    for suffix in ("-wal", "-shm", ""):  # the database last: until it is gone, the next start does the same again
        source = path.with_name(path.name + suffix)
        if source.exists():
            source.rename(target.with_name(target.name + suffix))
    fsync_dir(path.parent)
    return target


def jobs_on_disk(settings: Settings) -> Iterator[Job]:
    """Every finished job that can be told, oldest first; each id once."""
    trained = {str(version.record.get("job")): version for version in versions.list_versions(settings.model_dir)}
    found = {job.id: job for job in _reported(settings, trained)}
    for job_id, version in trained.items():
        if job_id not in found:  # its file was deleted by policy, or was not moved yet
            found[job_id] = _from_version(settings, job_id, version)
    yield from sorted(found.values(), key=lambda job: job.id)


def _reported(settings: Settings, trained: Mapping[str, versions.Version]) -> Iterator[Job]:
    for place in (layout.DONE, layout.FAILED):
        folder = settings.inbox_dir / place
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            try:
                report = parse_report((path / REPORT_JSON).read_text(encoding="utf-8"))
                job = _from_report(path, report)
            except (OSError, ValueError, KeyError):
                continue  # without a report it is not ours to judge; the file stays where it is
            if job.state is JobState.SUCCEEDED and job.id not in trained:
                continue  # a version that was removed by hand: the content may be trained again
            yield job


def _from_report(path: Path, report: Mapping[str, Any]) -> Job:
    state = JobState(report["state"])
    if state not in FINAL_STATES:
        raise ValueError(f"{path} reports {state}")
    dataset = report.get("dataset")
    return Job(
        id=path.name,
        name=report["file"],
        state=state,
        source=report.get("source") or "",
        dataset=msgspec.convert(dataset, Dataset) if dataset else None,
        duplicate_of=report.get("duplicate_of"),
        version=report.get("version"),
        failure=FailureKind(report["failure"]) if report.get("failure") else None,
        reason=report.get("reason") or "",
        created_at=report.get("dropped_at") or "",
        finished_at=report.get("finished_at"),
    )


def _from_version(settings: Settings, job_id: str, version: versions.Version) -> Job:
    record = version.record
    name = str(record.get("dataset", "?"))
    return Job(
        id=job_id,
        name=name,
        state=JobState.SUCCEEDED,
        dataset=Dataset(
            name=name,
            path=str(layout.processing_dir(settings, job_id) / name),
            size_bytes=0,
            rows=int(record.get("rows") or 0),
            digest=str(record.get("dataset_digest")),
            format="",
        ),
        version=version.name,
        reason=f"known from version {version.name}",
        created_at=str(record.get("created_at", "")),
        finished_at=str(record.get("created_at", "")),
        path=str(run_dir_of(settings.state_dir, job_id)),
    )
