"""Recovery: all that a start repairs, so that what a crash cut short is finished and a lost queue is rebuilt.

A claim writes its row, then renames; a finished job changes its state, then its files move. What a crash left between
the two follows from the rows of the store and the folders on disk. What cannot be repaired is a warning, and the daemon
starts. Nothing is deleted but empty folders.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

import guard
from daemon import versions
from daemon.config import Settings
from daemon.errors import NotFound, StoreError, TryLater
from daemon.evaluation.scores import sweep_scores
from daemon.held_versions import remove_discarded
from daemon.in_hand import InHand
from daemon.inbox import layout
from daemon.inbox.archive import ROWS_JSON, Archive, claim_file, reopen_files, unclaim_sidecar
from daemon.inbox.report import REPORT_JSON, REPORT_TEXT, parse_report
from daemon.inbox.strays import is_job_folder
from daemon.job import FINAL_STATES, OPEN_STATES, Dataset, FailureKind, Job, JobState, RunSpec, from_json, to_json
from daemon.left_alone import LeftAlone
from daemon.lineage import read_lineage
from daemon.memory.forgetting import sweep
from daemon.memory.store import DatasetMemory, memory_dir_of
from daemon.run_dir import latest_spec, run_dir_of, sealed_step
from daemon.store import BrokenStore, JobStore, is_made
from daemon.text import escape
from guard.atomic import fsync_dir, write_atomic

REBUILDING = ".rebuilding"  # beside the database while another is made in its place
SETTING_ASIDE = ".set-aside"  # beside the database while it is renamed: its new name

BUSY_SECONDS = 2.0  # the main loop waits no longer for a lock; it tries again

_REPORTS = frozenset({ROWS_JSON, REPORT_JSON, REPORT_TEXT})


def open_store(settings: Settings, log: Any, *, damage: str = "") -> JobStore:
    """Open the root's store, checked. `damage`: what was found of it while it was used.

    One that cannot be read is set aside and rebuilt from the folders. Raises NewerStore, StoreError (another process
    holds it), OSError.
    """
    path = settings.store_path
    if path.with_name(path.name + SETTING_ASIDE).exists():
        set_aside(path)  # a crash came in between: an older database without its log would look sound
    try:
        # A store that is lost or emptied is one that cannot be read; on a new root there is nothing to rebuild it from.
        intact = is_made(path)
        if damage and intact:
            raise BrokenStore(operation="use the job store", subject=path, cause=damage)
        if intact:
            return JobStore(path, check=True, busy_seconds=BUSY_SECONDS)
    except BrokenStore as error:
        log.error("store.set_aside", path=str(set_aside(path)), reason=error.cause)
    found = _rebuild(settings)
    if found:
        log.warning("store.rebuilt", jobs=len(found), succeeded=sum(job.state is JobState.SUCCEEDED for job in found))
    return JobStore(path, busy_seconds=BUSY_SECONDS)


def _rebuild(settings: Settings) -> list[Job]:
    """Make a store anew from the folders, beside its place: one that is cut short half-way would look whole.

    Returns the jobs that it knows. Raises OSError, StoreError.
    """
    path = settings.store_path
    beside = path.with_name(path.name + REBUILDING)
    for suffix in ("", "-wal", "-shm"):
        beside.with_name(beside.name + suffix).unlink(missing_ok=True)
    with closing(JobStore(beside)) as store:
        found = [store.add(job) for job in jobs_on_disk(settings)]
    beside.replace(path)
    fsync_dir(path.parent)
    return found


def follow_move(settings: Settings, store: JobStore, log: Any) -> None:
    """Have open jobs name the places of now: the root may lie elsewhere than when they were queued.

    A base model inside the root moved with it; one elsewhere stays where it was.
    """
    for job in store.jobs(OPEN_STATES):
        path = layout.processing_dir(settings, job.id) / job.name
        if job.path == str(path) or len(Path(job.path).parents) < 3:
            continue
        before = Path(job.path).parents[2]  # the inbox
        source = Path(job.source)
        if source.is_relative_to(before):
            source = settings.inbox_dir / source.relative_to(before)
        store.update(
            job.id,
            path=str(path),
            source=str(source),
            dataset=replace(job.dataset, path=str(path)) if job.dataset else None,
            recipe=_moved_recipe(settings, before, job.recipe) if job.recipe else None,
        )
        log.info("job.moved", job=job.id, was=escape(job.path), now=escape(str(path)))


def _moved_recipe(settings: Settings, inbox_before: Path, recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a recipe whose base model, where it lay below the old root, lies at the same place below this one."""
    model = recipe.get("model") or {}
    base, inbox = Path(model.get("model_name_or_path") or ""), settings.paths.inbox
    if inbox.is_absolute() or inbox_before.parts[-len(inbox.parts) :] != inbox.parts:
        return recipe
    root_before = inbox_before.parents[len(inbox.parts) - 1]
    if not base.is_absolute() or not base.is_relative_to(root_before):
        return recipe
    return {**recipe, "model": {**model, "model_name_or_path": str(settings.root / base.relative_to(root_before))}}


