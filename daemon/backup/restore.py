"""Bringing a root back from a backup: verify, look at what is there, move that aside, put back, mark.

Nothing is written before the whole backup is verified, and nothing is deleted. The state's mark says from the first change to
the last that the root is not whole, so that a restore that was cut short is not taken for a root.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

import guard
from daemon import config, root_identity, versions
from daemon.backup.containers import BLOCK_BYTES, DamagedBackup, Readable, make_durable
from daemon.backup.manifest import BASE, MANIFEST_NAME, MARK_NAMES, Manifest
from daemon.backup.plan import ASIDE_PREFIX, is_set_aside
from daemon.backup.sources import Source, open_source, verify
from daemon.config import CONFIG_NAME, Settings
from daemon.errors import DropforgeError, RootHeld, TryLater, is_no_space
from daemon.inbox import layout
from daemon.inbox.archive import NoLog
from daemon.job import FINAL_STATES, Job, JobState, utc_now
from daemon.recovery import bring_forward, follow_move
from daemon.root_identity import Part, part_paths
from daemon.store import JobStore, is_made
from daemon.text import escape
from guard.atomic import (
    append_line_durable,
    fsync_dir,
    make_folder_durable,
    rename_durable,
    write_all,
    write_atomic,
)
from guard.fingerprint import canonical_json
from guard.layout import LOCK_NAME, unused_name

JOURNAL = "restores.jsonl"
_HARMLESS = frozenset({LOCK_NAME, "lost+found"})
SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Obstacle:
    """Something that is where the backup belongs. `entries` are moved into `aside`; without any, the path itself is."""

    path: Path
    what: str
    aside: Path
    entries: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Newer:
    """What of the root in place is newer than the backup."""

    versions: tuple[str, ...] = ()
    jobs: tuple[Job, ...] = ()  # that changed since
    dropped: tuple[str, ...] = ()  # names of files that wait in the inbox
    used: int = 0  # the highest version number that was ever used here

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.versions or self.jobs or self.dropped)


@dataclass(frozen=True, kw_only=True)
class RestorePlan:
    """A verified backup, and what stands in its way. It can be shown, and executed once."""

    root: Path
    source: Path
    settings: Settings
    settings_text: bytes | None
    manifest: Manifest
    obstacles: tuple[Obstacle, ...]
    newer: Newer
    copy_of: str  # the state of the root that the backup is of, where that is another one and still there


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a restore did."""

    plan: RestorePlan
    requeued: tuple[Job, ...]  # that ran when the backup was taken
    brought_forward: int  # jobs whose version the backup has
    missing_base: str  # the base model in a folder that is not there; empty when it is, or comes from the Hub


def plan_restore(root: Path, path: Path) -> RestorePlan:
    """Verify a backup whole, and look at what is in its way; changes nothing.

    Raises DamagedBackup, NotFound, ConfigError, RootHeld, TryLater, DropforgeError.
    """
    try:
        with open_source(path) as source:
            verified = verify(source, keep=CONFIG_NAME)
    except OSError as error:
        raise DropforgeError(operation="read the backup", subject=path, cause=str(error)) from error
    manifest = verified.manifest
    settings = config.load(root, text=verified.settings_text)
    _require_free(settings)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    return RestorePlan(
        root=root,
        source=source.path.absolute(),
        settings=settings,
        settings_text=verified.settings_text,
        manifest=manifest,
        obstacles=tuple(_obstacles(settings, verified.settings_text, manifest, stamp)),
        newer=_newer(settings, manifest),
        copy_of=_copied(root, settings, manifest),
    )


