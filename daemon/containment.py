"""Containment: what one job or dropped file does to the daemon stays with that job or file, and the daemon lives.

An error that nobody foresaw is met once more, then the job or file is given up. The same for a sudden end of the daemon, which
`daemon.in_hand` tells of: twice in a row in one step over one job or file, and the next start fails the job, or moves the
file aside. A kill that came by chance rarely meets the same step again before it was done.
"""

from __future__ import annotations

import time
from typing import Any

from daemon.errors import NotFound, StoreError, Unexpected
from daemon.holds import Hold, HoldKind
from daemon.in_hand import InHand, SuddenEnd
from daemon.inbox.intake import Intake
from daemon.job import FINAL_STATES, FailureKind, JobState
from daemon.left_alone import LeftAlone
from daemon.scheduler import Scheduler
from daemon.store import JobStore
from daemon.text import escape

MOST_STRIKES = 2  # unexpected errors in a row before a job or a file is given up
STRIKE_SECONDS = 600.0  # errors that lie further apart are not in a row
MOST_ENDS = 2  # daemons in a row that ended in one step over one job or file, before that is given up
MOST_LIVES = 4  # likewise, in whatever steps; below the five starts that systemd allows


class Containment:
    """Counts what jobs and files do to the daemon, and gives them up. One thread calls everything."""

    def __init__(self, in_hand: InHand, log: Any) -> None:
        self._in_hand = in_hand
        self._log = log
        self._strikes: dict[str, tuple[int, float]] = {}  # by subject: errors in a row, and when the last came
        self._last_error = ""
        self._end: SuddenEnd | None = None  # of the daemon before this one, until it is dealt with
        self._store: JobStore | None = None
        self._scheduler: Scheduler | None = None
        self._intake: Intake | None = None
        self._left_alone = LeftAlone()

    def attach(self, store: JobStore, scheduler: Scheduler, intake: Intake, left_alone: LeftAlone) -> None:
        """Take the parts through which a job or file is given up."""
        self._store, self._scheduler, self._intake, self._left_alone = store, scheduler, intake, left_alone
        end = self._end
        if end is not None and end.file is not None and _is_final(end):  # until it can be settled
            intake.set_aside(end.file, _reason_of(end))

    # -- unexpected errors

    def contain(self, error: Unexpected) -> Hold | None:
        """Count an unexpected error: its job or file is tried once more, and the second time in a row given up.

        Returns the hold of an error that belongs to no file and no job, or of one that cannot be given up.
        """
        subject = error.job or (_shown(error.file) if error.file else "")
        now = time.monotonic()
        strikes, since = self._strikes.get(subject, (0, now))
        strikes = strikes + 1 if now - since < STRIKE_SECONDS else 1
        self._strikes[subject] = strikes, now
        if str(error) != self._last_error:
            cause = error.__cause__
            self._log.error(
                "unexpected.raised", step=error.step, job=error.job, file=escape(error.file[1] if error.file else ""),
                error=f"{type(cause).__name__}: {cause}", times=strikes, exc_info=cause,
            )  # fmt: skip
        self._last_error = str(error)
        what = f"job {error.job}" if error.job else f"the file {escape(subject)}" if subject else "the daemon"
        told = f"{what} met {error}"
        if not subject or strikes > MOST_STRIKES:
            return Hold(kind=HoldKind.INTERNAL, reason=f"{told}; it is tried again, and the log has the traceback")
        if strikes == MOST_STRIKES:
            self._give_up(error, f"{error}, twice in a row; it is this program's fault, and the log has the traceback")
        return None

    def contain_start(self, error: Exception) -> Hold:
        """Return the hold of a start that met an unexpected error."""
        unexpected = Unexpected("started", job="", file=None, cause=error)
        return self.contain(unexpected) or Hold(kind=HoldKind.INTERNAL, reason=str(unexpected))

    def _give_up(self, error: Unexpected, reason: str) -> None:
        """Fail a job, or leave a dropped file alone, that this program cannot handle."""
        if self._scheduler is None or self._intake is None:
            return
        try:
            if error.job:
                self._scheduler.quarantine(error.job, reason)
            elif error.file is not None:
                self._intake.set_aside(error.file, reason)
                self._log.error("file.quarantined", file=escape(error.file[1]), reason=reason)
        except (StoreError, OSError) as failure:  # the next time is the third, and holds
            self._log.error("unexpected.not_given_up", job=error.job, error=str(failure))
        except Exception as failure:
            self._log.error("unexpected.not_given_up", job=error.job, error=repr(failure), exc_info=failure)

    # -- sudden ends

    def note_end(self, end: SuddenEnd | None) -> None:
        """Tell over what the daemon before this one ended; `settle_end` acts on it."""
        if end is None:
            return
        self._end = end
        self._log.error(
            "daemon.ended_suddenly", step=end.step, job=end.job, file=escape(end.file[1] if end.file else ""),
            times=end.lives,
        )  # fmt: skip

    def settle_end(self) -> None:
        """Give up what daemons ended over, twice in a row, before anything else touches it.

        One over which the daemon ended again, while it was given up, is recorded and left where it lies. Raises StoreError,
        OSError.
        """
        end = self._end
        if end is not None and _is_final(end):
            self._in_hand.giving_up = True
            try:
                with self._in_hand.noted("given up", job=end.job, file=end.file):
                    self._settle_or_bare(end)
            finally:
                self._in_hand.giving_up = False
        self._end = None

    def _settle_or_bare(self, end: SuddenEnd) -> None:
        try:
            self._settle(end, barely=end.giving_up)
        except (StoreError, OSError):
            raise
        except Exception as failure:
            self._log.error("unexpected.not_given_up", job=end.job, error=repr(failure), exc_info=failure)
            self._settle(end, barely=True)

    def _settle(self, end: SuddenEnd, *, barely: bool) -> None:
        """Give up a job or file; `barely`: without its reports and moves, over which the daemon died."""
        reason = _reason_of(end)
        if end.job:
            self._give_up_job(end.job, reason, barely=barely)
        elif end.file is not None and self._intake is not None:
            if barely or not self._intake.take_out(end.file, reason):
                inode = self._intake.set_aside(end.file, reason)
                self._left_alone.add_file((*end.file, inode))
            self._log.error("file.quarantined", file=escape(end.file[1]), reason=reason)

    def _give_up_job(self, job_id: str, reason: str, *, barely: bool) -> None:
        if self._store is None or self._scheduler is None:
            return
        try:
            job = self._store.get(job_id)
        except NotFound:  # a folder in processing/ without a row
            self._left_alone.add_job(job_id)
        else:
            if not barely and job.state not in FINAL_STATES:
                self._scheduler.quarantine(job_id, reason)
                return
            if job.state not in FINAL_STATES:
                self._scheduler.end_trainer(job)
                job = self._store.finish(job_id, job.state, JobState.FAILED, reason, failure=FailureKind.INTERNAL)
            self._left_alone.add_job(job_id, job.updated_at)
        self._log.error("job.quarantined", job=job_id, reason=reason)


def _is_final(end: SuddenEnd) -> bool:
    """Whether a job or file has ended as many daemons as it may. One that ended one while it was given up has."""
    return bool(end.job or end.file) and (end.giving_up or end.times >= MOST_ENDS or end.lives >= MOST_LIVES)


def _reason_of(end: SuddenEnd) -> str:
    return (
        f"the daemon ended without a word, {end.lives} times in a row, while this was {end.step}: it crashed, or was killed"
        " by the watchdog, for want of memory, or by a person"
    )


def _shown(file: tuple[str, str]) -> str:
    return f"{file[0]}/{file[1]}"
