"""Making a backup: plan, copy, verify, and only then give it its name."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import guard
from daemon import root_identity, versions
from daemon.backup.containers import ChangedWhileRead, tar_compression
from daemon.backup.manifest import QUEUE_NAME, Manifest
from daemon.backup.plan import Captured, Gone, Options, Plan, Unit, plan_backup, unreadable, was_taken_away
from daemon.backup.sinks import Sink, open_sink
from daemon.config import Settings
from daemon.dataset.source import SourceError, open_regular
from daemon.errors import ConfigError, DropforgeError, NotFound, TryLater, is_gone, is_no_space
from daemon.holds import contradicted
from daemon.inbox import layout
from daemon.job import utc_now
from daemon.root_identity import Part, part_paths
from daemon.store import JobStore, is_made
from guard.atomic import write_all

ATTEMPTS = 10  # the queue may move on while its files are copied
RELOCATIONS = 20  # a folder may be renamed between its listing and its opening


class _Moved(Exception):
    """Something that was planned has moved on."""


@dataclass(frozen=True, kw_only=True)
class Backup:
    """A backup that was made and verified."""

    path: Path
    manifest: Manifest


def back_up(settings: Settings, target: Path, *, options: Options) -> Backup:
    """Save the root to a tar file or a folder, while a daemon runs or while none does.

    Raises DropforgeError when the root's parts do not belong together, when something cannot be read, or when there is no room;
    what was at `target` before is then as it was.
    """
    tar_compression(target)
    _require_outside(settings, target)
    root_id = _require_whole(settings)
    try:
        with _queue(settings) as store, _queue_copy(target) as queue_copy, open_sink(target) as sink:
            for _ in range(ATTEMPTS):
                plan = plan_backup(settings, store, queue_copy=queue_copy, options=options)
                try:
                    _write(settings, store, plan, queue_copy, sink)
                except (_Moved, ChangedWhileRead):
                    sink.clear()
                    continue
                manifest = _manifest(settings, root_id, plan, sink, options)
                return Backup(path=sink.publish(manifest), manifest=manifest)
    except (OSError, guard.GuardError) as error:
        raise _failure(settings, target, error) from error
    raise TryLater(
        operation="back up",
        subject=settings.root,
        cause="jobs and files moved faster than they could be copied",
        hint="try again, or `dropforge pause` first",
    )


def _failure(settings: Settings, target: Path, error: OSError | guard.GuardError) -> DropforgeError:
    """What went wrong, on the root's side or on the backup's."""
    if is_no_space(error):
        hint = "make room, or name another place; nothing was left there"
        return DropforgeError(operation="back up to", subject=target, cause="no space left", hint=hint)
    named = Path(error.filename) if isinstance(error, OSError) and isinstance(error.filename, str) else target
    if isinstance(error, PermissionError) and any(named.is_relative_to(part) for part in part_paths(settings).values()):
        return unreadable(named, error)
    cause = str(error.cause) if isinstance(error, guard.GuardError) else str(error)
    return DropforgeError(operation="back up to", subject=target, cause=cause, hint="nothing was left there")


def _require_outside(settings: Settings, target: Path) -> None:
    where = target.absolute().parent if tar_compression(target) is not None else target.absolute()
    for part, path in part_paths(settings).items():
        if where.resolve().is_relative_to(path.resolve()):
            raise ConfigError(
                operation="back up to",
                subject=target,
                cause=f"it lies inside {part}/ itself",
                hint="name another folder",
            )


def _require_whole(settings: Settings) -> str:
    """Return the root's id. Raises DropforgeError where a backup would replace a good one by what is left of a root."""
    readings = root_identity.read_parts(settings)
    hold = contradicted(settings)
    if hold is not None:
        raise DropforgeError(operation="back up", subject=settings.root, cause=hold.reason)
    closed = next((reading.path for reading in readings if reading.closed), None)
    if closed is not None:
        raise DropforgeError(
            operation="back up", subject=closed, cause="it cannot be read", hint="run it as the user who owns the root"
        )
    root_id = readings[0].root_id
    if root_id is None:
        raise NotFound(
            operation="back up",
            subject=settings.root,
            cause="it is no root yet, or no daemon of this version has run on it",
            hint="`dropforge run` marks it",
        )
    return root_id


@contextmanager
def _queue(settings: Settings) -> Iterator[JobStore | None]:
    """The root's store; None on a root that never had one. Raises DropforgeError where it is lost, StoreError."""
    path = settings.store_path
    if not is_made(path):
        if path.exists() or _has_history(settings):
            raise DropforgeError(
                operation="back up",
                subject=path,
                cause="the queue is lost or empty, although jobs were run here",
                hint="`dropforge run` makes it anew from the folders; back up then",
            )
        yield None
        return
    store = JobStore(path)
    try:
        yield store
    finally:
        store.close()


def _has_history(settings: Settings) -> bool:
    folders = (settings.model_dir / "versions", *(settings.inbox_dir / name for name in layout.JOB_FOLDERS))
    return any(folder.is_dir() and any(folder.iterdir()) for folder in folders)


@contextmanager
def _queue_copy(target: Path) -> Iterator[Path]:
    """Where the queue is copied to: beside the backup, where there has to be room for it anyway."""
    folder = target.parent if tar_compression(target) is not None else target
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{target.name}.queue"
    try:
        path.unlink(missing_ok=True)  # of a backup that was killed
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        yield path
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            with suppress(OSError):
                path.with_name(path.name + suffix).unlink()