def execute(plan: RestorePlan, *, move_aside: bool) -> Restored:
    """Put the backup in place. Raises DropforgeError where something is in its way, unless that is to be moved aside."""
    if plan.obstacles and not move_aside:
        there = "; ".join(f"{obstacle.path} {obstacle.what}" for obstacle in plan.obstacles)
        raise DropforgeError(
            operation="restore into",
            subject=plan.root,
            cause=f"it is not empty: {there}",
            hint="--move-aside renames that, deletes nothing, and says where it is then; --root names another place",
        )
    settings = plan.settings
    try:
        with ExitStack() as held:
            make_folder_durable(plan.root)
            for part in part_paths(settings).values():
                make_folder_durable(part)
            for lock in _locks(settings):
                held.enter_context(lock)
            _journal(plan, "begun")
            _clear_way(plan)
            _put_back(plan)
            requeued, forward = _bring_queue_forward(plan)
            _hand_over(plan)
            root_identity.finish_restore(
                settings,
                root_id=plan.manifest.root_id,
                newest_version=versions.newest_number(settings.model_dir),
                copy_of=plan.copy_of,
            )
            _journal(plan, "finished")
            _hand_over(plan)
    except guard.ModelLocked as error:
        raise TryLater(operation="restore into", subject=plan.root, cause=error.cause) from error
    except OSError as error:
        hint = "mend that, and restore again with --move-aside; nothing was deleted"
        cause = "no space left" if is_no_space(error) else str(error)
        raise DropforgeError(operation="restore into", subject=plan.root, cause=cause, hint=hint) from error
    return Restored(plan=plan, requeued=requeued, brought_forward=forward, missing_base=_missing_base(plan))


# -- what is there


def _locks(settings: Settings) -> Iterator[guard.ModelLock]:
    yield guard.ModelLock(settings.state_dir, owner="restore")
    yield guard.ModelLock(settings.model_dir, owner="restore")


def _require_free(settings: Settings) -> None:
    """Raise RootHeld where a daemon lives, TryLater where something works in the model directory."""
    folders = [settings.state_dir, settings.model_dir]
    for folder, lock in zip(folders, _locks(settings), strict=True):
        if not folder.is_dir():
            continue
        try:
            with lock:
                pass
        except guard.ModelLocked as error:
            is_daemon = folder == settings.state_dir
            raise (RootHeld if is_daemon else TryLater)(
                operation="restore into",
                subject=settings.root,
                cause=f"{'a daemon lives there' if is_daemon else 'a trainer works there'}: {error.cause}",
                hint="stop it first: `systemctl stop dropforge`, or Ctrl-C",
            ) from error


def _obstacles(settings: Settings, text: bytes | None, manifest: Manifest, stamp: str) -> Iterator[Obstacle]:
    for part, path in part_paths(settings).items():
        names = tuple(_in_the_way(path))
        if names:
            aside = path / unused_name(path, f"{ASIDE_PREFIX}{stamp}") if path.is_dir() else _beside(path, stamp)
            yield Obstacle(path=path, what=_describe(part, path, names), aside=aside, entries=names)
        elif os.path.lexists(path) and not path.is_dir():
            yield Obstacle(path=path, what="is not a folder", aside=_beside(path, stamp))
    present = settings.root / CONFIG_NAME
    if text is not None and os.path.lexists(present) and _content(present) != text:
        yield Obstacle(path=present, what="has other settings", aside=_beside(present, stamp))
    if manifest.base_path:
        base = settings.root / manifest.base_path
        if os.path.lexists(base) and (not base.is_dir() or any(base.iterdir())):
            yield Obstacle(path=base, what="is there already", aside=_beside(base, stamp))