def bring_forward(settings: Settings, store: JobStore, log: Any) -> None:
    """Mark every job as succeeded whose version the lineage has: a queue may have been restored from before it.

    Such a job is neither trained nor promoted again. A running one is left to the scheduler, which reads its result.
    """
    for version in versions.list_versions(settings.model_dir):
        job_id = str(version.record.get("job") or "")
        try:
            known = store.get(job_id)
        except NotFound:
            if not job_id or _is_forgotten(settings, version):
                continue
        else:
            if known.state in FINAL_STATES or known.state is JobState.RUNNING:
                continue
        store.bring_forward(_from_version(settings, job_id, version))
        log.warning("job.brought_forward", job=job_id, version=version.name)


def sweep_memories(settings: Settings, store: JobStore, log: Any) -> None:
    """Delete what a crash left of discarded rows and versions, and memories and scores that are no version's."""
    learned = {str(version.record.get("dataset_digest")) for version in versions.list_versions(settings.model_dir)}
    lineage = read_lineage(settings.model_dir)
    learned |= {str(event.get("dataset_digest")) for event in lineage.recorded().values()}

    def is_orphan(memory: DatasetMemory) -> bool:
        try:
            state = store.get(memory.meta.job).state
        except NotFound:
            return False
        return state in FINAL_STATES and memory.meta.digest not in learned

    try:
        with suppress(guard.GuardError), guard.ModelLock(settings.model_dir, owner="repair"):  # else at the next start
            remove_discarded(settings.model_dir)
        removed = sweep(settings.state_dir, is_orphan)
        noted = [version.record for version in versions.list_versions(settings.model_dir)]
        noted += read_lineage(settings.model_dir).recorded().values()  # those that were moved aside are of a line too
        sweep_scores(memory_dir_of(settings.state_dir), (str(record.get("adapter_digest")) for record in noted))
    except OSError as error:  # the next start tries it again
        log.error("memory.not_swept", error=str(error))
        return
    if removed:
        log.info("memory.swept", datasets=removed)


def _is_forgotten(settings: Settings, version: versions.Version) -> bool:
    """Whether `keep_jobs_days` has had the job of a version forgotten."""
    days = settings.queue.keep_jobs_days
    oldest = datetime.fromtimestamp(time.time() - days * 86_400, UTC).isoformat()
    return bool(days) and str(version.record.get("created_at") or "") < oldest


def repair_inbox(
    settings: Settings, store: JobStore, archive: Archive, log: Any, *, in_hand: InHand, left_alone: LeftAlone
) -> list[str]:
    """Make the folders, and finish every claim and move that was begun.

    Returns what to warn of. Raises TryLater and OSError when the inbox cannot be used now, StoreError.
    """
    layout.create_folders(settings)
    processing = settings.inbox_dir / layout.PROCESSING
    if reason := layout.unusable_reason(settings):
        # What may not be entered is not empty: its jobs would be taken for lost.
        raise TryLater(operation="take up the jobs of", subject=settings.inbox_dir, cause=reason, hint="mend that")
    warnings: list[str] = []

    @contextmanager
    def repairing(job_id: str) -> Iterator[None]:
        with _warned(warnings, job_id, log), in_hand.noted("repaired", job=job_id):
            yield

    latest = latest_spec(settings.state_dir)
    for job in store.jobs({JobState.CLAIMED}):
        with repairing(job.id):
            _finish_claim(settings, archive, job, log)
    for folder in sorted(processing.iterdir()):
        with repairing(folder.name):
            try:
                job = store.get(folder.name)
            except NotFound:
                if left_alone.has(folder.name):
                    warnings.append(
                        f"{_shown(settings, folder)} has no job, and the daemon died over it; it is left alone"
                    )
                    continue
                run = latest if latest and latest.job_id == folder.name else None
                warnings += _adopt(settings, store, folder, log, run=run)
                continue
            if job.state in FINAL_STATES:
                archive.move_files(job)
                if not archive.problem(job.id):
                    log.info("file.settled_after_crash", job=job.id)
    for job in store.jobs(OPEN_STATES):
        with repairing(job.id):
            path = layout.locate(settings, job)
            if path is not None and path.parent.parent != processing:
                reopen_files(settings, job)
                log.info("file.returned_after_crash", job=job.id)
    return warnings


