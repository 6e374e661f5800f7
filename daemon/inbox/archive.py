"""The archive: how jobs end - final state first, then their files - and every move of a claimed file.

A job's folder moves as a whole, by one rename, with the file, its sidecar and its reports in it. Into the inbox a file
and its sidecar go back as a pair. Every move can be repeated after a crash.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemon.config import Settings
from daemon.dataset.sidecar import MAX_SIDECAR_BYTES, may_speak_for
from daemon.dataset.source import SourceError, open_regular
from daemon.errors import DropforgeError, NotFound
from daemon.in_hand import InHand
from daemon.inbox import layout
from daemon.inbox.report import REPORT_JSON, REPORT_TEXT, TrainerLog, report_json, report_text
from daemon.job import FINAL_STATES, Dataset, Job, JobState, from_json, to_json
from daemon.left_alone import LeftAlone
from daemon.recipe import DataSettings
from daemon.run_dir import LOG_NAME, run_dir_of
from daemon.store import JobStore
from daemon.text import escape
from guard.atomic import fsync_dir, make_folder_durable, rename_durable, write_atomic

if TYPE_CHECKING:
    from daemon.dataset.validate import DatasetReport

ROWS_JSON = "rows.json"  # the validation's report, kept beside the file until the job's own is written
RETURNED_AS = ".returned_as"  # the name under which a file goes back to the inbox, while it does
PAIRED = frozenset({layout.NameKind.DATA, layout.NameKind.SIDECAR})
RETRIES = 10  # moves that are tried again at a time; each writes its reports anew
RECENT_JOBS = 20  # finished jobs whose files are looked for in processing/
COMMAND_SECONDS = 10.0  # a command that ended a job has so long to move its files before the daemon does


class NoLog:
    """The log of a command."""

    def __getattr__(self, level: str) -> Callable[..., None]:
        return lambda event, **facts: None


class Archive:
    """Ends jobs and moves their files; a move that fails is remembered, shown and tried again.

    `log` is None in a command, which tells its caller of `problem` itself. One thread calls everything.
    """

    def __init__(
        self,
        settings: Settings,
        store: JobStore,
        log: Any = None,
        *,
        in_hand: InHand | None = None,
        left_alone: LeftAlone | None = None,
    ) -> None:
        self.settings = settings
        self._store = store
        self._in_hand = in_hand or InHand()
        self._left_alone = left_alone or LeftAlone()
        self._log = log if log is not None else NoLog()
        self._problems: dict[str, str] = {}  # job id -> why its files were not moved

    def finish(self, job: Job, to: JobState, reason: str, **fields: Any) -> Job:
        """End a job: its final state first, then its files.

        It has to be in the state of `job` still. Files that cannot be moved now are moved later. Raises StoreError,
        TransitionRefused.
        """
        finished = self._store.finish(job.id, job.state, to, reason, **fields)
        self.move_files(finished)
        return finished

    def finish_duplicate(self, job: Job, dataset: Dataset, data: DataSettings) -> bool:
        """End a job whose rows a version learned already, read as they would be now. Returns whether it ended."""
        from daemon.inbox.duplicates import find_duplicate  # it brings along all that reads rows

        first = None if job.force else find_duplicate(self._store.trained(dataset.digest), dataset, data)
        if first is None:
            return False
        reason = f"duplicate of job {first.id}, version {first.version or '?'}"
        self.finish(job, JobState.CANCELLED, reason, dataset=dataset, duplicate_of=first.id)
        return True

    def move_files(self, job: Job) -> None:
        """Move a finished job's folder; a failure is a warning until it succeeds."""
        if self._left_alone.has(job.id, job.updated_at):
            self._problems[job.id] = "the daemon died over them, again and again; `dropforge retry` takes them up again"
            return
        try:
            with self._in_hand.noted("moved", job=job.id):
                archive_files(self.settings, job)
        except Exception as error:  # a finished job has nothing left to fail, whatever the error is
            problem = describe_problem(error)
            if self._problems.get(job.id) != problem:
                foreseen = isinstance(error, DropforgeError | OSError)
                self._log.error("file.not_moved", job=job.id, error=problem, exc_info=not foreseen)
            self._problems.pop(job.id, None)
            self._problems[job.id] = problem  # last in line
            return
        if self._problems.pop(job.id, None) is not None:
            self._log.info("file.moved", job=job.id)

    def problem(self, job_id: str) -> str:
        """Why a job's files were not moved; empty when they were."""
        return self._problems.get(job_id, "")

    def retry(self) -> None:
        """Try again what this process, or a command, could not move."""
        for job in self._store.recent(RECENT_JOBS):
            lies_there = os.path.lexists(layout.processing_dir(self.settings, job.id))
            if lies_there and job.id not in self._problems and _seconds_since(job.updated_at) > COMMAND_SECONDS:
                self.move_files(job)
        for job_id in list(self._problems)[:RETRIES]:
            try:
                job = self._store.get(job_id)
            except NotFound:
                del self._problems[job_id]
                continue
            if job.state in FINAL_STATES:
                self.move_files(job)
            else:  # it was put back into the queue
                del self._problems[job_id]

    def warnings(self) -> list[str]:
        """One sentence while files are left to move."""
        if not self._problems:
            return []
        count, why = len(self._problems), next(iter(self._problems.values()))
        what = "one finished job's file" if count == 1 else f"the files of {count} finished jobs"
        return [f"{what} could not be moved out of processing/ yet: {why}"]


