"""Candidates: the names in the inbox that may become jobs, and the names that are ignored, each with its reason.

Scans and events find names; lstat, a lease and the last byte tell when a file is settled. Only regular files are opened.
"""

from __future__ import annotations

import heapq
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from daemon.config import InboxSettings
from daemon.dataset.sidecar import foreign_sentence, may_speak_for
from daemon.dataset.source import COMPRESSIONS, SourceError, kind_of_mode, open_regular
from daemon.errors import Unexpected, is_gone
from daemon.in_hand import InHand
from daemon.inbox.layout import (
    DATA_SUFFIXES,
    OWN_FOLDERS,
    SIDECAR_SUFFIX,
    UNFINISHED_SECONDS,
    NameKind,
    name_kind,
    sidecar_name,
)
from daemon.inbox.other_files import UNFINISHED, explain_other_name, names_unfinished_dataset
from daemon.inbox.settle import Candidate, EarlierClaim, FileStat, Settled, Wait, decide, required_stillness
from daemon.inbox.slices import NAMES_A_PAUSE, SLICE_SECONDS, go_on
from daemon.inbox.watcher import EventBatch, NameEvents
from daemon.inbox.writers import WriterState, find_writer, writer_state
from daemon.job import Priority, utc_now
from daemon.text import escape

EXAMINED_PER_TICK, EXAMINE_SECONDS = 2000, 0.1  # candidates before the service gets its turn again
FULL_SCAN_SECONDS = 60.0  # a folder whose times did not move is listed all the same after so long
COARSEST_CLOCK_SECONDS = 2.5  # a folder's times move every 2 s on FAT, every second through SFTP, every 4 ms on ext4
ORPHAN_SECONDS = 60.0  # a sidecar without its file is reported after so long
THOROUGH_BELOW = 100  # settled files; beyond, who writes to the next ones is asked only when their turn comes
SHOWN = 100  # files whose reasons are published
REMEMBER_SECONDS = 600.0  # how long a claim is remembered, for a writer that goes on under the same name
SINGLE_LINE_BYTES = 64 * 1024  # of a file that is looked through for a second line
SIDECAR_PAUSE = 0.05  # before a file whose sidecar is being written is examined again
ORPHAN = (
    "a sidecar whose file has not come, was taken before the sidecar came, or is another user's, for which it does not"
    " count"
)
OPEN = "open for writing"
NAME_AFTER_SECONDS, NAME_EVERY_SECONDS = 1.0, 5.0  # all of /proc is searched for a name: not for a short copy
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 5.0  # before a file that is open for writing is examined again


@dataclass(frozen=True, kw_only=True)
class IgnoredFile:
    """A name that will not become a job as it is, and why."""

    priority: Priority
    name: str
    reason: str
    since: str
    meant: bool  # it seems to be a dataset


@dataclass(frozen=True, kw_only=True)
class SettledFile:
    """A settled file, as its claim needs it."""

    candidate: Candidate
    folder: Path
    stat: FileStat
    sidecar_name: str | None  # that counts
    sidecar_ignored: str  # why the one that lies there does not
    reason: str

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return self.folder / self.candidate.name

    @property
    def sidecar(self) -> Path | None:
        """Where its sidecar lies, when it has one."""
        return self.folder / self.sidecar_name if self.sidecar_name is not None else None

    @property
    def shown(self) -> str:
        """Its name with a priority folder's, safe to print."""
        return shown_name(self.candidate.priority, self.candidate.name)


@dataclass(kw_only=True)
class _Unfinished:
    """A file under a temporary name."""

    stat: FileStat
    unchanged_since: float
    since: str  # the same moment by the wall clock
    told: bool = False  # that it has not changed for long