@contextmanager
def _warned(warnings: list[str], job_id: str, log: Any) -> Iterator[None]:
    """Turn one job's error into a warning, and go on with the next. A store that cannot be used is no job's error."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        log.error("file.not_repaired", job=job_id, error=str(error))
        warnings.append(f"the files of job {job_id} could not be repaired: {error}; the next start tries it again")


def _finish_claim(settings: Settings, archive: Archive, job: Job, log: Any) -> None:
    """Do the rename that a row lacks, if the dropped file is still the same."""
    if layout.locate(settings, job) is not None:
        return
    source = Path(job.source)
    try:
        found = source.lstat()
        # Another size: it is being written again, and has to settle anew.
        same = (found.st_ino, found.st_size) == (job.source_inode, job.size_bytes)
    except FileNotFoundError:
        same = False
    if same:
        sidecar = source.with_name(layout.sidecar_name(job.name))
        claim_file(settings, job, source, sidecar if os.path.lexists(sidecar) else None)
        log.info("file.claimed_after_crash", job=job.id, file=escape(job.name))
        return
    unclaim_sidecar(settings, job)
    archive.finish(job, JobState.CANCELLED, "it was removed from the inbox before it could be taken")


def _adopt(settings: Settings, store: JobStore, folder: Path, log: Any, *, run: RunSpec | None) -> Iterator[str]:
    """Make the file of a folder without a row a job again, under the same id.

    Yields what to warn of. The row is missing when the store was lost or set aside. The run that was launched last is
    taken for running: the scheduler then adopts its trainer, or concludes what it left. Every other file is validated
    again.
    """
    if not is_job_folder(folder.name) or not folder.is_dir() or folder.is_symlink():
        return  # a stray, which the intake tells of as long as it lies there
    names = [entry.name for entry in folder.iterdir() if entry.name not in _REPORTS]
    if not names:
        with suppress(OSError):  # holds reports: left as it is
            folder.rmdir()
        return
    data = [name for name in names if layout.name_kind(name) is layout.NameKind.DATA]
    if len(data) != 1:
        yield f"{_shown(settings, folder)} has no job and not one dataset; it is left alone"
        return
    path = folder / data[0]
    found = path.lstat()
    job = Job(
        id=folder.name,
        name=path.name,
        state=JobState.CLAIMED,
        path=str(path),
        source=str(settings.inbox_dir / path.name),
        source_inode=found.st_ino,
        size_bytes=found.st_size,
        owner=found.st_uid,
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


def set_aside(path: Path) -> Path:
    """Rename a database and its write-ahead log to `NAME.unreadable-TIME`; returns the database's new path.

    The new name is noted first, so that a crash between the renames is carried on from: never is a database opened
    without the log that belongs to it.
    """
    note = path.with_name(path.name + SETTING_ASIDE)
    stamp = f"unreadable-{datetime.fromtimestamp(time.time(), UTC):%Y%m%dT%H%M%S}"
    if not note.exists():
        write_atomic(note, f"{path.name}.{stamp}")
    target = path.with_name(note.read_text())
    for suffix in ("", "-wal", "-shm"):
        source = path.with_name(path.name + suffix)
        if source.exists():
            source.rename(target.with_name(target.name + suffix))
    fsync_dir(path.parent)
    note.unlink()
    fsync_dir(path.parent)
    return target


def jobs_on_disk(settings: Settings) -> Iterator[Job]:
    """Return the finished jobs that reports and versions tell of, oldest first, each once.

    Unfinished ones are adopted from processing/ by `repair_inbox`; the history of transitions is in the store set
    aside.
    """
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
                job = from_json(to_json(_from_report(path, report)), Job)  # a store holds what can be read again
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
        owner=report["owner"] if isinstance(report.get("owner"), int) else None,
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