def _in_the_way(folder: Path) -> Iterator[str]:
    """Names of what holds anything; empty folders are used as they are."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name) if folder.is_dir() else ():
        is_empty = entry.is_dir(follow_symlinks=False) and not any(files for _, _, files in os.walk(entry.path))
        links = entry.is_dir(follow_symlinks=False) and any(
            Path(path, name).is_symlink() for path, names, _ in os.walk(entry.path) for name in names
        )
        if entry.name not in _HARMLESS and not is_set_aside(entry.name) and (links or not is_empty):
            yield entry.name


def _describe(part: Part, path: Path, names: tuple[str, ...]) -> str:
    if part is Part.MODEL and (found := versions.list_versions(path)):
        return f"has {len(found)} version{'s' if len(found) > 1 else ''}, up to {found[-1].name}"
    shown = ", ".join(escape(name) for name in names[:SHOWN])
    return f"has {shown}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"


def _beside(path: Path, stamp: str) -> Path:
    return path.with_name(unused_name(path.parent, f"{path.name}{ASIDE_PREFIX}{stamp}"))


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _newer(settings: Settings, manifest: Manifest) -> Newer:
    """What would be set aside with the root in place; what cannot be read there tells nothing."""
    made: set[int] = set()
    with suppress(OSError):
        made.add(versions.newest_number(settings.model_dir))
    made.add(root_identity.read_parts(settings)[0].newest_version)
    jobs = tuple(_changed_since(settings, manifest.created_at))
    made.update(int(job.version) for job in jobs if job.version)
    used = max(made, default=0)
    dropped = [
        f"{folder.relative_to(settings.inbox_dir.parent)}/{entry.name}"
        for folder in layout.watched_folders(settings).values()
        if folder.is_dir()
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
        if entry.is_file(follow_symlinks=False) and layout.name_kind(entry.name) is layout.NameKind.DATA
    ]
    saved = {Path(name).name for name in manifest.files if name.startswith(f"{Part.INBOX}/")}
    return Newer(
        versions=tuple(f"{number:04d}" for number in range(manifest.newest_version + 1, used + 1)),
        jobs=jobs,
        dropped=tuple(name for name in dropped if Path(name).name not in saved),
        used=used,
    )


def _changed_since(settings: Settings, moment: str) -> Iterator[Job]:
    path = settings.store_path
    if not is_made(path):
        return
    try:
        store = JobStore(path)
    except DropforgeError:
        return  # damaged: that is why it is restored
    try:
        yield from (job for job in store.jobs() if job.updated_at > moment)
    finally:
        store.close()


def _copied(root: Path, settings: Settings, manifest: Manifest) -> str:
    """The state of the root that the backup is of, where that is another one than this and still there."""
    other = Path(manifest.root)
    if other == root:
        return ""
    try:
        state = config.load(other).state_dir
        same = state.exists() and settings.state_dir.exists() and state.samefile(settings.state_dir)
    except (DropforgeError, OSError):
        return ""
    return "" if same or not root_identity.is_state_of(state, manifest.root_id) else str(state)


# -- putting it back


def _journal(plan: RestorePlan, event: str) -> None:
    line = {
        "at": utc_now(),
        "event": event,
        "backup": str(plan.source),
        "backup_of": plan.manifest.created_at,
        "moved_aside": {str(obstacle.path): str(obstacle.aside) for obstacle in plan.obstacles},
    }
    append_line_durable(plan.root / JOURNAL, canonical_json(line).decode("ascii"))


def _clear_way(plan: RestorePlan) -> None:
    """Move aside what is there: of the state first, which is marked as not whole from then on."""
    toml, state = plan.root / CONFIG_NAME, plan.settings.state_dir
    if plan.settings_text is not None:  # the settings first: they say where the parts are
        _move(obstacle for obstacle in plan.obstacles if obstacle.path == toml)
        if _content(toml) != plan.settings_text:
            saved = plan.manifest.files[CONFIG_NAME]
            write_atomic(toml, plan.settings_text, mode=saved.mode)
            os.utime(toml, ns=(saved.mtime_ns, saved.mtime_ns))
    _move(obstacle for obstacle in plan.obstacles if obstacle.path == state)
    root_identity.begin_restore(plan.settings, root_id=plan.manifest.root_id, backup=str(plan.source))
    _move(obstacle for obstacle in plan.obstacles if obstacle.path not in (toml, state))
    for part in part_paths(plan.settings).values():
        make_folder_durable(part)


def _move(obstacles: Iterable[Obstacle]) -> None:
    for obstacle in obstacles:
        if not obstacle.entries:
            rename_durable(obstacle.path, obstacle.aside)
            continue
        obstacle.aside.mkdir(mode=0o700)
        for name in obstacle.entries:
            # SQLite removes the log beside a queue when its last reader, which looked at what is here, closes it.
            with suppress(FileNotFoundError) if name.endswith(("-wal", "-shm")) else nullcontext():
                (obstacle.path / name).rename(obstacle.aside / name)
        for folder in (obstacle.aside, obstacle.aside.parent, obstacle.path):
            fsync_dir(folder)


def _put_back(plan: RestorePlan) -> None:
    """Write what the backup holds into folders that hold nothing."""
    made: dict[Path, int] = {}
    links: dict[Path, str] = {}
    files: dict[Path, int] = {}
    for name, mode in sorted(plan.manifest.folders.items()):
        if (path := _place(plan, name)) is not None and not path.is_dir():
            if name == BASE:  # it may lie anywhere
                make_folder_durable(path.parent)
            path.mkdir(mode=0o700)
            made[path] = mode
    with open_source(plan.source) as source:
        for entry in source.entries():
            path = _place(plan, entry.name)
            if path is None or entry.kind == "folder":
                continue
            if entry.stream is None:
                links[path] = plan.manifest.links[entry.name]
            else:
                _write_file(source, plan.manifest, entry.name, entry.stream, path)
                files[path] = plan.manifest.files[entry.name].mode
    for path, target in sorted(links.items()):  # last: nothing is written through one
        path.symlink_to(target)
    if plan.newer.used > plan.manifest.newest_version:
        versions.record_restore(
            plan.settings.model_dir,
            current=plan.manifest.current_version,
            used=plan.newer.used,
            created_at=plan.manifest.created_at,
        )
    make_durable(files, {*made, *part_paths(plan.settings).values(), *(path.parent for path in made)})
    for path, mode in (*files.items(), *sorted(made.items(), reverse=True)):
        path.chmod(mode)  # after all that needs to read them; the mark's own fsync follows


def _place(plan: RestorePlan, name: str) -> Path | None:
    """Where something of the backup belongs; None for what a restore writes itself."""
    if name in MARK_NAMES or name in (MANIFEST_NAME, CONFIG_NAME):
        return None
    top, _, rest = name.partition("/")
    folder = plan.root / plan.manifest.base_path if top == BASE else part_paths(plan.settings)[Part(top)]
    return folder / rest if rest else folder


def _write_file(source: Source, manifest: Manifest, name: str, stream: Readable, path: Path) -> None:
    saved = manifest.files.get(name)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        hasher = blake3()
        while block := stream.read(BLOCK_BYTES):
            hasher.update(block)
            write_all(descriptor, block)
        if saved is None or hasher.hexdigest() != saved.blake3:
            raise DamagedBackup(
                operation="restore from",
                subject=source.path,
                cause=f"{escape(name)} changed since it was verified",
                hint="restore again from another backup, with --move-aside",
            )
        os.utime(descriptor, ns=(saved.mtime_ns, saved.mtime_ns))
    finally:
        os.close(descriptor)


def _bring_queue_forward(plan: RestorePlan) -> tuple[tuple[Job, ...], int]:
    """Have the queue fit what was restored: nothing runs, checkpoints may be gone, versions may be newer than it."""
    settings = plan.settings
    if not settings.store_path.exists():
        return (), 0
    store = JobStore(settings.store_path, check=True)
    try:
        begun: dict[str, Any] = {} if plan.manifest.with_checkpoints else {"max_step": 0, "step_at_launch": 0}
        reason = "it ran when the backup was taken"
        requeued = tuple(
            store.transition(job.id, JobState.RUNNING, JobState.QUEUED, reason, not_before=0.0, **begun)
            for job in store.jobs({JobState.RUNNING})
        )
        for job in store.jobs({JobState.QUEUED}):
            if begun and job.max_step:
                store.update(job.id, **begun)
        before = _finished(store)
        follow_move(settings, store, NoLog())
        bring_forward(settings, store, NoLog())
        return requeued, _finished(store) - before
    finally:
        store.close()


def _missing_base(plan: RestorePlan) -> str:
    """Where the base model's folder should be and is not: below the root, or elsewhere on the machine."""
    was, root = Path(plan.manifest.base_folder), Path(plan.manifest.root)
    folder = plan.root / was.relative_to(root) if was.is_relative_to(root) else was
    return str(folder) if plan.manifest.base_folder and not folder.is_dir() else ""


def _finished(store: JobStore) -> int:
    counts: Mapping[str, int] = store.counts()
    return sum(counts[state] for state in FINAL_STATES)


def _hand_over(plan: RestorePlan) -> None:
    """Give what root restored to the owner of the root's folder, who has to work with it."""
    owner = plan.root.stat()
    if os.geteuid() != 0 or owner.st_uid == 0:
        return
    tops = [*part_paths(plan.settings).values(), plan.root / CONFIG_NAME, plan.root / JOURNAL]
    if plan.manifest.base_path:
        tops.append(plan.root / plan.manifest.base_path)
    for top in tops:
        for path in _below(top):
            if path.lstat().st_uid == 0:
                os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _below(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir() and not path.is_symlink():
        for entry in os.scandir(path):
            if not is_set_aside(entry.name):
                yield from _below(Path(entry.path))