class _IgnoredFiles:
    """Names that will not be taken: however many there are, the first and the new ones are found at once."""

    def __init__(self) -> None:
        self.meant: dict[tuple[Priority, str], IgnoredFile] = {}  # those that seem to be datasets
        self.other: dict[tuple[Priority, str], IgnoredFile] = {}
        self._new: list[IgnoredFile] = []

    def __contains__(self, key: tuple[Priority, str]) -> bool:
        return key in self.meant or key in self.other

    def __iter__(self) -> Iterator[tuple[Priority, str]]:
        return itertools.chain(self.meant, self.other)

    def get(self, key: tuple[Priority, str]) -> IgnoredFile | None:
        return self.meant.get(key) or self.other.get(key)

    def add(self, key: tuple[Priority, str], reason: str, *, meant: bool) -> None:
        before = self.get(key)
        if before is not None and before.reason == reason:
            return
        self.discard(key)
        file = IgnoredFile(priority=key[0], name=key[1], reason=reason, since=utc_now(), meant=meant)
        (self.meant if meant else self.other)[key] = file
        self._new.append(file)

    def discard(self, key: tuple[Priority, str]) -> None:
        self.meant.pop(key, None)
        self.other.pop(key, None)

    def take_new(self) -> list[IgnoredFile]:
        new, self._new = self._new, []
        return new


class _Turns:
    """Settled files that wait for a place; their owners take turns, so that nobody stands behind all of another's."""

    def __init__(self) -> None:
        self._files: dict[int | None, deque[Candidate]] = {}  # by owner; who is next stands first

    def append(self, candidate: Candidate) -> None:
        owner = candidate.stat.owner if candidate.stat is not None else None
        self._files.setdefault(owner, deque()).append(candidate)

    def pop(self, full: Set[int | None]) -> Candidate | None:
        """Take the next file of an owner that is not in `full`."""
        owner = next((owner for owner in self._files if owner not in full), None)
        files = self._files.pop(owner, None) if owner not in full else None
        if not files:
            return None
        candidate = files.popleft()
        if files:
            self._files[owner] = files  # last in line now
        return candidate

    def keep(self, wanted: Callable[[Candidate], bool]) -> None:
        kept = {owner: deque(filter(wanted, files)) for owner, files in self._files.items()}
        self._files = {owner: files for owner, files in kept.items() if files}