def _write(settings: Settings, store: JobStore | None, plan: Plan, queue_copy: Path, sink: Sink) -> None:
    for name, mode in sorted(plan.folders.items()):
        sink.add_folder(name, mode)
    for unit in plan.units:
        _save(settings, store, unit, sink)
    for name, captured in plan.captured.items():
        with _in_memory(captured) as descriptor:
            sink.add_file(name, descriptor)
    if store is not None:
        descriptor = open_regular(queue_copy)
        try:
            os.fchmod(descriptor, settings.store_path.stat().st_mode & 0o7777)
            sink.add_file(QUEUE_NAME, descriptor)
        finally:
            os.close(descriptor)
    for name, target in sorted(plan.links.items()):
        sink.add_link(name, target)


def _save(settings: Settings, store: JobStore | None, unit: Unit, sink: Sink) -> None:
    """Save a unit's files: all are opened first, so that they are there whatever is renamed or removed meanwhile."""
    with ExitStack() as opened:
        try:
            if unit.job_id:
                found = _open_job(settings, unit, opened)
            else:
                found = {
                    name: _open(_whereabouts(settings, store, unit, path), opened) for name, path in unit.files.items()
                }
        except FileNotFoundError as error:
            if unit.gone is Gone.PLANS_ANEW or was_taken_away(settings, error.filename):
                raise _Moved from error
            if unit.gone is Gone.LEAVES_OUT:
                return
            raise unreadable(Path(error.filename), error) from error
        for name, mode in sorted(unit.folders.items()):
            sink.add_folder(name, mode)
        for name, descriptor in found.items():
            sink.add_file(name, descriptor)


def _open(path: Path, opened: ExitStack) -> int:
    """Open a file until the stack is closed. Raises FileNotFoundError where it is gone or replaced by something else."""
    try:
        descriptor = open_regular(path)
    except OSError as error:
        if is_gone(error):
            raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
        raise unreadable(path, error) from error
    except SourceError as error:
        raise FileNotFoundError(errno.ENOENT, error.reason, str(path)) from error
    opened.callback(os.close, descriptor)
    return descriptor


def _whereabouts(settings: Settings, store: JobStore | None, unit: Unit, path: Path) -> Path:
    """Where a file lies now: a dropped one may have been claimed since."""
    if store is None or not unit.inodes or os.path.lexists(path):
        return path
    for job in (job for inode in unit.inodes for job in store.with_inode(inode)):
        for place in layout.JOB_FOLDERS:
            claimed = settings.inbox_dir / place / job.id / path.name
            if os.path.lexists(claimed):
                return claimed
    return path


def _open_job(settings: Settings, unit: Unit, opened: ExitStack) -> dict[str, int]:
    """Open the files of a job's folder, wherever it lies now. Raises FileNotFoundError where it is nowhere."""
    (name,) = unit.folders
    for _ in range(RELOCATIONS):
        for place in layout.JOB_FOLDERS:
            folder = settings.inbox_dir / place / unit.job_id
            try:
                before = folder.lstat()
                files = {entry.name for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)}
                wanted = sorted(file for file in files - unit.skipped if not file.endswith(".tmp"))
                found = {f"{name}/{file}": _open(folder / file, opened) for file in wanted}
                if os.path.samestat(before, folder.lstat()) and (not unit.required or unit.required in files):
                    return found
            except (FileNotFoundError, NotADirectoryError):
                continue
    raise FileNotFoundError(errno.ENOENT, "it is gone", name)


@contextmanager
def _in_memory(captured: Captured) -> Iterator[int]:
    descriptor = os.memfd_create("dropforge", os.MFD_CLOEXEC)
    try:
        write_all(descriptor, captured.content)
        os.fchmod(descriptor, captured.mode)
        os.utime(descriptor, ns=(captured.mtime_ns, captured.mtime_ns))
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _manifest(settings: Settings, root_id: str, plan: Plan, sink: Sink, options: Options) -> Manifest:
    return Manifest(
        root_id=root_id,
        root=str(settings.root),
        created_at=utc_now(),
        program=_program(),
        current_version=plan.current_version,
        newest_version=max(plan.lineage.newest_number, *(int(found.name) for found in plan.saved), 0),
        jobs=dict(plan.jobs),
        with_checkpoints=options.checkpoints,
        base_folder=plan.base_folder,
        base_path=plan.base_path,
        files=sink.files,
        folders=sink.folders,
        links=sink.links,
        left_out=plan.left_out,
        warnings=tuple(_damage(plan, sink)),
    )


def _damage(plan: Plan, sink: Sink) -> Iterator[str]:
    """What was damaged already when it was saved: told now, while an earlier backup may still have it whole."""
    yield from plan.lineage.broken
    for found in plan.saved:

        def digest_of(name: str, folder: str = found.name) -> str | None:
            saved = sink.files.get(f"{Part.MODEL}/{versions.VERSIONS}/{folder}/{name}")
            return None if saved is None else saved.blake3

        yield from versions.damage(found, digest_of)


def _program() -> str:
    try:
        return metadata.version("dropforge")
    except metadata.PackageNotFoundError:
        return "?"
