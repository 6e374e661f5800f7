"""`dropforge submit`: a file into the inbox, so that no reader ever meets half of it."""

from __future__ import annotations

import os
import re
import sys
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from daemon.cli.account import access_to
from daemon.cli.check import CheckReport, check_file
from daemon.config import Settings
from daemon.dataset.convert import Converted, conversion_of, convert, converted_stem
from daemon.dataset.rows import Rules
from daemon.dataset.sidecar import may_speak_for, read_sidecar
from daemon.errors import ConfigError, DropforgeError, NotFound, RejectedData, TryLater
from daemon.inbox.layout import ROW_SUFFIXES, NameKind, name_kind, numbered_name, sidecar_name, watched_folders
from daemon.inbox.other_files import explain_other_file
from daemon.job import FINAL_STATES, Job, Priority
from daemon.observability.status import may_be_alive, read_status
from daemon.store import JobStore, is_made, open_for_reading
from daemon.text import escape
from guard.atomic import fsync_dir, make_folder_durable

STATE_POLL_SECONDS = 0.2
COPY_BYTES = 4 * 2**20
PROGRESS_BYTES = 32 * 2**20  # a smaller file is copied before a bar is drawn


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A file that was dropped; the claim's rename keeps its inode."""

    path: Path
    inode: int
    # Jobs whose file had this inode before; file systems give the numbers of deleted files again.
    earlier: frozenset[str]
    converted: Converted | None = None


def submit(
    settings: Settings,
    file: Path,
    *,
    priority: Priority,
    force: bool,
    encoding: str | None = None,
    checked: bool = True,
) -> Submitted:
    """Copy or convert `file` beside the inbox's files under a hidden name, then give it its own, or a free one like it.

    Its sidecar goes with it. `encoding` is of a text file that is to be converted. With `checked`, what `dropforge check`
    refuses is not dropped. Raises NotFound when there is no such file, RejectedData when it cannot be taken or is refused,
    DropforgeError when the inbox cannot be written.
    """
    if not file.is_file():
        cause = "it is not a regular file" if file.exists() else "there is no such file"
        raise NotFound(operation="submit", subject=escape(str(file)), cause=cause)
    if not settings.inbox_dir.is_dir():
        raise NotFound(
            operation="submit to",
            subject=settings.inbox_dir,
            cause="there is no inbox",
            hint="`dropforge init` makes one",
        )
    converting = conversion_of(file.name) is not None
    if not converting:
        _refuse_other_file(file, encoding)
    name = f"{converted_stem(file.name)}{ROW_SUFFIXES[0]}" if converting else file.name
    sidecar = _sidecar_text(settings, file.with_name(sidecar_name(name)), force=force)
    if checked and not converting:
        _require_accepted(check_file(file, settings, None, force=force), file)
    folder = watched_folders(settings)[priority]
    hidden = folder / f".submit-{os.getpid()}-{time.monotonic_ns()}.part"
    try:
        make_folder_durable(folder)
        converted = None
        if converting:
            converted = _convert(settings, file, hidden, encoding)
            if checked:
                _require_accepted(check_file(file.with_name(name), settings, None, content=hidden, force=force), file)
        else:
            _copy(file, hidden)
        inode = hidden.stat().st_ino
        earlier = _jobs_with(settings, inode)
        placed = _place(hidden, folder, name, sidecar)
        hidden.unlink()
        fsync_dir(folder)
    except OSError as error:
        raise DropforgeError(
            operation="submit to",
            subject=folder,
            cause=error.strerror or str(error),
            hint="members of its group may drop files: `ls -ld` names the group"
            if isinstance(error, PermissionError)
            else "",
        ) from error
    finally:
        with suppress(OSError):
            hidden.unlink(missing_ok=True)
    return Submitted(path=placed, inode=inode, earlier=earlier, converted=converted)


def _require_accepted(report: CheckReport, file: Path) -> None:
    if not report.accepted:
        more = "`dropforge check FILE` lists what is wrong, and --no-check drops it all the same"
        if conversion_of(file.name) is not None:  # which check does not read
            more = "its rows become lines in their order, and --no-check drops it all the same"
        raise RejectedData(
            operation="submit",
            subject=escape(str(file)),
            cause=escape(report.reason, most=1000),
            hint=f"{escape(report.hint, most=1000)}; {more}" if report.hint else more,
        )


def no_daemon_note(settings: Settings) -> str:
    """Say that what was dropped has to wait for a daemon; empty where one runs."""
    try:
        snapshot = read_status(settings.status_path)
    except (OSError, ValueError) as error:
        return f"whether a daemon runs on this root cannot be told: {escape(str(error), most=300)}"
    if snapshot is not None and snapshot["alive"]:
        return ""
    if snapshot is not None and snapshot["alive"] is None:
        return "whether a daemon runs on this root cannot be seen by this account"
    return f"no daemon runs on this root: what was dropped is trained when one starts; {access_to(settings).run_hint}"