def claim_file(settings: Settings, job: Job, source: Path, sidecar: Path | None) -> Path:
    """Rename a dropped file, and its sidecar, into its job's folder.

    The job's row is written already. The sidecar goes first: left behind alone, it would be taken for the next file of
    that name. Where that lies there already (`x.jsonl.gz` beside `x.jsonl`), the sidecar is copied. Nothing of it is
    durable yet. Raises OSError.
    """
    folder = layout.processing_dir(settings, job.id)
    folder.mkdir(exist_ok=True)
    if sidecar is not None:
        with suppress(FileNotFoundError):
            if not may_speak_for(sidecar.lstat().st_uid, source.lstat().st_uid):
                pass  # it stays where it is: the file is taken without it
            elif _is_shared(sidecar, source):
                _copy_sidecar(sidecar, folder / sidecar.name)
            else:
                sidecar.rename(folder / sidecar.name)
    target = folder / job.name
    source.rename(target)
    return target


def _is_shared(sidecar: Path, source: Path) -> bool:
    """Whether a sidecar that can be used serves another dataset too."""
    base, _ = layout.split_data_name(source.name)
    others = (source.with_name(base + suffix) for suffix in layout.DATA_SUFFIXES)
    found = sidecar.lstat()
    usable = stat.S_ISREG(found.st_mode) and found.st_size <= MAX_SIDECAR_BYTES
    return usable and any(other != source and os.path.lexists(other) for other in others)


def _copy_sidecar(sidecar: Path, target: Path) -> None:
    """Copy it in bounded time, whatever takes its place meanwhile. Raises OSError."""
    try:
        descriptor = open_regular(sidecar)
    except SourceError as error:
        raise OSError(errno.EINVAL, error.reason, str(sidecar)) from error
    try:
        target.write_bytes(os.read(descriptor, MAX_SIDECAR_BYTES + 1))  # one byte more: it is refused for its size
    finally:
        os.close(descriptor)


def sync_claims(settings: Settings, dropped: Iterable[Path]) -> None:
    """Make all renames so far from these folders durable in what jobs share. Raises OSError.

    A job's own folder, and what lies in it, is synced by the child that reads the file.
    """
    for folder in (settings.inbox_dir / layout.PROCESSING, *sorted({*dropped})):
        with suppress(FileNotFoundError):  # a folder that is not watched any more
            fsync_dir(folder)


def unclaim_sidecar(settings: Settings, job: Job) -> None:
    """Put a sidecar back whose file was not taken after all.

    It goes back under its own name or not at all: another name would give it to another file. Where a newer one lies,
    it stays in the job's folder. Raises OSError.
    """
    source = Path(job.source)
    sidecar = layout.processing_dir(settings, job.id) / layout.sidecar_name(job.name)
    if os.path.lexists(sidecar):
        with suppress(FileExistsError):
            rename_durable(sidecar, source.with_name(sidecar.name))


def return_pair(settings: Settings, job: Job, inbox_folder: Path) -> Path:
    """Move a job's file and its sidecar back into a watched folder.

    Returns the file's path. Both get the job's name, or one number, so that neither meets another file or sidecar of
    that name. Can be repeated after a crash. Raises OSError.
    """
    folder = layout.processing_dir(settings, job.id)
    data, sidecar, chosen = folder / job.name, folder / layout.sidecar_name(job.name), folder / RETURNED_AS
    _take_back_sidecar(sidecar, chosen, inbox_folder)
    target = inbox_folder / _free_name(job.name, inbox_folder)
    linked = False
    if os.path.lexists(sidecar):
        # The sidecar first, or the file might be taken without it. It is linked, and removed when its file has moved;
        # a return that is cut short in between finds it by the name that was chosen.
        write_atomic(chosen, os.fsencode(target.name))
        linked = _link(sidecar, target.with_name(layout.sidecar_name(target.name)))
    rename_durable(data, target)
    if linked:
        sidecar.unlink()
    chosen.unlink(missing_ok=True)
    return target


