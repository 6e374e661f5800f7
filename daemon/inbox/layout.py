"""The inbox on disk: its folders, where a job's file lies in them, and what a dropped name stands for.

    inbox/x.jsonl -> inbox/processing/<job id>/x.jsonl -> inbox/done/<job id>/ or inbox/failed/<job id>/

Each job has a folder of its own, so names never meet.
"""

from __future__ import annotations

import os
from contextlib import nullcontext, suppress
from enum import Enum, auto
from pathlib import Path

from daemon.config import Settings
from daemon.dataset.source import COMPRESSIONS
from daemon.holds import access_problem
from daemon.job import Job, JobState, Priority
from guard.atomic import fsync_dir

PROCESSING, DONE, FAILED = "processing", "done", "failed"
JOB_FOLDERS = (PROCESSING, DONE, FAILED)
OWN_FOLDERS = frozenset({*JOB_FOLDERS, Priority.HIGH, Priority.LOW})

ROW_SUFFIXES = (".jsonl", ".ndjson")  # one format under two names
DATA_SUFFIXES = tuple(row + packed for row in ROW_SUFFIXES for packed in ("", *COMPRESSIONS))
SIDECAR_SUFFIX = ".job.toml"
UNFINISHED_SUFFIXES = (".part", ".tmp", ".partial", ".crdownload", "~")
UNFINISHED_SECONDS = 600.0  # without a change, before a file that is still to be renamed is reported
MAX_NAME_BYTES = 255


class NameKind(Enum):
    """What a name in the inbox stands for."""

    DATA = auto()
    SIDECAR = auto()
    UNFINISHED = auto()  # a writer's temporary name: ignored until it is renamed
    OTHER = auto()


def name_kind(name: str) -> NameKind:
    """Classify a file name; the file is not opened."""
    lower = name.lower()
    if name.startswith((".", "~")) or lower.endswith(UNFINISHED_SUFFIXES):
        return NameKind.UNFINISHED
    if lower.endswith(SIDECAR_SUFFIX):
        return NameKind.SIDECAR
    return NameKind.DATA if lower.endswith(DATA_SUFFIXES) else NameKind.OTHER


def split_data_name(name: str) -> tuple[str, str]:
    """Split `x.jsonl.gz` into stem `x` and suffix `.jsonl.gz`; a name of another kind has no suffix."""
    lower = name.lower()
    suffix = max((suffix for suffix in DATA_SUFFIXES if lower.endswith(suffix)), key=len, default="")
    cut = len(name) - len(suffix)
    return name[:cut], name[cut:]


def sidecar_name(name: str) -> str:
    """Name the sidecar of a dataset: `x.job.toml` for `x.jsonl`, `x.ndjson`, `x.jsonl.gz`."""
    return split_data_name(name)[0] + SIDECAR_SUFFIX


def stem(name: str) -> str:
    """Return what a dataset and its sidecar have in common: `x` of `x.jsonl.gz` and of `x.job.toml`."""
    if name_kind(name) is NameKind.SIDECAR:
        return name[: -len(SIDECAR_SUFFIX)]
    return split_data_name(name)[0]


def numbered_name(name: str, number: int) -> str:
    """Name the next of equal datasets: `x-2.jsonl.gz` for `x.jsonl.gz` and 2; the name itself for 1.

    A long stem is cut so that the name, and that of its sidecar, fit a file system.
    """
    if number == 1:
        return name
    base, suffix = split_data_name(name)
    room = MAX_NAME_BYTES - len(f"-{number}") - max(len(suffix), len(SIDECAR_SUFFIX))
    while len(os.fsencode(base)) > room:
        base = base[:-1]
    return f"{base}-{number}{suffix}"


def watched_folders(settings: Settings) -> dict[Priority, Path]:
    """Return the folders into which files are dropped, by the priority that they give."""
    inbox = settings.inbox_dir
    return {Priority.NORMAL: inbox, Priority.HIGH: inbox / Priority.HIGH, Priority.LOW: inbox / Priority.LOW}


def create_folders(settings: Settings) -> None:
    """Make the inbox's own folders that are missing; never the inbox, whose absence is told.

    Raises OSError; not for done/ and failed/, of which the archive reports what it cannot move there.
    """
    for name in sorted(OWN_FOLDERS):
        with suppress(OSError) if name in (DONE, FAILED) else nullcontext():
            (settings.inbox_dir / name).mkdir(exist_ok=True)
    fsync_dir(settings.inbox_dir)


def unusable_reason(settings: Settings) -> str:
    """Say why no file can be claimed now; empty when one can."""
    for path in (settings.inbox_dir, settings.inbox_dir / PROCESSING):
        try:
            why = access_problem(path) or ("" if path.is_dir() else "it is not a folder")
        except FileNotFoundError:
            why = "it is missing"
        if why:
            return f"{path} cannot be used: {why}"
    return ""


def processing_dir(settings: Settings, job_id: str) -> Path:
    """Return the folder of a job that is not finished."""
    return settings.inbox_dir / PROCESSING / job_id


def final_dir(settings: Settings, job: Job) -> Path:
    """Return the folder of a finished job: in done/ for trained content, else in failed/."""
    return settings.inbox_dir / (DONE if is_trained(job) else FAILED) / job.id


def is_trained(job: Job) -> bool:
    """Whether a version holds the job's content: its own, or the original's of a duplicate."""
    return job.state is JobState.SUCCEEDED or job.duplicate_of is not None


def locate(settings: Settings, job: Job) -> Path | None:
    """Find the job's file; None when it is nowhere (trained and deleted, or removed by hand).

    Raises OSError when that cannot be told: what may not be entered is not empty.
    """
    for folder in JOB_FOLDERS:
        path = settings.inbox_dir / folder / job.id / job.name
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
            return path
    return None
