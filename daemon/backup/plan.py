"""The plan of a backup: what of a root is saved, as of one moment.

The queue is copied first, then the folders are listed; where a job moved in between, both are done again. So a plan is of one
moment, and copying may take its time: what is copied does not change, and what moves is found again by its job. Where no such
moment can be had, the queue is a little older than the folders, and a restore brings it forward.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

from daemon import versions
from daemon.backup.manifest import BASE, TOPS, LeftOut, link_fault
from daemon.config import CONFIG_NAME, Settings
from daemon.dataset.source import SourceError, open_regular
from daemon.errors import DropforgeError
from daemon.in_hand import NOTE_NAME
from daemon.inbox import layout
from daemon.inbox.other_files import names_unfinished_dataset
from daemon.inbox.report import REPORT_JSON, REPORT_TEXT
from daemon.inbox.strays import is_job_folder
from daemon.inbox.writers import WriterState, writer_state
from daemon.job import OPEN_STATES, Job, JobState
from daemon.lineage import LINEAGE, Lineage, read_lineage
from daemon.memory.store import MEMORY_NAME, META_NAME
from daemon.root_identity import MARK, Part, part_paths
from daemon.run_dir import ATTEMPT_NAMES, RUNS_NAME
from daemon.store import JobStore
from daemon.version_pruning import PRUNED_NAME
from guard.checkpoints import CHECKPOINT_NAME
from guard.layout import CLEARED_NAME, LOCK_NAME, METADATA_NAME, STAGING_NAME

ASIDE_PREFIX = ".before-restore-"  # what a restore moved aside, in each part
PLAN_ATTEMPTS = 20
PLAN_PAUSE_SECONDS = 0.02
UNKNOWN_WRITER_FACTOR = 10  # of settle_seconds: as long as rows may be appended
_TEMPORARY = re.compile(r"\..*\.\d+-\d+\.tmp|\.progress\.json\.\d+")  # of an atomic write, or of a trainer's progress
_REPORTS = frozenset({REPORT_JSON, REPORT_TEXT})
_CHECKPOINT_COMPANIONS = frozenset({METADATA_NAME})


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is saved besides what cannot be made again."""

    checkpoints: bool = False  # of the run in progress
    base: bool = False  # the base model, where it lies inside the root


