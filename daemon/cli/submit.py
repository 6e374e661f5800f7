"""`dropforge submit`: a file into the inbox, so that no reader ever meets half of it."""

from __future__ import annotations

import os
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from daemon.config import Settings
from daemon.errors import DropforgeError, NotFound, TryLater
from daemon.job import FINAL_STATES, Job, Priority
from daemon.observability.status import read_status
from daemon.store import JobStore
from daemon.text import escape
from guard.atomic import fsync_dir

POLL_SECONDS = 0.2
COPY_BYTES = 4 * 2**20
PROGRESS_BYTES = 32 * 2**20  # a smaller file is copied before a bar is drawn


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A file that was dropped; the claim's rename keeps its inode."""

    path: Path
    inode: int
    earlier: frozenset[
        str
    ]  # jobs whose file had this inode before; file systems give the numbers of deleted files again


def submit(settings: Settings, file: Path, *, priority: Priority, force: bool) -> Placed:
    """Copy `file` beside the inbox's files under a hidden name, then give it its own; an equal name gets a number.

    Raises NotFound when there is no such file, DropforgeError when the inbox cannot be written.
    """
    if not file.is_file():
        raise NotFound(operation="submit", subject=escape(str(file)), cause="there is no such file")
    folder = settings.inbox_dir if priority is Priority.NORMAL else settings.inbox_dir / priority.value
    if not settings.inbox_dir.is_dir():
        raise NotFound(
            operation="submit to",
            subject=settings.inbox_dir,
            cause="there is no inbox",
            hint="`dropforge init` makes one",
        )
    folder.mkdir(exist_ok=True)
    hidden = folder / f".submit-{os.getpid()}-{time.monotonic_ns()}.part"
    try:
        inode = _copy(file, hidden)
        earlier = _jobs_with(settings, inode)
        placed = _place(hidden, folder, file.name, force=force)
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
        hidden.unlink(missing_ok=True)
    fsync_dir(folder)
    return Placed(path=placed, inode=inode, earlier=earlier)


def _jobs_with(settings: Settings, inode: int) -> frozenset[str]:
    if not settings.store_path.exists():
        return frozenset()
    with closing(JobStore(settings.store_path)) as store:
        return frozenset(job.id for job in store.with_inode(inode))


def _copy(file: Path, hidden: Path) -> int:
    """Copy and fsync, with a progress bar on a terminal when it takes long; returns the copy's inode. Raises OSError."""
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
        return os.fstat(target.fileno()).st_ino


def _place(hidden: Path, folder: Path, name: str, *, force: bool) -> Path:
    """Give the copy the first free of NAME, NAME-2, ... by a link, which unlike a rename never replaces a file.

    With `force`, its sidecar comes first: a file without one would be taken as it is.
    """
    stem, suffix = (name[: -len(".jsonl")], ".jsonl") if name.endswith(".jsonl") else (name, "")
    number = 1
    while True:
        target = folder / (name if number == 1 else f"{stem}-{number}{suffix}")
        sidecar = target.with_name(f"{target.name.removesuffix('.jsonl')}.job.toml")
        number += 1
        if target.exists() or (force and sidecar.exists()):
            continue
        if force:
            sidecar.write_text("force = true\n", encoding="ascii")
        try:
            os.link(hidden, target)
        except FileExistsError:
            continue
        return target


def wait_for(settings: Settings, placed: Placed) -> Job:
    """Wait until the job over this file is in a final state. Raises TryLater when no daemon lives to run it."""
    store: JobStore | None = None
    try:
        while True:
            snapshot = read_status(settings.status_path)
            if store is None and settings.store_path.exists():
                store = JobStore(settings.store_path)
            jobs = store.with_inode(placed.inode) if store else []
            found = [job for job in jobs if job.id not in placed.earlier][-1:]
            if found and found[0].state in FINAL_STATES:
                return found[0]
            if snapshot is None or not snapshot["alive"]:
                raise TryLater(
                    operation="wait for",
                    subject=escape(placed.path.name),
                    cause="no daemon is running on this root; the file waits for one",
                    hint="`dropforge run` starts one",
                )
            time.sleep(POLL_SECONDS)
    finally:
        if store is not None:
            store.close()
