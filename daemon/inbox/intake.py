"""The intake: the way of a dropped file from the inbox to the queue.

Nothing in a tick blocks on a file's size: candidates are examined by lstat, a claim is a row and a rename, rows are
read in child processes.
"""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from daemon.config import Settings
from daemon.holds import exhausted
from daemon.in_hand import InHand
from daemon.inbox import layout
from daemon.inbox.archive import Archive
from daemon.inbox.candidates import REMEMBER_SECONDS, SHOWN, CandidateTracker, SettledFile, shown_name
from daemon.inbox.claim import NotClaimed, claim, take_out
from daemon.inbox.purge import DonePurge
from daemon.inbox.strays import Stray, StrayFinder
from daemon.inbox.validation import Validator
from daemon.inbox.watcher import FolderWatcher
from daemon.job import Job, JobState, Priority
from daemon.root_identity import contradiction, read_parts
from daemon.store import JobStore
from daemon.text import escape
from daemon.wakeup import SupportsSet

CLAIM_SECONDS = 0.05  # of claims in a tick; the service has other things to do as well
MIN_SCAN_SECONDS = 0.05  # between two scans, however often events arrive
NO_ROOM_SECONDS = 1.0  # between two looks at a full disk
FAILED_CLAIM_SECONDS, LONGEST_FAILED_SECONDS = 5.0, 600.0  # before a file that could not be claimed is tried again
JOBS_SHOWN = 5  # of a file that came in pieces, the newest
PURGE_SECONDS = 3600.0
LOGGED_NAMES = 20  # that are found at once, each with a line of its own


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A file that is not taken yet, or whose rows cannot be read yet. `name` is safe to print."""

    name: str
    reason: str
    since: str


@dataclass(frozen=True, kw_only=True)
class IntakeView:
    """What status shows of the inbox."""

    watch_mode: str
    waiting: tuple[Waiting, ...]  # will be taken when their reason is gone
    deferred: int  # settled files that the queue has no place for
    scanning: tuple[tuple[str, int, int], ...]  # job, bytes read, size
    left_alone: tuple[Waiting, ...]  # will not be taken as they are
    held: str  # why no settled file is taken now
    overflows: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Pieces:
    """A file that came as several jobs, because its writer went on after the first was taken."""

    jobs: tuple[str, ...]
    latest: float  # when the newest of them was claimed, on our monotonic clock


class Intake:
    """The inbox of one root. One thread calls everything; other threads only set `wakeup`."""

    def __init__(
        self,
        settings: Settings,
        store: JobStore,
        archive: Archive,
        *,
        wakeup: SupportsSet,
        in_hand: InHand,
        log: Any,
    ) -> None:
        self.settings = settings
        self._store = store
        self._archive = archive
        self._in_hand = in_hand
        self._log = log
        folders = layout.watched_folders(settings)
        self._watcher = FolderWatcher(folders, wakeup, log)
        self._candidates = CandidateTracker(folders, settings.inbox, in_hand=in_hand)
        self._validator = Validator(settings, store, archive, wakeup=wakeup, in_hand=in_hand, log=log)
        self._next_rescan = 0.0
        self._scanned_at = float("-inf")
        self._scan_requested = True
        self._next_purge = 0.0
        self._claim_after = 0.0
        self._queue_full = False
        self._accepting = True
        self._repair_warnings: tuple[str, ...] = ()
        self._unusable = ""  # why no file can be claimed
        self._no_room = ""  # why none is, where the inbox's disk has no room for a job's folder and reports
        self._stray_finder = StrayFinder()
        self._purge = DonePurge(settings, store, log)
        self._pieces: dict[str, _Pieces] = {}  # by the file's shown name
        self._ignored_logged: set[tuple[str, str, str]] = set()  # event, name and reason
        self._overflows_logged = 0

    def open(self) -> None:
        """Start to watch, and the child that validates."""
        self._create_folders()  # before they are watched
        self._watcher.start(time.monotonic())
        self._validator.open()

    def resume_claimed(self, warnings: Iterable[str]) -> None:
        """Validate what an earlier daemon had claimed.

        `warnings`: what `daemon.recovery.repair_inbox`, which comes first, could not repair.
        """
        self._repair_warnings = tuple(warnings)
        self.adopt_claimed()

    def close(self) -> None:
        """Stop watching and reading; claimed jobs stay claimed and are validated at the next start."""
        self._watcher.stop()
        self._validator.close()

    def reload(self, settings: Settings) -> None:
        """Apply new settings; the folders stay where they are until a restart."""
        self.settings = settings
        self._candidates.settings = settings.inbox
        self._validator.settings = self._archive.settings = self._purge.settings = settings
        self._next_rescan = 0.0

    def tick(self, *, accept: bool = True) -> None:
        """One round of a file's way. `accept` false: nothing more is claimed."""
        now = time.monotonic()
        self._accepting = accept
        self._find(now)  # events and scans -> candidates
        self._candidates.examine_due(now)  # candidates -> settled
        if accept and now >= self._claim_after:
            try:
                self._claim_settled()  # settled -> claimed
            except OSError as error:  # what was renamed is validated after a rescan, or repaired at the next start
                self._claim_after = now + FAILED_CLAIM_SECONDS
                self._log.error("inbox.claims_failed", error=str(error))
        self._validator.tick()  # claimed -> queued, rejected, or cancelled as a duplicate
        if now >= self._next_purge:
            self._next_purge = now + PURGE_SECONDS
            self._purge.begin()
        self._purge.go_on()

    def set_aside(self, key: tuple[str, str], reason: str, *, inode: int | None = None) -> int:
        """Leave a dropped file, by priority and name, alone until another one takes its name; returns its inode."""
        return self._candidates.set_aside(key, reason, inode=inode)

    def take_out(self, key: tuple[str, str], reason: str) -> bool:
        """Move a dropped file, with its sidecar, to failed/ as a job that failed for `reason`, without a look into it.

        Returns whether its name is free then: only datasets are moved. Raises StoreError, OSError.
        """
        priority = Priority(key[0])
        path = layout.watched_folders(self.settings)[priority] / key[1]
        return take_out(self.settings, self._store, self._archive, path, priority=priority, reason=reason)

    @property
    def unusable(self) -> str:
        """Why no file can be claimed now; empty when files can."""
        return self._unusable or self._no_room

    def adopt_claimed(self) -> None:
        """Validate claimed jobs that no child has: another process put them back."""
        if not self._unusable:  # where the folders are not ours, no file can be said to be gone
            self._validator.adopt_claimed()

    def next_due_seconds(self) -> float | None:
        """Return how long the service may sleep when nothing wakes it."""
        now = time.monotonic()
        due = [max(0.0, self._next_rescan - now)]
        for seconds in (self._candidates.next_due(now), self._validator.next_due(now)):
            if seconds is not None:
                due.append(seconds)
        if self._stray_finder.is_listing or self._purge.is_busy:
            due.append(0.0)
        if self._scan_requested:
            due.append(max(0.0, self._scanned_at + MIN_SCAN_SECONDS - now))
        if self._candidates.deferred and self._accepting and not self._queue_full:
            due.append(max(0.0, self._claim_after - now))
        return min(due)

    def view(self) -> IntakeView:
        """Return what status shows now."""
        now = time.monotonic()
        # Those that a person has to help come first.
        unsettled = heapq.nsmallest(SHOWN, self._candidates.unsettled(), key=lambda found: not found.unreadable)
        waiting = [
            Waiting(name=shown_name(found.priority, found.name), reason=found.reason, since=found.since)
            for found in unsettled
        ]
        for name, since in self._validator.unsteady():
            waiting.append(Waiting(name=name, reason="claimed, but still being written", since=since))
        warnings = [
            *self._repair_warnings,
            *([self._unusable] if self._unusable else []),
            *self._archive.warnings(),
            *self._piece_warnings(now),
            *(
                [f"the inbox is polled: {why}"]
                if self._watcher.polling and (why := self._watcher.polling_reason)
                else []
            ),
        ]
        return IntakeView(
            watch_mode=self._watcher.mode,
            waiting=tuple(waiting),
            deferred=self._candidates.deferred,
            scanning=self._validator.busy(),
            left_alone=tuple(self._ignored(now)),
            held=self._no_room,
            overflows=self._watcher.overflows,
            warnings=tuple(warnings),
        )

    def _find(self, now: float) -> None:
        """Track what events name, and scan when one is due."""
        batch = self._watcher.drain()
        self._scan_requested |= batch.scan
        if self._watcher.overflows > self._overflows_logged:
            self._overflows_logged = self._watcher.overflows
            self._log.warning("inbox.events_lost", overflows=self._watcher.overflows)
        self._candidates.add_events(batch, now)
        self._candidates.continue_listing()
        self._stray_finder.continue_listing()
        if now >= self._next_rescan or self._watcher.lost:
            self._rescan(now)
        elif self._scan_requested and now - self._scanned_at >= MIN_SCAN_SECONDS:
            self._scan(now, full=True)

    def _rescan(self, now: float) -> None:
        """Do what is due every `rescan_seconds`, events or not."""
        self._watcher.verify(now)
        inbox = self.settings.inbox
        self._next_rescan = now + (
            min(inbox.rescan_seconds, inbox.poll_seconds) if self._watcher.polling else inbox.rescan_seconds
        )
        if not os.path.isdir(self.settings.inbox_dir / layout.PROCESSING):  # noqa: PTH112  False where it may not be told
            self._create_folders()  # another folder took the inbox's place, and that is meant
        if self._is_usable():
            self._archive.retry()
        self._scan(now, full=self._scan_requested)
        self._stray_finder.scan(self.settings)
        self._log_ignored(now)
        self.adopt_claimed()

    def _create_folders(self) -> None:
        """Make the inbox's own folders where they are missing, in an inbox of this root."""
        with suppress(OSError):  # what cannot be made is named as unusable
            if not contradiction(read_parts(self.settings)):
                layout.create_folders(self.settings)

    def _scan(self, now: float, *, full: bool) -> None:
        self._scan_requested = False
        self._candidates.scan(now, full=full)
        self._candidates.examine_due(now)
        self._scanned_at = time.monotonic()

    def _is_usable(self) -> bool:
        """Whether files can be taken from the inbox; a change is logged."""
        reason = contradiction(read_parts(self.settings))
        if not reason and (closed := layout.unusable_reason(self.settings)):
            reason = f"{closed}; files are taken again when it can"
        before, self._unusable = self._unusable, reason
        if self._unusable and self._unusable != before:
            self._log.warning("inbox.unusable", reason=self._unusable)
        elif before and not self._unusable:
            self._log.info("inbox.usable_again")
            self._scan_requested = True
        return not self._unusable

    def _ignored(self, now: float) -> list[Waiting]:
        """The first SHOWN of what will not be taken as it is: what seems to be a dataset first."""
        found = [
            (file.meant, Waiting(name=shown_name(file.priority, file.name), reason=file.reason, since=file.since))
            for file in islice(self._candidates.ignored(now), SHOWN)
        ]
        found += [
            (stray.meant, Waiting(name=_stray_name(stray), reason=stray.reason, since=stray.since))
            for stray in islice(self._stray_finder.found(), SHOWN)
        ]
        return [waiting for _, waiting in sorted(found, key=lambda pair: not pair[0])][:SHOWN]

    def _log_ignored(self, now: float) -> None:
        """Log each name that is ignored, or that cannot be read, once; of very many the first, and how many more."""
        new = [
            ("file.left_alone", shown_name(found.priority, found.name), found.reason)
            for found in self._candidates.take_new_ignored(now)
        ]
        strays = sorted(self._stray_finder.take_new(), key=lambda stray: not stray.meant)
        new += [("file.left_alone", _stray_name(stray), stray.reason) for stray in strays]
        present = {
            ("file.unreadable", shown_name(found.priority, found.name), found.reason)
            for found in self._candidates.unsettled()
            if found.unreadable
        }
        new += sorted(present - self._ignored_logged)
        self._ignored_logged = present
        for event, name, reason in new[:LOGGED_NAMES]:
            self._log.warning(event, file=name, reason=reason)
        if len(new) > LOGGED_NAMES:
            self._log.warning("inbox.many_left_alone", more=len(new) - LOGGED_NAMES, last=new[-1][1])

    def _piece_warnings(self, now: float) -> list[str]:
        """Tell of files that came as several jobs not long ago."""
        self._pieces = {name: file for name, file in self._pieces.items() if now - file.latest <= REMEMBER_SECONDS}
        return [
            f"{name} was written to after it had been taken, and came as {len(file.jobs)} jobs"
            f" ({', '.join(file.jobs[-JOBS_SHOWN:])}): write it elsewhere, then rename it in"
            for name, file in self._pieces.items()
        ]

    def _claim_settled(self) -> None:
        """Claim settled files while the queue has a place and the tick has time."""
        if not self._candidates.deferred:
            self._queue_full, self._no_room = False, ""
            return
        if not self._is_usable():
            self._next_rescan = min(self._next_rescan, time.monotonic() + FAILED_CLAIM_SECONDS)
            self._claim_after = self._next_rescan
            return
        if not self._has_room():
            self._claim_after = time.monotonic() + NO_ROOM_SECONDS
            return
        counts = self._store.counts()
        places = self.settings.inbox.max_queued - counts[JobState.CLAIMED] - counts[JobState.QUEUED]
        most, waiting = self.settings.limits.max_queued, self._store.waiting_by_owner()
        full = {owner for owner, number in waiting.items() if number >= most}
        until = time.monotonic() + CLAIM_SECONDS
        nobody = False  # has a file and a place
        while places > 0 and (now := time.monotonic()) < until:
            file = self._candidates.next_settled(now, full)
            if file is None:
                nobody = True
                break
            with self._in_hand.handling("claimed", file=file.candidate.key):
                job = self._claim(file, now)
            if job is not None:
                places -= 1
                waiting[job.owner] = waiting.get(job.owner, 0) + 1
                if waiting[job.owner] >= most:
                    full.add(job.owner)
                self._validator.submit(job)
        self._queue_full = places <= 0 or nobody

    def _has_room(self) -> bool:
        """Whether the inbox's disk has room for what a claim makes: each that fails would leave a cancelled job."""
        why = exhausted(self.settings.inbox_dir)
        before, self._no_room = self._no_room, ""
        if why:
            self._no_room = f"{self.settings.inbox_dir} {why}; files are taken again when there is more"
            if not before:
                self._log.warning("inbox.unusable", reason=self._no_room)
        elif before:
            self._log.info("inbox.usable_again")
        return not why

    def _claim(self, file: SettledFile, now: float) -> Job | None:
        """Claim one file; None when it waits, or left the inbox."""
        candidate = file.candidate
        self._log.info("file.settled", file=file.shown, reason=file.reason)
        try:
            job = claim(self.settings, self._store, self._archive, file, self._log)
        except NotClaimed as failure:
            if failure.waits:
                candidate.failed_claims += 1
                seconds = min(LONGEST_FAILED_SECONDS, FAILED_CLAIM_SECONDS * 2**candidate.failed_claims)
                self._candidates.postpone(candidate, now, seconds=seconds, reason=failure.reason)
            else:
                self._candidates.remove_claimed(file, now, None)
                self._scan_requested = True
            return None
        except Exception as failure:  # its row or its rename is missing; recovery knows what to do about it
            reason = escape(f"{failure}".partition("\n")[0]) or type(failure).__name__
            self._candidates.postpone(candidate, now, seconds=FAILED_CLAIM_SECONDS, reason=reason)
            raise
        if job.continues is not None:
            self._log.warning("file.came_back", file=file.shown, job=job.id, continues=job.continues)
            earlier = self._pieces[file.shown].jobs if file.shown in self._pieces else (job.continues,)
            self._pieces[file.shown] = _Pieces(jobs=(*earlier, job.id), latest=now)
        self._candidates.remove_claimed(file, now, job.id)
        return job


def _stray_name(stray: Stray) -> str:
    return f"{stray.folder}/{escape(stray.name)}"