class Gone(Enum):
    """What it means when something that was planned is not there any more."""

    FAILS = auto()  # a person removed it
    PLANS_ANEW = auto()  # the queue moved on
    LEAVES_OUT = auto()  # it comes and goes: rotated checkpoints, temporary files


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Files that are saved together or not at all, by their names in the backup, and the folders that hold them alone.

    The folder of a `job_id` is looked for where it lies when it is copied, and its files are saved without those in `skipped`.
    Dropped files may be claimed meanwhile: they are found again by `inodes`.
    """

    gone: Gone
    files: Mapping[str, Path] = field(default_factory=dict)
    folders: Mapping[str, int] = field(default_factory=dict)
    job_id: str = ""
    required: str = ""  # the name of the job's file, which was there
    skipped: frozenset[str] = frozenset()
    inodes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A small file as it was at the moment."""

    content: bytes
    mode: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is saved."""

    folders: Mapping[str, int]
    links: Mapping[str, str]
    captured: Mapping[str, Captured]
    units: tuple[Unit, ...]  # in the order in which they are copied
    left_out: tuple[LeftOut, ...]
    jobs: Mapping[str, int]
    saved: tuple[versions.Version, ...]
    lineage: Lineage
    current_version: str | None
    base_folder: str
    base_path: str


def plan_backup(settings: Settings, store: JobStore | None, *, queue_copy: Path, options: Options) -> Plan:
    """Copy the queue to `queue_copy` and list what belongs to it. Raises DropforgeError, OSError."""
    for attempt in range(1, PLAN_ATTEMPTS + 1):
        seen, jobs, counts = 0, list[Job](), dict[str, int]()
        if store is not None:
            store.copy_to(queue_copy)
            copy = JobStore(queue_copy)
            try:
                seen, jobs, counts = copy.last_transition(), copy.jobs(OPEN_STATES), copy.counts()
            finally:
                copy.close()
        planner = _Planner(settings, jobs, options)
        try:
            plan = planner.plan({state: number for state, number in counts.items() if number})
        except FileNotFoundError as error:
            if attempt < PLAN_ATTEMPTS and was_taken_away(settings, error.filename):
                continue
            raise
        is_still = store is None or store.last_transition() == seen
        if (is_still and plan.lineage.current in (None, plan.current_version)) or attempt == PLAN_ATTEMPTS:
            return plan
        time.sleep(PLAN_PAUSE_SECONDS)
    raise AssertionError("unreachable")


def was_taken_away(settings: Settings, path: str | None) -> bool:
    """Whether a file that is gone was one of a version that was moved aside, or discarded, since it was listed."""
    folder = settings.model_dir / versions.VERSIONS
    if path is None or not Path(path).is_relative_to(folder) or Path(path) == folder:
        return False
    name = Path(path).relative_to(folder).parts[0]
    return not (folder / name).exists() and name in read_lineage(settings.model_dir).taken_away()


def is_set_aside(name: str) -> bool:
    """Whether a name in a part is that of what a restore moved aside."""
    return name.startswith(ASIDE_PREFIX)


class _Planner:
    """Lists one root once."""

    def __init__(self, settings: Settings, jobs: Iterable[Job], options: Options) -> None:
        self._settings = settings
        self._options = options
        self._open = {job.id: job for job in jobs}
        self._folders: dict[str, int] = {}
        self._links: dict[str, str] = {}
        self._captured: dict[str, Captured] = {}
        self._jobs_first: list[Unit] = []  # what may move: copied first
        self._rest: list[Unit] = []
        self._left_out: list[LeftOut] = []
        self._dropped: dict[str, dict[str, Path]] = {}  # whole files in watched folders, by what a pair has in common
        parts = part_paths(settings)
        self._elsewhere = {_identity(path) for path in (*parts.values(), settings.log_path.parent)} - {None}
        self._base_folder = ""
        self._base, self._base_path = self._find_base(parts.values())
        self._key = settings.root / settings.guard.key_file if settings.guard.key_file else None

    def plan(self, jobs: Mapping[str, int]) -> Plan:
        model_dir = self._settings.model_dir
        found = versions.list_versions(model_dir)
        lineage = read_lineage(model_dir)  # after the listing: a version without its line is being promoted
        for lost in sorted(lineage.recorded().keys() - {version.name for version in found}):
            pruned = "it was moved aside by `dropforge versions prune`"
            reason = pruned if lost in lineage.pruned() else "it is not there, although the lineage has it"
            self._left_out.append(LeftOut(name=f"version {lost}", reason=reason))
        running = {job.id for job in self._open.values() if job.state is JobState.RUNNING}
        kept = [
            version
            for version in found
            if int(version.name) <= lineage.newest_number or version.record.get("job") not in running
        ]
        self._plan_settings()
        self._plan_inbox()
        self._plan_model({version.name for version in found} - {version.name for version in kept})
        self._plan_state()
        self._plan_base()
        current = versions.current_version(model_dir)
        return Plan(
            folders=self._folders,
            links=self._links,
            captured=self._captured,
            units=(*self._jobs_first, *self._rest),
            left_out=tuple(sorted(self._left_out, key=lambda left: left.name)),
            jobs=jobs,
            saved=tuple(kept),
            lineage=lineage,
            current_version=current.name if current else None,
            base_folder=self._base_folder,
            base_path=self._base_path if self._options.base else "",
        )

    # -- the parts

    def _plan_settings(self) -> None:
        path = self._settings.root / CONFIG_NAME
        if path.exists():
            self._capture(CONFIG_NAME, path)
        if self._key is not None:
            self._left_out.append(
                LeftOut(name=str(self._key), reason="the key of the seals is a secret: keep a copy apart")
            )
        if (evals := self._settings.evals_dir).exists():
            self._left_out.append(
                LeftOut(name=str(evals), reason="evals may hold programs that are run: keep a copy apart")
            )

    def _plan_inbox(self) -> None:
        inbox = self._settings.inbox_dir
        self._add_folder(Part.INBOX, inbox)
        watched = set(layout.watched_folders(self._settings).values())
        for entry in self._scan(inbox):
            name = f"{Part.INBOX}/{entry.name}"
            if entry.name == MARK:
                self._capture(name, Path(entry.path))
            elif is_set_aside(entry.name):
                continue
            elif entry.name in layout.JOB_FOLDERS and entry.is_dir(follow_symlinks=False):
                self._plan_job_folders(name, Path(entry.path))
            elif Path(entry.path) in watched and entry.is_dir(follow_symlinks=False):
                self._add_folder(name, Path(entry.path))
                for inner in self._scan(Path(entry.path)):
                    self._plan_dropped(f"{name}/{inner.name}", inner)
            else:
                self._plan_dropped(name, entry)
        for files in self._dropped.values():
            inodes = tuple(path.lstat().st_ino for path in files.values() if path.exists())
            self._jobs_first.append(Unit(gone=Gone.PLANS_ANEW, files=files, inodes=inodes))

    def _plan_job_folders(self, name: str, folder: Path) -> None:
        self._add_folder(name, folder)
        for entry in self._scan(folder):
            if not (is_job_folder(entry.name) and entry.is_dir(follow_symlinks=False)):
                self._plan_other(f"{name}/{entry.name}", entry, gone=Gone.LEAVES_OUT)
                continue
            is_open = entry.name in self._open
            place = f"{Part.INBOX}/{layout.PROCESSING}/{entry.name}" if is_open else f"{name}/{entry.name}"
            with suppress(FileNotFoundError):  # it moved on, and the queue is looked at again
                data = self._open[entry.name].name if is_open else ""
                unit = Unit(
                    gone=Gone.PLANS_ANEW if is_open else Gone.LEAVES_OUT,
                    folders={place: _mode(Path(entry.path))},
                    job_id=entry.name,
                    required=data if data and os.path.lexists(Path(entry.path, data)) else "",
                    skipped=_REPORTS if is_open else frozenset(),
                )
                (self._jobs_first if is_open else self._rest).append(unit)

    def _plan_dropped(self, name: str, entry: os.DirEntry[str]) -> None:
        """Something in a watched folder: a file that nobody writes to is saved, and waits there after a restore."""
        if not entry.is_file(follow_symlinks=False):
            self._plan_other(name, entry, gone=Gone.LEAVES_OUT)
            return
        if layout.name_kind(entry.name) is layout.NameKind.UNFINISHED:
            if names_unfinished_dataset(entry.name):
                self._left_out.append(
                    LeftOut(name=name, reason="it has the name of a file that is still being written")
                )
            return
        try:
            reason = self._unsaved_reason(Path(entry.path))
        except FileNotFoundError:
            return  # claimed or taken back since: the queue has moved, and is looked at again
        if reason:
            self._left_out.append(LeftOut(name=name, reason=reason))
        else:  # with its sidecar, which is claimed with it
            self._dropped.setdefault(f"{posixpath.dirname(name)}/{layout.stem(entry.name)}", {})[name] = Path(
                entry.path
            )

    def _unsaved_reason(self, path: Path) -> str:
        """Why a dropped file is not saved; empty when it is whole, as far as can be told. Raises FileNotFoundError."""
        try:
            descriptor = open_regular(path)
        except FileNotFoundError:
            raise
        except (OSError, SourceError) as error:
            return f"it cannot be read: {error.strerror if isinstance(error, OSError) else error.reason}"
        try:
            state, status = writer_state(descriptor), os.fstat(descriptor)
        finally:
            os.close(descriptor)
        quiet = time.time() - max(status.st_mtime, status.st_ctime)
        needed = UNKNOWN_WRITER_FACTOR * self._settings.inbox.settle_seconds
        if state is WriterState.PRESENT or (state is WriterState.UNKNOWN and quiet < needed):
            return "it is still being written"
        return ""

    def _plan_model(self, unfinished_versions: set[str]) -> None:
        model_dir = self._settings.model_dir
        self._add_folder(Part.MODEL, model_dir)
        for entry in self._scan(model_dir):
            name, path = f"{Part.MODEL}/{entry.name}", Path(entry.path)
            if entry.name in (LOCK_NAME, STAGING_NAME, CLEARED_NAME) or is_set_aside(entry.name):
                continue
            if entry.name in (MARK, LINEAGE) and entry.is_file(follow_symlinks=False):
                self._capture(name, path)
            elif entry.name in _CHECKPOINT_COMPANIONS or CHECKPOINT_NAME.fullmatch(entry.name):
                self._plan_checkpoint(name, entry)
            elif entry.name == versions.VERSIONS and entry.is_dir(follow_symlinks=False):
                self._add_folder(name, path)
                for version in self._scan(path):
                    if version.name not in {*unfinished_versions, PRUNED_NAME}:
                        self._plan_other(f"{name}/{version.name}", version, gone=Gone.FAILS)
            else:
                self._plan_other(name, entry, gone=Gone.LEAVES_OUT)

    def _plan_checkpoint(self, name: str, entry: os.DirEntry[str]) -> None:
        """One unit, because rotation takes whole checkpoints."""
        if not self._options.checkpoints:
            return
        if not entry.is_dir(follow_symlinks=False):
            with suppress(FileNotFoundError):
                self._capture(name, Path(entry.path))
            return
        files: dict[str, Path] = {}
        folders = {name: _mode(Path(entry.path))}
        pending = [(name, Path(entry.path))]
        try:
            while pending:
                prefix, folder = pending.pop()
                for inner in self._scan(folder):
                    inner_name = f"{prefix}/{inner.name}"
                    if inner.is_dir(follow_symlinks=False):
                        folders[inner_name] = _mode(Path(inner.path))
                        pending.append((inner_name, Path(inner.path)))
                    elif inner.is_file(follow_symlinks=False):
                        files[inner_name] = Path(inner.path)
        except FileNotFoundError:
            return  # rotated away
        self._rest.append(Unit(gone=Gone.LEAVES_OUT, files=files, folders=folders))

    def _plan_state(self) -> None:
        state = self._settings.state_dir
        queue = self._settings.store_path.name
        self._add_folder(Part.STATE, state)
        for entry in self._scan(state):
            name, path = f"{Part.STATE}/{entry.name}", Path(entry.path)
            own = {LOCK_NAME, NOTE_NAME, self._settings.status_path.name}
            if entry.name in own or entry.name.startswith(queue) or is_set_aside(entry.name):
                continue
            if entry.name == MARK:
                self._capture(name, path)
            elif entry.name == MEMORY_NAME and entry.is_dir(follow_symlinks=False):
                self._add_folder(name, path)
                for memory in self._scan(path):
                    self._plan_memory(f"{name}/{memory.name}", memory)
            elif entry.name == RUNS_NAME and entry.is_dir(follow_symlinks=False):
                self._add_folder(name, path)
                for run in self._scan(path):
                    # How an attempt of an open job stands is for a daemon that knows its trainer; it is begun anew.
                    skipped = frozenset(ATTEMPT_NAMES) if run.name in self._open else frozenset[str]()
                    self._plan_other(f"{name}/{run.name}", run, gone=Gone.LEAVES_OUT, skipped=skipped)
            else:
                self._plan_other(name, entry, gone=Gone.LEAVES_OUT)

    def _plan_memory(self, name: str, entry: os.DirEntry[str]) -> None:
        """One unit, its meta.json first: what that says of the others stays true of files that only grow."""
        if not entry.is_dir(follow_symlinks=False):
            self._plan_other(name, entry, gone=Gone.LEAVES_OUT)
            return
        with suppress(FileNotFoundError):  # forgotten
            files = {
                f"{name}/{inner.name}": Path(inner.path) for inner in self._scan(Path(entry.path)) if inner.is_file()
            }
            whole = {found: path for found, path in files.items() if not _TEMPORARY.fullmatch(path.name)}
            ordered = dict(sorted(whole.items(), key=lambda item: (item[1].name != META_NAME, item[0])))
            folders = {name: _mode(Path(entry.path))}
            self._rest.append(Unit(gone=Gone.PLANS_ANEW, files=ordered, folders=folders))

    def _find_base(self, parts: Iterable[Path]) -> tuple[Path | None, str]:
        """The base model's folder, and its place below the root, empty where that is in a part or not below the root."""
        name = self._settings.recipe.model.model_name_or_path
        if not name:
            return None, ""
        folder = Path(name).expanduser()
        if not folder.is_dir():
            self._left_out.append(LeftOut(name=name, reason="the base model is fetched from the Hub again"))
            return None, ""
        folder, root = folder.resolve(), self._settings.root.resolve()
        self._base_folder = str(folder)
        in_part = any(folder.is_relative_to(part.resolve()) for part in parts)
        if not in_part and (not folder.is_relative_to(root) or folder == root):
            self._left_out.append(LeftOut(name=str(folder), reason="the base model lies outside the root"))
            return None, ""
        if not self._options.base:
            self._left_out.append(LeftOut(name=str(folder), reason="the base model is saved with --base alone"))
        return folder, "" if in_part else str(folder.relative_to(root))

    def _plan_base(self) -> None:
        if self._options.base and self._base is not None and self._base_path:
            self._add_folder(BASE, self._base)
            for entry in self._scan(self._base):
                self._plan_other(f"{BASE}/{entry.name}", entry, gone=Gone.FAILS)

    # -- one thing at a time

    def _plan_other(
        self, name: str, entry: os.DirEntry[str], *, gone: Gone, skipped: frozenset[str] = frozenset()
    ) -> None:
        """A file, a link or a folder with all below it."""
        path = Path(entry.path)
        try:
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                target = os.readlink(path)
                if fault := link_fault(name, target):
                    self._left_out.append(LeftOut(name=name, reason=f"a link, and {fault}"))
                else:
                    self._links[name] = target
            elif stat.S_ISDIR(mode):
                self._plan_folder(name, path, gone=gone, skipped=skipped)
            elif not stat.S_ISREG(mode):
                self._left_out.append(LeftOut(name=name, reason="it is neither a file, a folder nor a link"))
            elif entry.name not in skipped and not _TEMPORARY.fullmatch(entry.name) and path != self._key:
                self._rest.append(Unit(gone=gone, files={name: path}))
        except FileNotFoundError:
            if gone is Gone.FAILS:
                raise

    def _plan_folder(self, name: str, path: Path, *, gone: Gone, skipped: frozenset[str]) -> None:
        identity = _identity(path)
        if identity in self._elsewhere or (
            not self._options.base and self._base is not None and path.resolve() == self._base
        ):
            return  # a part inside another one, the log, or the base model
        self._add_folder(name, path)
        for inner in self._scan(path):
            self._plan_other(f"{name}/{inner.name}", inner, gone=gone, skipped=skipped)

    def _add_folder(self, name: str, path: Path) -> None:
        mode = path.stat() if name in TOPS else path.lstat()
        self._folders[name] = stat.S_IMODE(mode.st_mode)

    def _capture(self, name: str, path: Path) -> None:
        descriptor = open_regular(path)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            self._captured[name] = Captured(
                content=file.read(), mode=stat.S_IMODE(found.st_mode), mtime_ns=found.st_mtime_ns
            )

    def _scan(self, folder: Path) -> Iterator[os.DirEntry[str]]:
        with os.scandir(folder) as entries:
            return iter(sorted(entries, key=lambda entry: entry.name))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def unreadable(path: Path, error: OSError) -> DropforgeError:
    """The error for something of the root that has to be saved and cannot be read."""
    return DropforgeError(
        operation="back up",
        subject=path,
        cause=(error.strerror or str(error)).lower(),
        hint="run it as the user who owns the root; nothing was written",
    )