class CandidateTracker:
    """Every name in the watched folders. `now` is of one monotonic clock throughout."""

    def __init__(self, folders: Mapping[Priority, Path], settings: InboxSettings, *, in_hand: InHand) -> None:
        self._folders = dict(folders)
        self._in_hand = in_hand
        self.settings = settings
        self._candidates: dict[tuple[Priority, str], Candidate] = {}
        self._sidecars: dict[tuple[Priority, str], Candidate] = {}
        self._unsettled: dict[tuple[Priority, str], Candidate] = {}  # those of the candidates that are not in _settled
        self._settled: dict[Priority, _Turns] = {p: _Turns() for p in Priority}
        self._due: list[tuple[float, int, tuple[Priority, str]]] = []
        self._order = itertools.count()
        self._ignored = _IgnoredFiles()
        self._orphans: dict[tuple[Priority, str], IgnoredFile] = {}  # sidecars whose file has not come
        self._new_orphans: list[IgnoredFile] = []
        self._listings: dict[Priority, Iterator[None]] = {}  # begun, and gone on with at each tick
        self._events: deque[tuple[tuple[Priority, str], NameEvents]] = deque()  # that a tick had no time for
        self._folder_times: dict[Priority, tuple[int, ...]] = {}
        self._moved_at: dict[Priority, float] = {}  # when a folder's times were seen to have moved
        self._last_listed: dict[Priority, float] = {}
        self._listed_at = float("-inf")
        self._last_clock = (float("-inf"), "")
        self._claims: dict[tuple[Priority, str], EarlierClaim] = {}  # of files that were not renamed in
        self._unfinished: dict[tuple[Priority, str], _Unfinished] = {}
        self._set_aside: dict[tuple[Priority, str], int] = {}  # inode; of files that this program could not handle

    @property
    def deferred(self) -> int:
        """How many settled files wait for a place in the queue."""
        return len(self._candidates) - len(self._unsettled)

    def unsettled(self) -> Iterator[Candidate]:
        """Return the files that are not settled yet."""
        return iter(self._unsettled.values())

    def set_aside(self, key: tuple[str, str], reason: str, *, inode: int | None = None) -> int:
        """Leave a file alone until another one has its name, or the daemon starts again.

        `inode`: of the file that is meant, where that was found earlier. Returns it.
        """
        known = Priority(key[0]), key[1]
        for table in (self._candidates, self._unsettled, self._sidecars):
            table.pop(known, None)
        self._settled[known[0]].keep(lambda found: found.key != known)
        found = _inode_of(self._folders[known[0]] / known[1])
        self._set_aside[known] = found if inode is None else inode
        if inode in (None, found):
            self._ignore(known, reason, meant=True)
        return self._set_aside[known]

    def _is_set_aside(self, key: tuple[Priority, str]) -> bool:
        """Whether the very file that was set aside has this name still."""
        if key not in self._set_aside:
            return False
        if self._set_aside[key] == _inode_of(self._folders[key[0]] / key[1]):
            return True
        del self._set_aside[key]
        self._ignored.discard(key)
        return False

    def add_events(self, batch: EventBatch, now: float) -> None:
        """Track the names of a batch; each is due now. What takes too long is gone on with at the next tick."""
        self._events.extend(batch.names.items())
        until = time.monotonic() + SLICE_SECONDS
        while self._events and time.monotonic() < until:
            (priority, name), events = self._events.popleft()
            kind = name_kind(name)
            if kind in (NameKind.DATA, NameKind.SIDECAR):
                candidate = self._track(priority, name, kind, now)
                candidate.add_events(events, now)
                candidate.due = now
                self._schedule(candidate)
            elif kind is NameKind.OTHER:
                self._ignore_other(priority, name)

    def scan(self, now: float, *, full: bool) -> None:
        """List the folders. One that was listed since its times last moved is skipped, unless `full`."""
        full = full or now - self._listed_at >= FULL_SCAN_SECONDS
        if full:
            self._listed_at = now
        for priority, folder in self._folders.items():
            try:
                found = folder.stat()
            except OSError:
                self._folder_times.pop(priority, None)
                self._listings.pop(priority, None)
                self._forget_missing(priority, set())
                continue
            if priority in self._listings:  # it is still being listed: what came since is found by the next scan
                self._folder_times.pop(priority, None)
                continue
            times = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
            if times != self._folder_times.get(priority):
                self._folder_times[priority], self._moved_at[priority] = times, now
            # A name that came within the same clock tick as the listing before it moved no time.
            elif not full and self._last_listed[priority] >= self._moved_at[priority] + COARSEST_CLOCK_SECONDS:
                continue
            self._last_listed[priority] = now
            self._list(priority, folder, now)
        self.continue_listing()

    def continue_listing(self) -> None:
        """Go on with folders whose names are many, for a moment."""
        for priority, listing in list(self._listings.items()):
            if not go_on(listing):
                return
            del self._listings[priority]

    def examine_due(self, now: float) -> None:
        """Examine the candidates that are due, at most EXAMINED_PER_TICK of them."""
        until = time.monotonic() + EXAMINE_SECONDS
        for _ in range(EXAMINED_PER_TICK):
            if not self._due or self._due[0][0] > now or time.monotonic() >= until:
                return
            _, _, key = heapq.heappop(self._due)
            candidate = self._candidates.get(key) or self._sidecars.get(key)
            if candidate is not None and candidate.due <= now and not candidate.settled:
                try:
                    with self._in_hand.handling("examined", file=candidate.key):
                        self._examine_candidate(candidate, now)
                except Unexpected:
                    candidate.due = now + _LONGEST_PAUSE
                    self._schedule(candidate)
                    raise

    def next_due(self, now: float) -> float | None:
        """Return the seconds until a candidate is due; None when none will be."""
        if self._listings or self._events:
            return 0.0
        while self._due:
            due, _, key = self._due[0]
            candidate = self._candidates.get(key) or self._sidecars.get(key)
            if candidate is None or candidate.settled or candidate.due != due:
                heapq.heappop(self._due)
                continue
            return max(0.0, due - now)
        return None

    def next_settled(self, now: float, full: Set[int | None] = frozenset()) -> SettledFile | None:
        """Return the next settled file, examined anew; None when there is none of an owner that is not in `full`.

        High priority comes before normal, and normal before low; within one, owners take turns.
        """
        for settled in (self._settled[priority] for priority in Priority):
            while (candidate := settled.pop(full)) is not None:
                candidate.settled = False
                self._unsettled[candidate.key] = candidate
                with self._in_hand.handling("examined again", file=candidate.key):
                    file = self._examine(candidate, now)
                if file is not None:
                    return file
                if candidate.key in self._candidates:
                    self._schedule(candidate)
        return None

    def postpone(self, candidate: Candidate, now: float, *, seconds: float, reason: str) -> None:
        """Examine a settled file that could not be claimed again in `seconds`."""
        candidate.reason = reason
        candidate.due = now + seconds
        self._schedule(candidate)

    def remove_claimed(self, file: SettledFile, now: float, job_id: str | None) -> None:
        """Stop tracking a file that left the inbox, as the file of a job or (None) otherwise."""
        candidate = file.candidate
        self._candidates.pop(candidate.key, None)
        self._unsettled.pop(candidate.key, None)
        if file.sidecar_name is not None:
            self._sidecars.pop((candidate.priority, file.sidecar_name), None)
        if job_id is not None and not candidate.renamed_in:
            self._claims[candidate.key] = EarlierClaim(
                job_id=job_id, claimed_at=now, changed_at=candidate.unchanged_since, owner=file.stat.owner
            )

    def _earlier_claim(self, key: tuple[Priority, str], now: float) -> EarlierClaim | None:
        """The claim of a file of this name not long ago: its writer may go on under the same name."""
        self._claims = {key: claim for key, claim in self._claims.items() if now - claim.claimed_at <= REMEMBER_SECONDS}
        return self._claims.get(key)

    def ignored(self, now: float) -> Iterator[IgnoredFile]:
        """Return what will not be taken as it is, what seems to be a dataset first; take no more than is shown.

        That is other kinds of files, and sidecars whose file has not come.
        """
        for (priority, name), file in self._unfinished.items():  # in the order in which they last changed
            if now - file.unchanged_since < UNFINISHED_SECONDS:
                break
            yield IgnoredFile(priority=priority, name=name, reason=UNFINISHED, since=file.since, meant=True)
        yield from self._orphans.values()
        yield from self._ignored.meant.values()
        yield from self._ignored.other.values()

    def take_new_ignored(self, now: float) -> list[IgnoredFile]:
        """Return what came to be ignored since the last call."""
        found = []
        for (priority, name), file in self._unfinished.items():
            if now - file.unchanged_since < UNFINISHED_SECONDS:
                break
            if not file.told:
                file.told = True
                found.append(IgnoredFile(priority=priority, name=name, reason=UNFINISHED, since=file.since, meant=True))
        new, self._new_orphans = self._new_orphans, []
        found += [file for file in new if self._orphans.get((file.priority, file.name)) is file]
        return found + [
            file for file in self._ignored.take_new() if self._ignored.get((file.priority, file.name)) is file
        ]

    def _note_orphan(self, sidecar: Candidate, now: float) -> None:
        """Tell of a sidecar whose file has not come for long."""
        base, tail = sidecar.name[: -len(SIDECAR_SUFFIX)], DATA_SUFFIXES
        names = (f"{base}{suffix}" for suffix in (*tail, *(suffix.upper() for suffix in tail)))
        if any((sidecar.priority, name) in self._candidates for name in names):
            return
        if now - sidecar.first_seen >= ORPHAN_SECONDS and sidecar.key not in self._orphans:
            file = IgnoredFile(
                priority=sidecar.priority, name=sidecar.name, reason=ORPHAN, since=sidecar.since, meant=True
            )
            self._orphans[sidecar.key] = file
            self._new_orphans.append(file)

    def _track(self, priority: Priority, name: str, kind: NameKind, now: float) -> Candidate:
        table = self._candidates if kind is NameKind.DATA else self._sidecars
        candidate = table.get((priority, name))
        if candidate is None:
            candidate = Candidate(priority=priority, name=name, first_seen=now, since=self._clock(now), due=now)
            if (earlier := self._earlier_claim(candidate.key, now)) is not None:
                candidate.follow(earlier, now, self.settings)
            table[candidate.key] = candidate
            if kind is NameKind.DATA:
                self._unsettled[candidate.key] = candidate
                self._orphans.pop((priority, sidecar_name(name)), None)
        return candidate

    def _clock(self, now: float) -> str:
        """The wall clock's time; one string for all that is found at once."""
        if now != self._last_clock[0]:
            self._last_clock = (now, utc_now())
        return self._last_clock[1]

    def _list(self, priority: Priority, folder: Path, now: float) -> None:
        """Begin to list a folder; `continue_listing` does it."""
        self._listings[priority] = self._listing(priority, folder, now)

    def _listing(self, priority: Priority, folder: Path, now: float) -> Iterator[None]:
        """Track the names of a folder and forget those that are gone, with a pause after each few."""
        names = set()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    names.add(entry.name)
                    if len(names) % NAMES_A_PAUSE == 0:
                        yield
        except OSError:
            return
        for _ in self._forget_slowly(priority, names):
            yield
        for number, name in enumerate(sorted(names), 1):
            kind = name_kind(name)
            if kind is NameKind.OTHER:
                self._ignore_other(priority, name)
            elif kind is NameKind.UNFINISHED:
                self._watch_unfinished(priority, name, now)
            elif (priority, name) not in self._known(kind):
                self._schedule(self._track(priority, name, kind, now))
            if number % NAMES_A_PAUSE == 0:
                yield

    def _watch_unfinished(self, priority: Priority, name: str, now: float) -> None:
        """Remember since when a dataset that is still to be renamed has not changed."""
        if not names_unfinished_dataset(name):
            return
        try:
            stat = FileStat.of((self._folders[priority] / name).lstat())
        except OSError:
            return
        before = self._unfinished.get((priority, name))
        if before is None or before.stat != stat:
            self._unfinished.pop((priority, name), None)  # the order is that of the last change
            self._unfinished[(priority, name)] = _Unfinished(stat=stat, unchanged_since=now, since=self._clock(now))

    def _known(self, kind: NameKind) -> dict[tuple[Priority, str], Candidate]:
        return self._candidates if kind is NameKind.DATA else self._sidecars

    def _forget_missing(self, priority: Priority, names: set[str]) -> None:
        for _ in self._forget_slowly(priority, names):
            pass

    def _forget_slowly(self, priority: Priority, names: set[str]) -> Iterator[None]:
        """Forget what is not among the names, with a pause after each few; what came since the listing began stays."""
        tables = (
            self._candidates, self._unsettled, self._sidecars, self._orphans, self._unfinished,
            self._ignored.meant, self._ignored.other,
        )  # fmt: skip
        gone: set[str] = set()
        for table in tables:
            for number, key in enumerate(tuple(table), 1):
                if key[0] is priority and key[1] not in names and (key[1] in gone or self._is_gone(key)):
                    gone.add(key[1])
                    table.pop(key, None)
                if number % NAMES_A_PAUSE == 0:
                    yield
        if gone:
            self._settled[priority].keep(lambda found: found.name not in gone)

    def _is_gone(self, key: tuple[Priority, str]) -> bool:
        return not os.path.lexists(f"{self._folders[key[0]]}/{key[1]}")

    def _ignore_other(self, priority: Priority, name: str) -> None:
        key = (priority, name)
        if key in self._ignored or (priority is Priority.NORMAL and name in OWN_FOLDERS):
            return
        try:
            found = (self._folders[priority] / name).lstat()
        except OSError:
            return
        kind = kind_of_mode(found.st_mode)
        other = explain_other_name(name)
        if kind is None:
            self._ignore(key, other.reason, meant=other.meant)
        else:
            self._ignore(key, f"left alone: it is {kind}", meant=False)

    def _ignore(self, key: tuple[Priority, str], reason: str, *, meant: bool) -> None:
        self._ignored.add(key, reason, meant=meant)

    def _examine_candidate(self, candidate: Candidate, now: float) -> None:
        if candidate.settled:
            return  # it is examined again when its turn comes
        file = self._examine(candidate, now, thorough=self.deferred < THOROUGH_BELOW)
        if candidate.key not in self._candidates and candidate.key not in self._sidecars:
            return
        if file is None:
            self._schedule(candidate)
            return
        if name_kind(candidate.name) is NameKind.SIDECAR:
            candidate.reason, candidate.due = "", now + ORPHAN_SECONDS
            self._note_orphan(candidate, now)
            if candidate.key not in self._orphans:
                self._schedule(candidate)
            return
        del self._unsettled[candidate.key]
        candidate.settled, candidate.reason = True, ""
        self._settled[candidate.priority].append(candidate)

    def _schedule(self, candidate: Candidate) -> None:
        heapq.heappush(self._due, (candidate.due, next(self._order), candidate.key))

    def _examine(self, candidate: Candidate, now: float, *, thorough: bool = True) -> SettledFile | None:
        """Decide by one lstat whether the file is settled.

        When it is not, the candidate gets a reason and the time at which it is due again.
        """
        # Plain strings here: Path objects are slow to make, and keep every part of every path they ever saw.
        folder = self._folders[candidate.priority]
        path = f"{folder}/{candidate.name}"
        try:
            stat = FileStat.of(os.lstat(path))
        except OSError as error:
            if is_gone(error):
                self._forget(candidate)
            else:
                candidate.reason, candidate.due = error.strerror or str(error), now + _LONGEST_PAUSE
            return None
        if stat.kind is not None:
            self._forget(candidate)
            self._ignore(candidate.key, f"refused: it is {stat.kind}, only regular files are trained", meant=True)
            return None
        self._ignored.discard(candidate.key)
        candidate.observe(stat, now)
        verdict = decide(candidate, now, self.settings)
        if isinstance(verdict, Wait):
            self._wait(candidate, verdict.reason, now + max(0.001, verdict.seconds))
            return None
        if thorough and not self._is_free(candidate, path, stat, verdict, now):
            return None
        sidecar, ignored = None, ""
        if name_kind(candidate.name) is NameKind.DATA:
            name = sidecar_name(candidate.name)
            owner = _owner_of(f"{folder}/{name}")
            if owner is not None and not may_speak_for(owner, stat.owner):
                ignored = foreign_sentence(name, owner, stat.owner)
            elif owner is not None:
                sidecar = name
            if sidecar is not None and not self._sidecar_is_settled(candidate.priority, name, now):
                self._wait(candidate, "its sidecar is not settled", now + SIDECAR_PAUSE)
                return None
        return SettledFile(
            candidate=candidate,
            folder=folder,
            stat=stat,
            sidecar_name=sidecar,
            sidecar_ignored=ignored,
            reason=verdict.reason,
        )

    def _sidecar_is_settled(self, priority: Priority, name: str, now: float) -> bool:
        sidecar = self._track(priority, name, NameKind.SIDECAR, now)
        file = self._examine(sidecar, now)
        # One that is refused as a sidecar (a link, a folder) is taken as it is: the claim refuses the file with it.
        return file is not None or sidecar.key in self._ignored

    def _is_free(self, candidate: Candidate, path: str, stat: FileStat, verdict: Settled, now: float) -> bool:
        """Whether no process writes to it and, where `whole_only`, it ends in a newline."""
        try:
            descriptor = open_regular(path)
        except (OSError, SourceError) as error:
            reason = error.reason if isinstance(error, SourceError) else f"cannot be read: {error.strerror}"
            candidate.unreadable = True
            self._wait(candidate, reason, now + _LONGEST_PAUSE)
            return False
        candidate.unreadable = False
        try:
            if FileStat.of(os.fstat(descriptor)) != stat:
                self._wait(candidate, "settling: it changed just now", now)
                return False
            state = writer_state(descriptor)
            if state is WriterState.PRESENT:
                self._wait_for_writer(candidate, stat, now)
                return False
            if verdict.whole_only and (
                state is not WriterState.ABSENT or os.pread(descriptor, 1, stat.size_bytes - 1) != b"\n"
            ):
                until = candidate.unchanged_since + required_stillness(candidate, self.settings)
                self._wait(candidate, "settling: it may not be whole", max(now + 0.001, until))
                return False
            if _may_be_appended_to(candidate, stat) and _has_one_line(descriptor, stat):
                candidate.single_line = True
                verdict_now = decide(candidate, now, self.settings)
                if isinstance(verdict_now, Wait):
                    self._wait(candidate, verdict_now.reason, now + max(0.001, verdict_now.seconds))
                    return False
        finally:
            os.close(descriptor)
        return True

    def _wait_for_writer(self, candidate: Candidate, stat: FileStat, now: float) -> None:
        age = now - candidate.first_seen
        candidate.due = now + min(_LONGEST_PAUSE, max(_FIRST_PAUSE, age / 4))
        if age < NAME_AFTER_SECONDS or now - candidate.writer_asked_at < NAME_EVERY_SECONDS:
            candidate.reason = candidate.reason if candidate.reason.startswith(OPEN) else OPEN
            return
        candidate.writer_asked_at = now
        writer = find_writer(stat.device, stat.inode)
        candidate.reason = f"{OPEN} by {writer.command} (pid {writer.pid})" if writer else OPEN

    @staticmethod
    def _wait(candidate: Candidate, reason: str, due: float) -> None:
        candidate.reason, candidate.due = reason, due

    def _forget(self, candidate: Candidate) -> None:
        self._candidates.pop(candidate.key, None)
        self._unsettled.pop(candidate.key, None)
        self._sidecars.pop(candidate.key, None)
        self._orphans.pop(candidate.key, None)


