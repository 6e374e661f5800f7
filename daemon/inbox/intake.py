"""From the inbox to the queue: watch, scan, settle, claim, pass, decide.

`tick` is the order of events. Nothing in it blocks on a file's size: looks are lstat calls, claims are a row and a
rename, rows are read in child processes.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from daemon.config import Settings
from daemon.errors import NotFound
from daemon.inbox import archive, layout
from daemon.inbox.candidates import SHOWN, CandidateTracker, Ready
from daemon.inbox.filing import Filing
from daemon.inbox.repair import repair
from daemon.inbox.settle import FileStat
from daemon.inbox.sidecar import RejectedSidecar, Sidecar, read_sidecar
from daemon.inbox.validation import Validator
from daemon.inbox.watcher import FolderWatch, Rings, identity_of
from daemon.job import Job, JobState, Priority, new_job_id
from daemon.store import JobStore
from daemon.text import escape

CLAIM_SECONDS = 0.05  # of claims in a tick; the service has other things to do as well
MIN_SCAN_SECONDS = 0.05  # between two scans, however often the bell rings
FAILED_CLAIM_SECONDS, LONGEST_FAILED_SECONDS = 5.0, 600.0  # before a file that could not be moved is tried again
PURGE_SECONDS = 3600.0


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
    overflows: int
    warnings: tuple[str, ...]


class Intake:
    """The inbox of one root. One thread calls everything; other threads only ring `bell`."""

    def __init__(self, settings: Settings, store: JobStore, *, wakeup: Rings, log: Any) -> None:
        self.settings = settings
        self._store = store
        self._wakeup = wakeup
        self._log = log
        folders = layout.watched_folders(settings)
        self._drops = CandidateTracker(folders, settings.inbox)
        self._watch = FolderWatch(folders, wakeup, log)
        self.filing = Filing(settings, store, log)
        self._checking = Validator(settings, store, filing=self.filing, wakeup=wakeup, log=log)
        self._told: set[tuple[Priority, str, str]] = set()
        self._next_rescan = 0.0
        self._scanned_at = float("-inf")
        self._scan_wanted = True
        self._next_purge = 0.0
        self._claim_after = 0.0
        self._full = False  # the queue has no place
        self._accepting = True
        self._trouble = ""  # why the inbox cannot be used
        self._warnings: dict[str, str] = {}
        self._overflows_told = 0

    def open(self) -> None:
        """Make the folders, mend what a crash left half done, start to watch. Raises OSError, StoreError."""
        layout.create_folders(self.settings)
        for line in repair(self.settings, self._store, self._log):
            self._warnings[line] = line
        self._watch.start(time.monotonic())
        self._checking.open()

    def close(self) -> None:
        """Stop watching and end the passes; their jobs stay claimed and are passed again at the next start."""
        self._watch.stop()
        self._checking.close()

    def reload(self, settings: Settings) -> None:
        """Take over new settings; the folders stay where they are until a restart."""
        self.settings = settings
        self._drops.settings = settings.inbox
        self._checking.settings = self.filing.settings = settings
        self._next_rescan = 0.0

    def tick(self, *, accept: bool = True) -> None:
        """One round: what was heard, what is due, claims, passes. `accept` false: nothing more is claimed."""
        now = time.monotonic()
        self._accepting = accept
        self._listen(now)
        self._drops.look(now)
        if accept and now >= self._claim_after:
            try:
                self._claim()
            except OSError as error:  # what was renamed is passed at the next rescan, or mended at the next start
                self._claim_after = now + FAILED_CLAIM_SECONDS
                self._log.error("inbox.claims_failed", error=str(error))
        self._checking.tick()
        if now >= self._next_purge:
            self._next_purge = now + PURGE_SECONDS
            self._purge()

    def adopt(self) -> None:
        """Pass claimed jobs that are not under way: another process put them back."""
        self._checking.adopt()

    def next_due_seconds(self) -> float | None:
        """How long the service may sleep at most when nothing rings."""
        now = time.monotonic()
        due = [max(0.0, self._next_rescan - now)]
        if (looks := self._drops.next_due(now)) is not None:
            due.append(looks)
        if self._scan_wanted:
            due.append(max(0.0, self._scanned_at + MIN_SCAN_SECONDS - now))
        if (passes := self._checking.next_due(now)) is not None:
            due.append(passes)
        if self._drops.deferred and self._accepting and not self._full:
            due.append(max(0.0, self._claim_after - now))
        return min(due)

    def view(self) -> IntakeView:
        """What there is to tell now."""
        now = time.monotonic()
        waiting: list[Waiting] = []
        for candidate in self._drops.waiting():
            if len(waiting) >= SHOWN:
                break
            waiting.append(
                Waiting(name=_shown(candidate.priority, candidate.name), reason=candidate.reason, since=candidate.since)
            )
        for name, since in self._checking.unsteady():
            waiting.append(Waiting(name=name, reason="claimed, but still being written", since=since))
        refused_first = sorted(self._drops.alone(now), key=lambda found: not found.meant)
        alone = tuple(
            Waiting(name=_shown(found.priority, found.name), reason=found.reason, since=found.since)
            for found in refused_first[:SHOWN]
        )
        warnings = [
            *self._warnings.values(),
            *self.filing.warnings(),
        ]
        if self._watch.polling:
            warnings.append(f"the inbox is polled: {self._watch.polling_reason}")
        return IntakeView(
            watch_mode=self._watch.mode,
            waiting=tuple(waiting),
            deferred=self._drops.deferred,
            scanning=self._checking.busy(),
            left_alone=alone,
            overflows=self._watch.overflows,
            warnings=tuple(warnings),
        )

    def _listen(self, now: float) -> None:
        """What the doorbell noted, and a scan when one is due."""
        heard = self._watch.take()
        self._scan_wanted |= heard.scan
        if self._watch.overflows > self._overflows_told:
            self._overflows_told = self._watch.overflows
            self._log.warning("inbox.events_lost", overflows=self._watch.overflows)
        self._drops.hear(heard, now)
        if now >= self._next_rescan or self._watch.lost:
            self._rescan(now)
        elif self._scan_wanted and now - self._scanned_at >= MIN_SCAN_SECONDS:
            self._scan(now, full=True)

    def _rescan(self, now: float) -> None:
        self._watch.check(now)
        seconds = self.settings.inbox.rescan_seconds
        if self._watch.polling:
            seconds = min(seconds, self.settings.inbox.poll_seconds)
        self._next_rescan = now + seconds
        if not self._look_for_trouble() and not (self.settings.inbox_dir / layout.PROCESSING).is_dir():
            layout.create_folders(self.settings)  # another folder took the inbox's place
        self._scan(now, full=self._scan_wanted)
        self._tell_left_alone(now)
        self.filing.again()
        self._checking.adopt()

    def _look_for_trouble(self) -> bool:
        """Whether the inbox cannot be used now; told once each time, and shown for as long as it lasts."""
        trouble = layout.unusable_reason(self.settings)
        if trouble != self._trouble:
            if trouble:
                self._log.warning("inbox.unusable", reason=trouble)
                self._warnings["trouble"] = trouble
            else:
                self._log.info("inbox.usable_again")
                self._warnings.pop("trouble", None)
                self._scan_wanted = True
            self._trouble = trouble
        return bool(trouble)

    def _scan(self, now: float, *, full: bool) -> None:
        self._scan_wanted = False
        self._drops.scan(now, full=full)
        self._drops.look(now)
        self._scanned_at = time.monotonic()

    def _tell_left_alone(self, now: float) -> None:
        """Report each thing that is left alone once."""
        present = set()
        for found in self._drops.alone(now):
            key = (found.priority, found.name, found.reason)
            present.add(key)
            if key not in self._told:
                self._log.warning("file.left_alone", file=_shown(found.priority, found.name), reason=found.reason)
        self._told = present

    def _claim(self) -> None:
        """Claim settled files while the queue has a place and the tick has time."""
        if not self._drops.deferred:
            self._full = False
            return
        if self._look_for_trouble():
            self._next_rescan = min(self._next_rescan, time.monotonic() + FAILED_CLAIM_SECONDS)
            self._claim_after = self._next_rescan
            return
        counts = self._store.counts()
        room = self.settings.inbox.max_queued - counts[JobState.CLAIMED] - counts[JobState.QUEUED]
        until = time.monotonic() + CLAIM_SECONDS
        claimed: list[Job] = []
        while room > 0 and (now := time.monotonic()) < until:
            ready = self._drops.take(now)
            if ready is None:
                break
            job = self._claim_one(ready, now)
            if job is not None:
                claimed.append(job)
                room -= 1
        self._full = room <= 0
        if claimed:
            archive.sync_claims(self.settings, claimed)
            for job in claimed:
                self._checking.ask(job)

    def _claim_one(self, ready: Ready, now: float) -> Job | None:
        """Row, then rename. None when the file could not be taken; it waits, or is gone."""
        # Folders are compared: on an overlay, as in a container, a file's own device is another than its folder's.
        if _device(ready.path.parent) != _device(self.settings.inbox_dir / layout.PROCESSING):
            reason = "inbox/processing is on another file system; files are taken by renaming"
            self._drops.give_back(ready.candidate, now, seconds=FAILED_CLAIM_SECONDS, reason=reason)
            return None
        sidecar = Sidecar()
        if ready.sidecar is not None:
            with suppress(RejectedSidecar):  # told when it is read again, in its final place
                sidecar = read_sidecar(ready.sidecar, self.settings.recipe)
        job = self._new_job(ready, sidecar, sidecar.priority or ready.candidate.priority)
        shown = _shown(ready.candidate.priority, ready.candidate.name)
        self._log.info("file.settled", file=shown, reason=ready.reason)
        if ready.candidate.came_back:
            self._log.warning("file.came_back", file=shown, job=job.id)
        job = self._store.add(job)
        try:
            target = archive.claim_file(self.settings, job, ready.path, ready.sidecar)
            taken = FileStat.of(target.lstat())
        except OSError as error:
            self._undo_claim(ready, job, error, now)
            return None
        if not _same_file(ready.look, taken):
            back = archive.return_to_inbox(target, ready.path.parent)
            archive.return_sidecar(self.settings, job)
            self._drops.claimed(ready, now)
            self._scan_wanted = True
            self._log.warning("file.replaced", file=shown, job=job.id, now=escape(back.name))
            self._checking.cancel(
                job, "it changed, or another took its place, while it was being taken; what lies there is watched anew"
            )
            return None
        self._drops.claimed(ready, now)
        self._log.info("file.claimed", file=shown, job=job.id, priority=job.priority.value)
        return job

    def _new_job(self, ready: Ready, sidecar: Sidecar, priority: Priority) -> Job:
        job_id = new_job_id()
        while self._is_used(job_id):  # four hex digits a second are few in a burst
            job_id = new_job_id()
        return Job(
            id=job_id,
            name=ready.candidate.name,
            state=JobState.CLAIMED,
            priority=priority,
            path=str(layout.processing_dir(self.settings, job_id) / ready.candidate.name),
            source=str(ready.path),
            source_inode=ready.look.inode,
            size_bytes=ready.look.size_bytes,
            force=sidecar.force,
            overrides=sidecar.overrides,
            reason="its rows are being checked",
        )

    def _is_used(self, job_id: str) -> bool:
        if layout.processing_dir(self.settings, job_id).exists():
            return True
        try:
            self._store.get(job_id)
        except NotFound:
            return False
        return True

    def _undo_claim(self, ready: Ready, job: Job, error: OSError, now: float) -> None:
        """The rename did not happen: the row is closed, and the file, if it is still there, waits longer each time."""
        archive.return_sidecar(self.settings, job)
        if archive.gone(error):
            self._drops.claimed(ready, now)
            reason = "it was removed from the inbox before it could be taken"
        else:
            reason = f"it could not be moved: {error.strerror or error}"
            ready.candidate.failed_claims += 1
            seconds = min(LONGEST_FAILED_SECONDS, FAILED_CLAIM_SECONDS * 2**ready.candidate.failed_claims)
            self._drops.give_back(ready.candidate, now, seconds=seconds, reason=reason)
        self._log.warning("file.not_claimed", file=escape(ready.candidate.name), job=job.id, reason=reason)
        self._checking.cancel(job, reason)

    def _purge(self) -> None:
        """Delete trained files older than keep_done_days, by the time at which their job finished."""
        days = self.settings.inbox.keep_done_days
        if not days:
            return
        before = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="milliseconds")
        folder = self.settings.inbox_dir / layout.DONE
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            try:
                job = self._store.get(path.name)
                trained = job.state is JobState.SUCCEEDED or job.duplicate_of is not None
                old = job.finished_at is not None and job.finished_at < before
                if trained and old and archive.remove_done(self.settings, job):
                    self._log.info("file.purged", job=job.id, file=escape(job.name), finished_at=job.finished_at)
            except NotFound:
                continue  # not ours: never deleted
            except OSError as error:
                self._log.error("file.not_purged", job=path.name, error=str(error))


def _device(folder: Path) -> int | None:
    identity = identity_of(folder)
    return identity[0] if identity else None


def _same_file(before: FileStat, after: FileStat) -> bool:
    """The rename itself moves the ctime, and nothing else."""
    return (before.device, before.inode, before.size_bytes, before.mtime_ns, before.mode) == (
        after.device,
        after.inode,
        after.size_bytes,
        after.mtime_ns,
        after.mode,
    )


def _shown(priority: Priority, name: str) -> str:
    prefix = "" if priority is Priority.NORMAL else f"{priority.value}/"
    return prefix + escape(name)
