"""The root's identity: its parts know one another, so that a missing, emptied or foreign one is never worked in.

`state/`, `current_model/` and `inbox/` carry the same id in a hidden file, written when the root is made. The state's also
remembers the newest version number, which tells a model directory that went back to an older copy. Whatever does not fit
holds the queue: nothing is created in place of what was there until a person says, with `dropforge adopt`, that it is meant.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from daemon import versions
from daemon.config import CONFIG_NAME, Settings
from daemon.errors import ConfigError, DropforgeError
from daemon.job import utc_now
from daemon.text import escape
from guard.atomic import make_folder_durable, write_atomic
from guard.json_text import parse_json

MARK = ".dropforge-root.json"
SCHEMA_VERSION = 1
MAX_MARK_BYTES = 65_536  # it may name paths
WAY_OUT = "mount or restore it, or say with `dropforge adopt` that what is there now is meant"


class Part(StrEnum):
    """What a root consists of."""

    STATE = "state"
    MODEL = "current_model"
    INBOX = "inbox"


@dataclass(frozen=True, kw_only=True)
class PartReading:
    """What one part says of itself."""

    part: Part
    path: Path
    exists: bool
    closed: bool = False  # nothing can be told of it now: permissions, or a disk that fails, which are told elsewhere
    root_id: str | None = None  # None: it carries no mark, or one that is not whole
    newest_version: int = 0  # of the state: remembered; of the model directory: found there
    is_marking: bool = False  # of the state: a crash came in between, and other parts may not be marked yet
    restoring: str = ""  # of the state: the backup that is being restored, or was when a crash came in between
    copy_of: str = ""  # of the state: the one that it is a copy of, which is still there


def read_parts(settings: Settings) -> tuple[PartReading, ...]:
    """Read the marks of all parts; state first. Opens nothing but them, and lists the versions' folder."""
    return tuple(_read_part(part, path) for part, path in part_paths(settings).items())


def part_paths(settings: Settings) -> Mapping[Part, Path]:
    """Return where each part lies."""
    return {Part.STATE: settings.state_dir, Part.MODEL: settings.model_dir, Part.INBOX: settings.inbox_dir}


def contradiction(readings: Sequence[PartReading]) -> str:
    """Say in one sentence what does not fit together, and the ways out; empty when everything does.

    Parts without any mark are a new root, or one made before roots had marks: nothing contradicts them.
    """
    reference = next((reading for reading in readings if reading.root_id is not None), None)
    if reference is None or reference.is_marking:
        return ""
    state = readings[0]
    if state.restoring:
        what = f"the restore of {escape(state.restoring)} was cut short"
        return f"{state.path} is not whole: {what}; do it again with `dropforge restore --move-aside`"
    if state.copy_of:
        what = f"{state.path} was restored from a backup of {escape(state.copy_of)}, which is still there"
        return f"{what}: two roots of one id; say with `dropforge adopt` that this is one of its own, or remove one of them"
    for reading in readings:  # state first: what it says counts
        if reading.closed:
            continue
        if (root_id := reading.root_id) is None:
            what = "carries no mark of this root: another disk, or an emptied folder, is in its place"
            return f"{reading.path} {what if reading.exists else 'is missing, and was there before'}; {WAY_OUT}"
        if root_id != reference.root_id:
            ids = f"{root_id[:8]}, not {str(reference.root_id)[:8]} as {reference.part}/"
            return f"{reading.path} belongs to another root ({ids}); {WAY_OUT}"
    found = {reading.part: reading for reading in readings}
    if found[Part.MODEL].closed:
        return ""
    remembered, present = found[Part.STATE].newest_version, found[Part.MODEL].newest_version
    if present < remembered:
        what = f"its newest version is {present:04d}" if present else "it holds no version"
        return (
            f"{found[Part.MODEL].path} is older than the queue: {what}, and {remembered:04d} was made here; {WAY_OUT}"
        )
    return ""


def require_root(settings: Settings) -> None:
    """Raise ConfigError in a folder that nothing says is meant as a root: no settings, and none of a root's parts.

    A root is made by `dropforge init`, or by whoever makes its inbox or names its base model in a variable.
    """
    if (settings.root / CONFIG_NAME).exists() or settings.model.model_name_or_path:
        return
    if not any(os.path.lexists(path) for path in part_paths(settings).values()):
        raise ConfigError(
            operation="serve",
            subject=settings.root,
            cause=f"it is no root: it has no {CONFIG_NAME}, and no inbox, model directory or state",
            hint="`dropforge init` makes it one; --root or DROPFORGE_ROOT names another folder",
        )


def require_state(settings: Settings) -> None:
    """Raise DropforgeError where the state is lost and other parts know that there was one: nothing is true without it.

    Asked before anything, a log file included, is made there.
    """
    readings = read_parts(settings)
    reason = contradiction(readings)
    if reason and (readings[0].root_id is None or readings[0].restoring):
        raise DropforgeError(operation="serve", subject=settings.root, cause=reason)