def _may_be_appended_to(candidate: Candidate, stat: FileStat) -> bool:
    """Whether a small dataset was written in place: not renamed or linked in, nor with its time kept, as finished ones."""
    written = candidate.closes > 0 or candidate.last_event_at is None
    return (
        written and not stat.kept_its_time and not candidate.renamed_in and not candidate.must_settle
        and 0 < stat.size_bytes <= SINGLE_LINE_BYTES and name_kind(candidate.name) is NameKind.DATA
        and not candidate.name.lower().endswith(tuple(COMPRESSIONS))
    )  # fmt: skip


def _owner_of(path: str) -> int | None:
    """The user id of what lies there; None when nothing does."""
    try:
        return os.lstat(path).st_uid
    except OSError:  # also of a name that is too long to be one
        return None


def _has_one_line(descriptor: int, stat: FileStat) -> bool:
    return os.pread(descriptor, stat.size_bytes, 0).count(b"\n") <= 1


def _inode_of(path: Path) -> int:
    """The inode that a name leads to; 0 when there is none to see."""
    try:
        return path.lstat().st_ino
    except OSError:
        return 0


def shown_name(priority: Priority, name: str) -> str:
    """Return a dropped file's name, with its priority folder's, safe to print."""
    return escape(name if priority is Priority.NORMAL else f"{priority.value}/{name}")