def _refuse_other_file(file: Path, encoding: str | None) -> None:
    try:
        if name_kind(file.name) is not NameKind.DATA:
            reason, hint = explain_other_file(file)
            raise RejectedData(operation="submit", subject=escape(str(file)), cause=reason, hint=hint)
    except OSError as error:
        raise NotFound(operation="read", subject=escape(str(file)), cause=error.strerror or str(error)) from error
    if encoding is not None:
        raise ConfigError(
            operation="submit",
            subject=escape(str(file)),
            cause="--encoding is for files that are converted, and JSON lines are UTF-8",
            hint=f"convert it: iconv -f {escape(encoding)} -t UTF-8 FILE > NEW.jsonl",
        )


def _sidecar_text(settings: Settings, path: Path, *, force: bool) -> str:
    """What the file's sidecar shall say; empty when it needs none. Raises RejectedSidecar."""
    if not os.path.lexists(path):
        return "force = true\n" if force else ""
    asked = read_sidecar(path, settings.recipe, settings.limits, data_owner=path.lstat().st_uid)
    text = path.read_text(encoding="utf-8")
    if not force or asked.force:
        return text
    return "force = true\n" + re.sub(r"(?m)^force\s*=.*$", "", text)


def _jobs_with(settings: Settings, inode: int) -> frozenset[str]:
    if not is_made(settings.store_path):
        return frozenset()
    with closing(open_for_reading(settings.store_path)) as store:
        return frozenset(job.id for job in store.with_inode(inode))


def _copy(file: Path, hidden: Path) -> None:
    """Copy and fsync, with a progress bar on a terminal when it takes long. Raises OSError."""
    size = file.stat().st_size
    shown = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=size < PROGRESS_BYTES or not sys.stderr.isatty(),
    )
    with file.open("rb") as source, hidden.open("xb") as target, shown:
        task = shown.add_task("copying", total=size)
        while block := source.read(COPY_BYTES):
            target.write(block)
            shown.update(task, advance=len(block))
        target.flush()
        os.fsync(target.fileno())


def _convert(settings: Settings, file: Path, hidden: Path, encoding: str | None) -> Converted:
    """Write its rows as JSON lines, fsync, and count the lines that are there. Raises RejectedData, OSError."""
    with hidden.open("x+b") as target:
        converted = convert(file, target, Rules.of(settings.recipe.data), encoding=encoding)
        target.flush()
        os.fsync(target.fileno())
        target.seek(0)
        written = sum(block.count(b"\n") for block in iter(lambda: target.read(COPY_BYTES), b""))
    if written != converted.rows:
        raise OSError(f"{converted.rows} rows were read, but {written} lines were written")
    return converted


def _place(hidden: Path, folder: Path, name: str, sidecar: str) -> Path:
    """Give the copy the first free of NAME, NAME-2, ... by a link, which unlike a rename never replaces a file.

    Its sidecar comes first: a file without one would be taken as it is. A sidecar that waits there for its file is used
    when this file brings none; one that belongs to another file of the folder is not.
    """
    for number in count(1):
        target = folder / numbered_name(name, number)
        beside = folder / sidecar_name(target.name)
        waits = os.path.lexists(beside)
        if waits and not may_speak_for(beside.lstat().st_uid, hidden.stat().st_uid):
            continue  # another user's, which would not count: a name of its own spares both the question
        shared = any(_is_data(other.name) and sidecar_name(other.name) == beside.name for other in folder.iterdir())
        if os.path.lexists(target) or (waits and sidecar) or (shared and (waits or sidecar)):
            continue
        if sidecar:
            with beside.open("x", encoding="utf-8") as written:
                written.write(sidecar)
                written.flush()
                os.fsync(written.fileno())
        try:
            os.link(hidden, target)
        except OSError as error:
            if sidecar:
                beside.unlink()
            if not isinstance(error, FileExistsError):
                raise
            continue
        return target
    raise AssertionError  # the numbers have no end


def _is_data(name: str) -> bool:
    return name_kind(name) is NameKind.DATA


def wait_for(settings: Settings, placed: Submitted) -> Job:
    """Wait until the job over this file is in a final state. Raises TryLater when no daemon lives to run it."""
    store: JobStore | None = None
    try:
        while True:
            snapshot = read_status(settings.status_path)
            if store is None and is_made(settings.store_path):
                store = open_for_reading(settings.store_path)
            jobs = store.with_inode(placed.inode) if store else []
            found = [job for job in jobs if job.id not in placed.earlier][-1:]
            if found and found[0].state in FINAL_STATES:
                return found[0]
            if snapshot is None or not may_be_alive(snapshot):
                raise TryLater(
                    operation="wait for",
                    subject=escape(placed.path.name),
                    cause="no daemon is running on this root; the file waits for one",
                    hint=access_to(settings).run_hint,
                )
            time.sleep(STATE_POLL_SECONDS)
    finally:
        if store is not None:
            store.close()
