"""Strays: what a person put into the folders of jobs, where nothing is ever taken from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from operator import attrgetter
from pathlib import Path

from daemon.config import Settings
from daemon.inbox.layout import JOB_FOLDERS, NameKind, name_kind
from daemon.inbox.slices import NAMES_A_PAUSE, go_on
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
        names = sorted(name for name in _stray_names(settings.inbox_dir / folder) if name is not None)
        yield from (Stray(folder=folder, name=name, since=utc_now()) for name in names)


def _stray_names(folder: Path) -> Iterator[str | None]:
    """The names of a folder's strays, in no order; None now and then while there is none."""
    try:
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries, 1):
                is_job = is_job_folder(entry.name) and entry.is_dir(follow_symlinks=False)
                if not is_job and not entry.name.startswith("."):
                    yield entry.name
                elif number % NAMES_A_PAUSE == 0:
                    yield None
    except OSError:
        return


class StrayFinder:
    """Finds strays again and again, a slice at a time.

    A folder may hold very many jobs: it is listed only when its times have moved.
    """

    def __init__(self) -> None:
        self._times: dict[str, tuple[int, int]] = {}  # of each folder at its last listing
        self._unmoved: set[str] = set()  # folders that were listed again after their times had moved
        self._found: dict[str, tuple[Stray, ...]] = {}  # what seems to be a dataset first
        self._listings: dict[str, Iterator[None]] = {}  # begun, and gone on with at each tick
        self._new: list[Stray] = []

    def found(self) -> Iterator[Stray]:
        """Return what the last listings found, what seems to be a dataset first; `since` is when it was first found."""
        for found in self._found.values():
            yield from takewhile(attrgetter("meant"), found)
        for found in self._found.values():
            yield from dropwhile(attrgetter("meant"), found)

    def take_new(self) -> list[Stray]:
        """Return the strays that were found since the last call."""
        new, self._new = self._new, []
        return new

    @property
    def is_listing(self) -> bool:
        """Whether a listing has begun and is not at its end."""
        return bool(self._listings)

    def scan(self, settings: Settings) -> None:
        """Begin to list the folders whose times have moved; `continue_listing` does it."""
        for name in JOB_FOLDERS:
            if name in self._listings:
                continue  # what came since is found by the next scan: the folder's times are those of before
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
                self._listings[name] = self._listing(name, folder)
            self._times[name] = times
            self._unmoved.discard(name) if moved else self._unmoved.add(name)
        self.continue_listing()

    def continue_listing(self) -> None:
        """Go on with folders whose names are many, for a moment."""
        for name, listing in list(self._listings.items()):
            if not go_on(listing):
                return
            del self._listings[name]

    def _listing(self, name: str, folder: Path) -> Iterator[None]:
        names = []
        for found in _stray_names(folder):
            if found is not None:
                names.append(found)
            yield
        known = {stray.name: stray for stray in self._found.get(name, ())}
        new = {found: Stray(folder=name, name=found, since=utc_now()) for found in sorted(names) if found not in known}
        strays = (known.get(found) or new[found] for found in sorted(names))
        self._found[name] = tuple(sorted(strays, key=lambda stray: not stray.meant))
        self._new += new.values()
