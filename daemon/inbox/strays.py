"""Strays: what a person put into the folders of jobs, where nothing is ever taken from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from daemon.config import Settings
from daemon.inbox.layout import JOB_FOLDERS, NameKind, name_kind
from daemon.job import utc_now

_JOB_FOLDER = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4,}(?:~\d+)?")  # a job's, or an older one that gave way to it


@dataclass(frozen=True, kw_only=True)
class Stray:
    """Something in `done/`, `failed/` or `processing/` that belongs to no job."""

    folder: str
    name: str
    since: str  # when it was found

    @property
    def meant(self) -> bool:
        """Whether it seems to be a dataset."""
        return name_kind(self.name) is NameKind.DATA

    @property
    def reason(self) -> str:
        """Why it is not taken, and what to do."""
        where = f"{self.folder}/ holds only the folders of jobs, and nothing is taken from it"
        return f"{where}: move it into the inbox itself to have it trained" if self.meant else where


def is_job_folder(name: str) -> bool:
    """Whether a name is that of a job's folder."""
    return _JOB_FOLDER.fullmatch(name) is not None


def find_strays(settings: Settings) -> Iterator[Stray]:
    """List the strays of a root. A folder that cannot be read has none: that is told elsewhere."""
    for folder in JOB_FOLDERS:
        yield from _strays_in(settings.inbox_dir / folder)


def _strays_in(folder: Path) -> Iterator[Stray]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                entry.name
                for entry in entries
                if not entry.name.startswith(".")
                and not (is_job_folder(entry.name) and entry.is_dir(follow_symlinks=False))
            )
    except OSError:
        return
    for name in names:
        yield Stray(folder=folder.name, name=name, since=utc_now())


class StrayFinder:
    """Finds strays again and again. A folder may hold very many jobs: it is listed only when its times have moved."""

    def __init__(self) -> None:
        self._times: dict[str, tuple[int, int]] = {}  # of each folder at its last listing
        self._unmoved: set[str] = set()  # folders that were listed again after their times had moved
        self._found: dict[str, tuple[Stray, ...]] = {}

    def find(self, settings: Settings) -> list[Stray]:
        """Return what is there now; `since` is when each was first found."""
        for name in JOB_FOLDERS:
            folder = settings.inbox_dir / name
            try:
                stat = folder.stat()
            except OSError:
                self._times.pop(name, None)
                self._found.pop(name, None)
                continue
            times = (stat.st_ino, stat.st_mtime_ns)
            moved = times != self._times.get(name)
            # A name that came within the clock tick of the listing moved no time: so it is listed once more.
            if moved or name not in self._unmoved:
                known = {stray.name: stray for stray in self._found.get(name, ())}
                self._found[name] = tuple(known.get(stray.name, stray) for stray in _strays_in(folder))
            self._times[name] = times
            self._unmoved.discard(name) if moved else self._unmoved.add(name)
        return [stray for found in self._found.values() for stray in found]
