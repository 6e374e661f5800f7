"""JobStore: every job and every move of a job, in one SQLite file.

A job is one row: the columns that queries need, and the whole value as JSON. `transition` is the only way to move a
job; it compares the state first and writes the event in the same transaction, so that two processes cannot both win,
and a crash leaves either both or neither. WAL with synchronous=FULL: what returned is on disk.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from daemon.errors import NotFound, StoreError
from daemon.job import FINAL_STATES, TRANSITIONS, Event, Job, JobState, from_json, to_json, utc_now
from guard.atomic import fsync_dir

SCHEMA_VERSION = 1
BUSY_TIMEOUT_MS = 10_000  # a reader's checkpoint or another command's write; far above either

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,      -- arrival
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    priority INTEGER NOT NULL,                  -- 0 runs first
    not_before REAL NOT NULL,                   -- seconds since the epoch
    digest TEXT,                                -- of the dataset, once it is known
    source_inode INTEGER NOT NULL,
    body TEXT NOT NULL                          -- the Job as ASCII JSON
);
CREATE INDEX jobs_queue ON jobs (state, priority, seq);
CREATE INDEX jobs_digest ON jobs (digest) WHERE digest IS NOT NULL;
CREATE INDEX jobs_inode ON jobs (source_inode);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id TEXT NOT NULL,
    at TEXT NOT NULL,
    old TEXT,
    new TEXT NOT NULL,
    reason TEXT NOT NULL                        -- as ASCII JSON: reasons may quote file names of any bytes
);
CREATE INDEX events_job ON events (job_id, seq);
"""


class TransitionRefused(StoreError):
    """The job is not in the state that the caller saw, or the move is not in the table."""