def _take_back_sidecar(sidecar: Path, chosen: Path, inbox_folder: Path) -> None:
    """Undo the first half of a return that was cut short.

    The sidecar, or a link to it, lies in the folder then.
    """
    with suppress(FileNotFoundError):
        returned = inbox_folder / layout.sidecar_name(os.fsdecode(chosen.read_bytes()))
        if not os.path.lexists(sidecar):
            returned.rename(sidecar)
        elif os.path.samestat(returned.lstat(), sidecar.lstat()):
            returned.unlink()


def _free_name(name: str, inbox_folder: Path) -> str:
    """The first of NAME, NAME-2, ... whose stem is not used in the folder."""
    others = (path.name for path in inbox_folder.iterdir())
    taken = {layout.stem(other) for other in others if layout.name_kind(other) in PAIRED}
    names = (layout.numbered_name(name, number) for number in itertools.count(1))
    return next(free for free in names if layout.stem(free) not in taken)


def _link(source: Path, target: Path) -> bool:
    """Give a file a second name; where links are refused, only that.

    Returns whether it has two.
    """
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
            raise
        rename_durable(source, target)
        return False
    return True


def archive_files(settings: Settings, job: Job) -> Path:
    """Move a finished job's folder, with its reports, to done/ or failed/.

    Returns that folder. The file of a cancelled job that is to be returned goes to the inbox first. Can be repeated.
    Raises OSError, ValueError when the job is not finished.
    """
    if job.state not in FINAL_STATES:
        raise ValueError(f"job {job.id} is {job.state}")
    source, target = layout.processing_dir(settings, job.id), layout.final_dir(settings, job)
    if not source.is_dir():
        if target.is_dir():
            return target
        make_folder_durable(source)  # the file is gone; what became of the job is still worth telling
    if job.state is JobState.CANCELLED and job.cancel_request == "return" and os.path.lexists(source / job.name):
        return_pair(settings, job, _dropped_into(settings, job))
    rows = read_rows_report(source)
    deleted = job.state is JobState.SUCCEEDED and settings.inbox.on_success == "delete"
    log = run_dir_of(settings.state_dir, job.id) / LOG_NAME
    trainer = TrainerLog.read(log) if job.state is JobState.FAILED else None
    write_atomic(source / REPORT_JSON, report_json(job, rows, file_deleted=deleted, trainer=trainer))
    write_atomic(source / REPORT_TEXT, report_text(job, rows, file_deleted=deleted, trainer=trainer))
    if deleted:
        (source / job.name).unlink(missing_ok=True)
    _move_folder(source, target)
    return target


def _dropped_into(settings: Settings, job: Job) -> Path:
    """The folder that the job's file came from; when it is not watched now, the one of its priority."""
    watched = layout.watched_folders(settings)
    source = Path(job.source).parent
    return source if source in watched.values() else watched[job.priority]


def reopen_files(settings: Settings, job: Job) -> Path:
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
        _move_folder(path.parent, target)
    return target / job.name


def _move_folder(source: Path, target: Path) -> None:
    """Rename a job's folder; an older one at the target is kept beside it, as `ID~1`."""
    make_folder_durable(target.parent)
    if os.path.lexists(target):
        numbers = itertools.count(1)
        rename_durable(target, next(free for n in numbers if not os.path.lexists(free := Path(f"{target}~{n}"))))
    rename_durable(source, target)


def write_rows_report(folder: Path, report: DatasetReport) -> None:
    """Keep what the validation found beside the file, until the job's report is written. Raises OSError."""
    write_atomic(folder / ROWS_JSON, to_json(report))


def read_rows_report(folder: Path) -> DatasetReport | None:
    """Return what `write_rows_report` kept; None when there is none."""
    from daemon.dataset.validate import DatasetReport  # all that checks a dataset comes along

    try:
        return from_json((folder / ROWS_JSON).read_bytes(), DatasetReport)
    except (OSError, ValueError):
        return None


def describe_problem(error: Exception) -> str:
    """Say in one sentence why files were not moved."""
    if isinstance(error, DropforgeError):
        return error.sentence
    if not isinstance(error, OSError):
        return escape(f"an unexpected error: {type(error).__name__}: {error}", most=1000)
    if error.errno == errno.EXDEV and error.filename2:
        return (
            f"{Path(error.filename2).parent} is on another file system than {Path(error.filename).parent}, and files"
            " are moved by renaming; put all folders of the inbox on one"
        )
    return escape(str(error), most=1000)


def _seconds_since(at: str) -> float:
    """Seconds from a UTC time to now; infinite when it is not one."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()
    except ValueError:
        return float("inf")