def establish(settings: Settings, *, newest_known: Callable[[], int] = lambda: 0) -> None:
    """Mark a root whose parts carry no mark yet, making those that are missing; else leave it as it is.

    `newest_known` tells the newest version that the queue knows. Raises OSError, and DropforgeError when parts without marks
    do not fit together: a queue that made versions, and a model directory without them.
    """
    readings = read_parts(settings)
    if readings[0].is_marking and readings[0].root_id is not None:
        _mark(settings, root_id=readings[0].root_id, newest_version=readings[0].newest_version)
        return
    if any(reading.root_id is not None for reading in readings):
        return
    present = max(reading.newest_version for reading in readings if reading.part is Part.MODEL)
    if present < (newest := newest_known()):
        raise DropforgeError(
            operation="serve",
            subject=settings.root,
            cause=f"{settings.model_dir} is older than the queue: {newest:04d} was made here",
            hint=WAY_OUT,
        )
    _mark(settings, root_id=secrets.token_hex(16), newest_version=present)


def remember_version(settings: Settings, name: str) -> None:
    """Note in the state's mark that a version was made, so that its loss is noticed. Raises OSError."""
    reading = _read_part(Part.STATE, settings.state_dir)
    if reading.root_id is not None and int(name) > reading.newest_version:
        _write_mark(reading.path, root_id=reading.root_id, newest_version=int(name))


def begin_restore(settings: Settings, *, root_id: str, backup: str) -> None:
    """Note in the state's mark that the root is not whole until `finish_restore`. Raises OSError."""
    make_folder_durable(settings.state_dir)
    _write_mark(settings.state_dir, root_id=root_id, restoring=backup)


def finish_restore(settings: Settings, *, root_id: str, newest_version: int, copy_of: str) -> None:
    """Mark a root that was restored; the state last.

    `copy_of`: the state of the root that the backup is of, where that is another one and still there. Raises OSError.
    """
    paths = part_paths(settings)
    for part in (Part.MODEL, Part.INBOX):
        _write_mark(paths[part], root_id=root_id)
    facts = {"copy_of": copy_of} if copy_of else {}
    _write_mark(paths[Part.STATE], root_id=root_id, newest_version=newest_version, **facts)


def adopt(settings: Settings) -> list[str]:
    """Take what lies in the parts now as meant: mark them all as one root. Returns what changed, a sentence each.

    A copy of a root that is still there gets an id of its own. Raises OSError.
    """
    readings = read_parts(settings)
    is_copy = bool(readings[0].copy_of)
    known = None if is_copy else next((reading.root_id for reading in readings if reading.root_id), None)
    root_id = known or secrets.token_hex(16)
    present = max(reading.newest_version for reading in readings if reading.part is Part.MODEL)
    changes = ["this root has an id of its own now"] if is_copy else []
    for reading in readings:
        if not reading.exists:
            changes.append(f"{reading.path} is made, empty")
        elif reading.root_id != root_id and not is_copy:
            changes.append(f"{reading.path} is part of this root now")
        if reading.part is Part.STATE and reading.newest_version > present:
            changes.append(f"versions {present + 1:04d} to {reading.newest_version:04d} are known to be gone")
    _mark(settings, root_id=root_id, newest_version=present)
    return changes


def _mark(settings: Settings, *, root_id: str, newest_version: int) -> None:
    """Mark all parts; the state's mark says first that it is being done, so that the next start finishes it."""
    paths = part_paths(settings)
    for path in paths.values():
        make_folder_durable(path)
        for leftover in path.glob(f".{MARK}.*.tmp"):  # of a write that a crash cut short
            leftover.unlink(missing_ok=True)
    known = {"newest_version": newest_version}
    _write_mark(paths[Part.STATE], root_id=root_id, **known, is_marking=True)
    for part in (Part.MODEL, Part.INBOX):
        _write_mark(paths[part], root_id=root_id)
    _write_mark(paths[Part.STATE], root_id=root_id, **known)


def _write_mark(folder: Path, *, root_id: str, **facts: int | bool | str) -> None:
    value = {"schema_version": SCHEMA_VERSION, "root": root_id, **facts, "written_at": utc_now()}
    write_atomic(folder / MARK, json.dumps(value) + "\n")


def _read_part(part: Part, path: Path) -> PartReading:
    try:
        mark = _read_mark(path / MARK)
        newest = versions.newest_number(path) if part is Part.MODEL else mark.newest_version
    except OSError:
        return PartReading(part=part, path=path, exists=True, closed=True)
    return PartReading(
        part=part,
        path=path,
        exists=path.is_dir(),
        root_id=mark.root_id,
        newest_version=newest,
        is_marking=mark.is_marking,
        restoring=mark.restoring,
        copy_of=mark.copy_of if mark.copy_of and is_state_of(Path(mark.copy_of), mark.root_id) else "",
    )


def is_state_of(folder: Path, root_id: str | None) -> bool:
    """Whether a folder is the state of the root of this id, as far as it can be read."""
    try:
        return root_id is not None and _read_mark(folder / MARK).root_id == root_id
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return False


@dataclass(frozen=True, kw_only=True)
class _Mark:
    root_id: str | None = None
    newest_version: int = 0
    is_marking: bool = False
    restoring: str = ""
    copy_of: str = ""


def _read_mark(path: Path) -> _Mark:
    """Read a mark; an empty one where there is none, or none that is whole. Raises OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return _Mark()
        raise
    try:
        value = parse_json(os.read(descriptor, MAX_MARK_BYTES))
        return _Mark(
            root_id=escape(value["root"]),
            newest_version=int(value.get("newest_version") or 0),
            is_marking=value.get("is_marking") is True,
            restoring=str(value.get("restoring") or ""),
            copy_of=str(value.get("copy_of") or ""),
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return _Mark()  # a person is asked, nothing is guessed
    finally:
        os.close(descriptor)