class JobStore:
    """Open `path`, creating it if it is missing. One instance belongs to one thread; processes may share the file.

    Raises StoreError when the file is not a store or belongs to a newer version; the file is then left as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=BUSY_TIMEOUT_MS / 1000)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._create_or_check()
        except sqlite3.Error as error:
            raise StoreError(
                operation="open the job store",
                subject=path,
                cause=str(error),
                hint="it was left as it is; move it aside by hand to start with an empty queue",
            ) from error

    def close(self) -> None:
        """Close the file; every transaction has been written already."""
        self._db.close()

    def add(self, job: Job) -> Job:
        """Record a new job with its first event. Raises StoreError if its id exists."""
        stamped = replace(job, created_at=job.created_at or utc_now(), updated_at=utc_now())
        with self._transaction():
            self._db.execute(
                "INSERT INTO jobs (id, state, priority, not_before, digest, source_inode, body)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (stamped.id, *_columns(stamped)),
            )
            self._record(stamped.id, None, stamped.state, stamped.reason)
        return stamped

    def transition(self, job_id: str, expected: JobState, to: JobState, reason: str, **fields: Any) -> Job:
        """Move a job and set `fields` with it, if it is in `expected`; returns the job as it is now.

        Raises TransitionRefused when the job is elsewhere or the move is not in TRANSITIONS, NotFound when there is no
        such job.
        """
        with self._transaction():
            job = self.get(job_id)
            if job.state is not expected or to not in TRANSITIONS[expected]:
                raise TransitionRefused(
                    operation=f"move job {job_id} from {expected} to {to}",
                    cause=f"it is {job.state}" if job.state is not expected else "there is no such move",
                )
            moved = replace(job, state=to, reason=reason, updated_at=utc_now(), **fields)
            self._write(moved)
            self._record(job_id, expected, to, reason)
        return moved

    def update(self, job_id: str, **fields: Any) -> Job:
        """Set fields other than the state."""
        if "state" in fields:
            raise ValueError("a state changes by transition alone")
        with self._transaction():
            job = replace(self.get(job_id), updated_at=utc_now(), **fields)
            self._write(job)
        return job

    def claim_next(self, now: float) -> Job | None:
        """Move the first queued job whose time has come to running, as its next attempt; None when there is none.

        `now` is seconds since the epoch, against which `not_before` counts.
        """
        with self._transaction():
            row = self._db.execute(
                "SELECT body FROM jobs WHERE state = ? AND not_before <= ? ORDER BY priority, seq LIMIT 1",
                (JobState.QUEUED, now),
            ).fetchone()
            if row is None:
                return None
            job = from_json(row[0], Job)
            attempt = job.attempt + 1
            moved = replace(
                job,
                state=JobState.RUNNING,
                attempt=attempt,
                step_at_launch=job.max_step,
                reason=f"attempt {attempt}",
                started_at=utc_now(),
                updated_at=utc_now(),
            )
            self._write(moved)
            self._record(job.id, JobState.QUEUED, JobState.RUNNING, moved.reason)
        return moved

    def get(self, job_id: str) -> Job:
        """The job. Raises NotFound."""
        row = self._db.execute("SELECT body FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise NotFound(operation="find job", subject=job_id, cause="there is no such job", hint="`dropforge jobs`")
        return from_json(row[0], Job)

    def find(self, text: str) -> Job:
        """The one job whose id begins or ends with `text`. Raises NotFound when there is none or more than one."""
        rows = self._db.execute(
            "SELECT body FROM jobs WHERE id = ?1 OR substr(id, 1, length(?1)) = ?1 OR substr(id, -length(?1)) = ?1"
            " LIMIT 2",
            (text,),
        ).fetchall()
        if len(rows) == 1:
            return from_json(rows[0][0], Job)
        cause = "there is no such job" if not rows else "more than one job matches"
        raise NotFound(operation="find job", subject=text, cause=cause, hint="`dropforge jobs` lists their ids")

    def jobs(self, states: Collection[JobState] | None = None, *, limit: int = -1, newest: bool = False) -> list[Job]:
        """Jobs in order of arrival (or newest first), of the given states or all."""
        wanted = list(states) if states is not None else list(JobState)
        rows = self._db.execute(
            f"SELECT body FROM jobs WHERE state IN ({', '.join('?' * len(wanted))})"  # noqa: S608  only question marks
            f" ORDER BY seq {'DESC' if newest else 'ASC'} LIMIT ?",
            (*wanted, limit),
        ).fetchall()
        return [from_json(row[0], Job) for row in rows]

    def recent(self, limit: int) -> list[Job]:
        """The jobs that came to their end last, newest end first."""
        rows = self._db.execute(
            f"SELECT job_id FROM events WHERE new IN ({', '.join('?' * len(FINAL_STATES))})"  # noqa: S608  likewise
            " ORDER BY seq DESC LIMIT ?",
            (*FINAL_STATES, limit * 4),  # a job that was retried has more than one end
        ).fetchall()
        jobs = [self.get(job_id) for job_id in dict.fromkeys(job_id for (job_id,) in rows)]
        return [job for job in jobs if job.state in FINAL_STATES][:limit]

    def queue(self, *, limit: int = -1) -> list[Job]:
        """Queued jobs in the order in which they will run."""
        rows = self._db.execute(
            "SELECT body FROM jobs WHERE state = ? ORDER BY priority, seq LIMIT ?", (JobState.QUEUED, limit)
        ).fetchall()
        return [from_json(row[0], Job) for row in rows]

    def counts(self) -> dict[str, int]:
        """Number of jobs by state; every state is named."""
        found = dict(self._db.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())
        return {state.value: found.get(state.value, 0) for state in JobState}

    def with_digest(self, digest: str, states: Collection[JobState]) -> list[Job]:
        """Jobs over the same content, in order of arrival."""
        rows = self._db.execute("SELECT body FROM jobs WHERE digest = ? ORDER BY seq", (digest,)).fetchall()
        return [job for job in (from_json(row[0], Job) for row in rows) if job.state in states]

    def with_inode(self, inode: int) -> list[Job]:
        """Jobs whose file had this inode when it was dropped, in order of arrival."""
        rows = self._db.execute("SELECT body FROM jobs WHERE source_inode = ? ORDER BY seq", (inode,)).fetchall()
        return [from_json(row[0], Job) for row in rows]

    def events(self, job_id: str) -> list[Event]:
        """Every move of a job, oldest first."""
        rows = self._db.execute(
            "SELECT at, old, new, reason FROM events WHERE job_id = ? ORDER BY seq", (job_id,)
        ).fetchall()
        return [
            Event(at=at, job_id=job_id, old=old, new=new, reason=from_json(reason, str))
            for at, old, new, reason in rows
        ]

    def _create_or_check(self) -> None:
        with self._transaction():
            tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not tables:
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO meta VALUES ('schema_version', ?)", (str(SCHEMA_VERSION),))
                fsync_dir(self.path.parent)
                return
            if "meta" not in tables:
                raise sqlite3.DatabaseError("it is a database, but not a job store")
            row = self._db.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
            if row is None or int(row[0]) != SCHEMA_VERSION:
                found = row[0] if row else "missing"
                raise sqlite3.DatabaseError(f"its schema version is {found}, this program knows {SCHEMA_VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise StoreError(operation="write the job store", subject=self.path, cause=str(error)) from error

    def _write(self, job: Job) -> None:
        self._db.execute(
            "UPDATE jobs SET state = ?, priority = ?, not_before = ?, digest = ?, source_inode = ?, body = ?"
            " WHERE id = ?",
            (*_columns(job), job.id),
        )

    def _record(self, job_id: str, old: JobState | None, new: JobState, reason: str) -> None:
        self._db.execute(
            "INSERT INTO events (job_id, at, old, new, reason) VALUES (?, ?, ?, ?, ?)",
            (job_id, utc_now(), old, new, to_json(reason)),
        )


def _columns(job: Job) -> tuple[str, int, float, str | None, int, str]:
    """What `_SCHEMA` keeps beside the body, in its order, then the body."""
    digest = job.dataset.digest if job.dataset else None
    return job.state.value, job.priority.rank, job.not_before, digest, job.source_inode, to_json(job)
