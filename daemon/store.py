"""JobStore: every job and every transition of a job, in one SQLite file.

A job is one row: the columns that queries need, and the whole value as JSON. `transition` is the only way to change a
job's state; it compares the state first and records the transition in the same transaction, so that of two processes
one wins, and a crash leaves both or neither. WAL with synchronous=FULL: what returned is on disk.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from daemon.errors import NotFound, StoreError
from daemon.job import (
    DUPLICATE,
    FINAL_STATES,
    LONGEST_BACKOFF_SECONDS,
    TRANSITIONS,
    Job,
    JobState,
    JobTransition,
    Priority,
    from_json,
    to_json,
    utc_now,
)
from guard.atomic import fsync_dir, make_folder_durable

BUSY_SECONDS = 10.0  # how long a lock is waited for: a checkpoint or another command's write is far shorter

# One script a version, from nothing to the newest; a script that was released is never changed.
_MIGRATIONS = (
    """
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
    CREATE INDEX events_job ON events (job_id, seq)
    """,
    # A history of a million jobs must not slow down what is asked each second: counts are kept, not counted. The queue
    # can be reordered, and what was asked of it (pause, cancel) outlives every process.
    """
    ALTER TABLE jobs ADD COLUMN position INTEGER NOT NULL DEFAULT 0;  -- within a priority; smaller runs earlier
    DROP INDEX jobs_queue;
    CREATE INDEX jobs_queue ON jobs (state, priority, position, seq);
    CREATE TABLE counts (state TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID;
    INSERT INTO counts SELECT state, count(*) FROM jobs GROUP BY state;
    CREATE TABLE controls (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID
    """,
    # A run that has sealed checkpoints goes on before anything else is launched: another run would clear them.
    """
    ALTER TABLE jobs ADD COLUMN begun INTEGER NOT NULL DEFAULT 0;     -- 1: its checkpoints lie in the model directory
    UPDATE jobs SET begun = 1 WHERE state IN ('queued', 'running') AND json_extract(body, '$.max_step') > 0;
    DROP INDEX jobs_queue;
    CREATE INDEX jobs_queue ON jobs (state, begun DESC, priority, position, seq)
    """,
    # Owners take turns: thousands of files of one do not stand before one file of another.
    """
    ALTER TABLE jobs ADD COLUMN owner INTEGER;                        -- user id of the file; NULL: not known
    ALTER TABLE jobs ADD COLUMN turn INTEGER NOT NULL DEFAULT 0;      -- within a position; smaller runs earlier
    DROP INDEX jobs_queue;
    CREATE INDEX jobs_queue ON jobs (state, begun DESC, priority, position, turn, seq);
    CREATE INDEX jobs_owner ON jobs (state, owner)
    """,
    # A dataset that was trained before was cancelled by nobody: it is counted apart.
    """
    INSERT INTO counts SELECT 'duplicate', count(*) FROM jobs
        WHERE state = 'cancelled' AND json_extract(body, '$.duplicate_of') IS NOT NULL;
    UPDATE counts SET number = number - (SELECT number FROM counts WHERE state = 'duplicate') WHERE state = 'cancelled'
    """,
)
SCHEMA_VERSION = len(_MIGRATIONS)
# Errors that say nothing of the file: a store is not set aside because a disk was full for a moment.
_PASSING = frozenset(
    {
        sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_AUTH,
    }
)  # fmt: skip
# Errors that only a damaged file gives, or one whose tables are gone: our own statements are right.
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR})
_QUEUE_ORDER = "ORDER BY begun DESC, priority, position, turn, seq"


class NewerStore(StoreError):
    """The store was written by a newer version of this program."""


class OlderStore(StoreError):
    """The store was written by an older version, and who reads it may not bring it forward."""


class BrokenStore(StoreError):
    """The file is not a store, or is damaged."""


class TransitionRefused(StoreError):
    """The job is in another state than the caller saw, or the transition is not in TRANSITIONS."""

    is_of_machine = False


def is_made(path: Path) -> bool:
    """Whether there is a store, for those who make none: to open one that was emptied would make its loss look sound."""
    return path.exists() and path.stat().st_size > 0


def open_for_reading(path: Path) -> JobStore:
    """Open a store for who only reads it: without writing, where this account may not. Raises as JobStore does."""
    may_write = os.access(path, os.R_OK | os.W_OK) and os.access(path.parent, os.W_OK | os.X_OK)
    return JobStore(path, read_only=not may_write)


def _read_only_uri(path: Path) -> str:
    """Without a log beside it nobody has the store open, and what reads it needs no file of its own there."""
    is_closed = not path.with_name(f"{path.name}-wal").exists()
    return f"{path.absolute().as_uri()}?{'immutable=1' if is_closed else 'mode=ro'}"


class JobStore:
    """Open `path`, creating it if it is missing. One instance belongs to one thread; processes may share the file.

    Raises NewerStore when it belongs to a newer version, BrokenStore when it is not a store or (with `check`, which
    reads it whole) damaged; the file is then left as it is.
    """

    def __init__(
        self, path: Path, *, check: bool = False, busy_seconds: float = BUSY_SECONDS, read_only: bool = False
    ) -> None:
        """With `read_only`, nothing is made or changed, and a store of an older version is refused with StoreError."""
        self.path = path
        if not read_only:
            make_folder_durable(path.parent)
        try:
            if read_only:
                self._db = sqlite3.connect(_read_only_uri(path), uri=True, isolation_level=None, timeout=busy_seconds)
                self._require_current_schema()
            else:
                self._db = sqlite3.connect(path, isolation_level=None, timeout=busy_seconds)
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
                self._migrate()
            if check and (found := self._db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(found)
        except (NewerStore, OlderStore):
            self._db.close()
            raise
        except (sqlite3.Error, StoreError) as error:
            if "_db" in vars(self):
                self._db.close()
            passing = _may_pass(error)
            raise (StoreError if passing else BrokenStore)(
                operation="open the job store",
                subject=path,
                cause=error.cause if isinstance(error, StoreError) else str(error),
                hint="it was left as it is: another process holds it, the disk has no room or fails, or this user may not"
                " write there; try again when that is mended"
                if passing
                else "it was left as it is; `dropforge run` sets it aside and rebuilds the queue from the folders",
            ) from error

    def close(self) -> None:
        """Close the file; every transaction is on disk already."""
        self._db.close()

    def copy_to(self, path: Path) -> None:
        """Copy everything, as of one moment, while others read and write. Raises StoreError."""
        try:
            target = sqlite3.connect(path)
            try:
                self._db.backup(target)
            finally:
                target.close()
        except sqlite3.Error as error:
            raise StoreError(operation="copy the job store to", subject=path, cause=str(error)) from error

    def add(self, job: Job) -> Job:
        """Add a new job with its first transition. Raises StoreError if its id exists."""
        stamped = replace(job, created_at=job.created_at or utc_now(), updated_at=utc_now())
        with self._transaction():
            self._db.execute(
                "INSERT INTO jobs (id, state, begun, priority, position, turn, owner, not_before, digest, source_inode, body)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (stamped.id, *_columns(stamped)),
            )
            self._count(stamped, 1)
            self._record(stamped.id, None, stamped.state, stamped.reason)
        return stamped

    def transition(self, job_id: str, expected: JobState, to: JobState, reason: str, **fields: Any) -> Job:
        """Change a job's state, and set `fields`, if it is in `expected`.

        Returns the job as it is now. Raises TransitionRefused when it is in another state or the transition is not in
        TRANSITIONS, NotFound when there is no such job.
        """
        with self._transaction():
            job = self.get(job_id)
            if job.state is not expected or to not in TRANSITIONS[expected]:
                raise TransitionRefused(
                    operation=f"move job {job_id} from {expected} to {to}",
                    cause=f"it is {job.state}" if job.state is not expected else "there is no such transition",
                )
            moved = replace(job, state=to, reason=reason, updated_at=utc_now(), **fields)
            if to is JobState.QUEUED and expected is JobState.CLAIMED:  # what was interrupted keeps its turn
                moved = replace(moved, turn=self._next_turn(moved))
            self._write(moved)
            self._count(job, -1)
            self._count(moved, 1)
            self._record(job_id, expected, to, reason)
        return moved

    def finish(self, job_id: str, expected: JobState, to: JobState, reason: str, **fields: Any) -> Job:
        """End a job: change it to a final state, with the time. Raises as `transition` does.

        `daemon.inbox.archive.Archive.finish` moves its files as well.
        """
        if to not in FINAL_STATES:
            raise ValueError(f"{to} ends no job")
        return self.transition(job_id, expected, to, reason, **{"finished_at": utc_now(), **fields})

    def bring_forward(self, job: Job) -> Job:
        """Record what the folders prove of a job that this store does not know, or knows only an earlier state of.

        For recovery alone: it is the one move that TRANSITIONS does not hold. A job in a final state is left as it is.
        """
        with self._transaction():
            try:
                known = self.get(job.id)
            except NotFound:
                known = None
            if known is not None and known.state not in FINAL_STATES:
                moved = replace(
                    known,
                    state=job.state,
                    version=job.version,
                    reason=job.reason,
                    finished_at=job.finished_at or utc_now(),
                    updated_at=utc_now(),
                )
                self._write(moved)
                self._count(known, -1)
                self._count(moved, 1)
                self._record(job.id, known.state, moved.state, moved.reason)
                return moved
        return known or self.add(job)

    def update(self, job_id: str, *, expected: JobState | None = None, **fields: Any) -> Job:
        """Set fields other than the state.

        Raises TransitionRefused when the job is in another state than `expected`.
        """
        if "state" in fields:
            raise ValueError("a state changes by transition alone")
        with self._transaction():
            found = self.get(job_id)
            if expected is not None and found.state is not expected:
                raise TransitionRefused(operation=f"change job {job_id}", cause=f"it is {found.state}")
            job = replace(found, updated_at=utc_now(), **fields)
            self._write(job)
        return job

    def claim_next(self, now: float) -> Job | None:
        """Start the next attempt of the first queued job that is due.

        Returns None when there is none.

        `now` is seconds since the epoch, against which `not_before` counts.
        """
        with self._transaction():
            job = self.peek(now)
            if job is None:
                return None
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
            self._count(job, -1)
            self._count(moved, 1)
            self._record(job.id, JobState.QUEUED, JobState.RUNNING, moved.reason)
        return moved

    def peek(self, now: float) -> Job | None:
        """Return the job that `claim_next` would start.

        One that has sealed checkpoints is waited for while it backs off: another run would clear them. A
        back-off that ends later than any can be was written before the clock was set back; it counts as over.
        """
        rows = self._read(
            "SELECT body, due FROM"  # noqa: S608  likewise
            " (SELECT *, not_before <= ?2 OR not_before > ?2 + ?3 AS due FROM jobs WHERE state = ?1)"
            f" WHERE due OR begun {_QUEUE_ORDER} LIMIT 1",
            (JobState.QUEUED, now, LONGEST_BACKOFF_SECONDS),
        )
        return self._job(rows[0][0]) if rows and rows[0][1] else None

    def next_due(self, now: float) -> float | None:
        """Return when the next back-off ends, in seconds since the epoch; None without one."""
        ((found,),) = self._read(
            "SELECT min(not_before) FROM jobs WHERE state = ? AND not_before > ?", (JobState.QUEUED, now)
        )
        return float(found) if found is not None else None

    def get(self, job_id: str) -> Job:
        """Return the job. Raises NotFound."""
        rows = self._read("SELECT body FROM jobs WHERE id = ?", (job_id,))
        if not rows:
            raise NotFound(operation="find job", subject=job_id, cause="there is no such job", hint="`dropforge jobs`")
        return self._job(rows[0][0])

    def find(self, text: str) -> Job:
        """Return the one job whose id begins or ends with `text`; of "last", the newest.

        Raises NotFound when none or several do.
        """
        text = text.encode(errors="backslashreplace").decode()  # an argument of any bytes, of which no id has one
        rows = (
            self._read("SELECT body FROM jobs WHERE ?1 = 'last' ORDER BY seq DESC LIMIT 1", (text,))
            or self._read("SELECT body FROM jobs WHERE id >= ?1 AND id < ?1 || char(0x10FFFF) LIMIT 2", (text,))
            or self._read("SELECT body FROM jobs WHERE substr(id, -length(?1)) = ?1 LIMIT 2", (text,))
        )
        if len(rows) == 1:
            return self._job(rows[0][0])
        cause = "there is no such job" if not rows else "more than one job matches"
        raise NotFound(operation="find job", subject=text, cause=cause, hint="`dropforge jobs` lists their ids")

    def jobs(self, states: Collection[JobState] | None = None, *, limit: int = -1, newest: bool = False) -> list[Job]:
        """Return jobs in order of arrival (or newest first), of the given states or all."""
        order = f"ORDER BY seq {'DESC' if newest else 'ASC'} LIMIT ?"
        if states is None:
            rows = self._read(f"SELECT body FROM jobs {order}", (limit,))  # noqa: S608  no value in it
        else:
            marks = ", ".join("?" * len(states))
            rows = self._read(
                f"SELECT body FROM jobs WHERE state IN ({marks}) {order}",  # noqa: S608  only question marks
                (*states, limit),
            )
        return [self._job(body) for (body,) in rows]

    def recent(self, limit: int) -> list[Job]:
        """Return the jobs that ended last, newest first."""
        rows = self._read(
            f"SELECT job_id FROM events WHERE new IN ({', '.join('?' * len(FINAL_STATES))})"  # noqa: S608  likewise
            " ORDER BY seq DESC LIMIT ?",
            (*FINAL_STATES, limit * 4),  # a job that was retried has ended more than once
        )
        jobs = [self.get(job_id) for job_id in dict.fromkeys(job_id for (job_id,) in rows)]
        return [job for job in jobs if job.state in FINAL_STATES][:limit]

    def queue(self, *, limit: int = -1) -> list[Job]:
        """Return queued jobs in the order in which they will run."""
        rows = self._read(
            f"SELECT body FROM jobs WHERE state = ? {_QUEUE_ORDER} LIMIT ?",  # noqa: S608  likewise
            (JobState.QUEUED, limit),
        )
        return [self._job(body) for (body,) in rows]

    def waiting_by_owner(self) -> dict[int | None, int]:
        """Return how many claimed and queued jobs each owner has; None stands for those that are not known."""
        rows = self._db.execute(
            "SELECT owner, count(*) FROM jobs WHERE state IN (?, ?) GROUP BY owner", (JobState.CLAIMED, JobState.QUEUED)
        ).fetchall()
        return dict(rows)

    def counts(self) -> dict[str, int]:
        """Return the number of jobs by state, every state included, and those cancelled as duplicates apart."""
        found = dict(self._read("SELECT state, number FROM counts"))
        return {name: found.get(name, 0) for name in (*(state.value for state in JobState), DUPLICATE)}

    def with_digest(self, digest: str, states: Collection[JobState]) -> list[Job]:
        """Return jobs over the same content, in order of arrival."""
        rows = self._read("SELECT body FROM jobs WHERE digest = ? ORDER BY seq", (digest,))
        return [job for job in (self._job(body) for (body,) in rows) if job.state in states]

    def trained(self, digest: str) -> list[Job]:
        """Return the jobs that trained this content, the first one first."""
        return self.with_digest(digest, {JobState.SUCCEEDED})

    def with_inode(self, inode: int) -> list[Job]:
        """Return jobs whose file had this inode when it was dropped, in order of arrival."""
        rows = self._read("SELECT body FROM jobs WHERE source_inode = ? ORDER BY seq", (inode,))
        return [self._job(body) for (body,) in rows]

    def transitions(self, job_id: str) -> list[JobTransition]:
        """Return every transition of a job, oldest first."""
        rows = self._read("SELECT at, old, new, reason FROM events WHERE job_id = ? ORDER BY seq", (job_id,))
        return [
            JobTransition(at=at, job_id=job_id, old=old, new=new, reason=from_json(reason, str))
            for at, old, new, reason in rows
        ]

    def transitions_after(self, number: int, *, most: int = -1) -> list[tuple[int, JobTransition]]:
        """Return the transitions after the one of this number, each with its number, in order."""
        rows = self._read(
            "SELECT seq, job_id, at, old, new, reason FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (number, most)
        )
        return [
            (seq, JobTransition(at=at, job_id=job_id, old=old, new=new, reason=from_json(reason, str)))
            for seq, job_id, at, old, new, reason in rows
        ]

    def last_transition(self) -> int:
        """Return the number of the newest transition, 0 when there is none."""
        ((number,),) = self._read("SELECT coalesce(max(seq), 0) FROM events")
        return int(number)

    def control(self, key: str) -> Any:
        """Return the value under this key (`paused`: mode, time and reason); None when there is none."""
        rows = self._read("SELECT value FROM controls WHERE key = ?", (key,))
        return json.loads(rows[0][0]) if rows else None

    def set_control(self, key: str, value: Any) -> None:
        """Set the value under a key; None removes it."""
        with self._transaction():
            if value is None:
                self._db.execute("DELETE FROM controls WHERE key = ?", (key,))
            else:
                self._db.execute("INSERT OR REPLACE INTO controls VALUES (?, ?)", (key, json.dumps(value)))

    def reorder(self, job_id: str, *, first: bool = False, priority: Priority | None = None) -> Job:
        """Give a queued job another priority or, with `first`, the first place in it.

        Raises TransitionRefused when it is not queued.
        """
        with self._transaction():
            job = self.get(job_id)
            if job.state is not JobState.QUEUED:
                raise TransitionRefused(
                    operation=f"move job {job_id}",
                    cause=f"it is {job.state}",
                    hint="only queued jobs have a place to change",
                )
            if priority is not None:
                job = replace(job, priority=priority, position=0)
                job = replace(job, turn=self._next_turn(job))
            if first:
                least = self._db.execute(
                    "SELECT min(position) FROM jobs WHERE state = ? AND priority = ? AND id != ?",
                    (JobState.QUEUED, job.priority.rank, job_id),
                ).fetchone()[0]
                job = replace(job, position=(least or 0) - 1)
            job = replace(job, updated_at=utc_now())
            self._write(job)
        return job

    def data_version(self) -> int:
        """Return a number that differs when another process has written since the last call."""
        ((number,),) = self._read("PRAGMA data_version")
        return int(number)

    def revision(self) -> tuple[int, int]:
        """Return a value that differs when this or another process has written since the last call."""
        return self.data_version(), self._db.total_changes

    def prune(self, before: str, *, most: int = 1000) -> int:
        """Delete jobs that ended before `before` (ISO 8601), oldest first, at most about `most`.

        Returns how many. Their transitions go. The rows of trained jobs stay, so that old content is still recognised
        by its digest.
        """
        deleted = 0
        with self._transaction():
            oldest = self._db.execute("SELECT job_id, at FROM events ORDER BY seq LIMIT ?", (most * 5,)).fetchall()
            for job_id in dict.fromkeys(job_id for job_id, at in oldest if at < before):
                row = self._db.execute("SELECT body FROM jobs WHERE id = ?", (job_id,)).fetchone()
                job = from_json(row[0], Job) if row else None
                if job is not None and (job.state not in FINAL_STATES or job.updated_at >= before):
                    continue
                self._db.execute("DELETE FROM events WHERE job_id = ?", (job_id,))
                deleted += 1
                if job is not None and job.state is not JobState.SUCCEEDED:
                    self._db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
                    self._count(job, -1)
        return deleted

    def _schema_version(self) -> int | None:
        """Return the schema's version, at most SCHEMA_VERSION; None of an empty database. Raises NewerStore."""
        tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            return None
        if "meta" not in tables:
            raise sqlite3.DatabaseError("it is a database, but not a job store")
        row = self._db.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
        found = int(row[0]) if row else 0
        if found > SCHEMA_VERSION:
            raise NewerStore(
                operation="open the job store",
                subject=self.path,
                cause=f"its schema version is {found}, this program knows {SCHEMA_VERSION}",
                hint="it was left as it is; run the version of Dropforge that wrote it",
            )
        return found

    def _require_current_schema(self) -> None:
        if self._schema_version() != SCHEMA_VERSION:
            raise OlderStore(
                operation="read the job store",
                subject=self.path,
                cause="an older version of this program wrote it",
                hint="the daemon brings it forward when it starts",
            )

    def _migrate(self) -> None:
        """Bring the schema up to SCHEMA_VERSION, all in one transaction."""
        with self._transaction():
            version = self._schema_version()
            if version == SCHEMA_VERSION:
                return
            found = version or 0
            if version is None:
                self._db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
            for script in _MIGRATIONS[found:]:
                for statement in filter(str.strip, re.sub(r"--.*", "", script).split(";")):
                    self._db.execute(statement)
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('schema_version', ?)", (str(SCHEMA_VERSION),))
        fsync_dir(self.path.parent)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._roll_back()
                raise
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            raise self._failure("write", error) from error

    def _roll_back(self) -> None:
        """End an open transaction; SQLite may have done so by itself."""
        with suppress(sqlite3.Error):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def _read(self, sql: str, values: Collection[Any] = ()) -> list[Any]:
        """Return all rows of a query. Raises StoreError, BrokenStore."""
        try:
            return self._db.execute(sql, tuple(values)).fetchall()
        except sqlite3.Error as error:
            raise self._failure("read", error) from error

    def _job(self, body: str) -> Job:
        """Read a job's row. Raises BrokenStore when it was altered."""
        try:
            return from_json(body, Job)
        except ValueError as error:
            cause = f"the row of a job is damaged: {error}"
            raise BrokenStore(operation="read the job store", subject=self.path, cause=cause) from error

    def _failure(self, operation: str, error: sqlite3.Error) -> StoreError:
        """What an error of SQLite means for the file: damaged, or not to be used at this moment."""
        is_damaged = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_NOTADB) & 0xFF in _DAMAGED
        return (BrokenStore if is_damaged else StoreError)(
            operation=f"{operation} the job store", subject=self.path, cause=str(error)
        )

    def _next_turn(self, job: Job) -> int:
        """Return the turn of a job that joins the queue: the one that is being served, or after its owner's last."""
        first, own = self._db.execute(
            "SELECT min(turn), max(CASE WHEN owner IS ?1 THEN turn + 1 END) FROM jobs"
            " WHERE state = ?2 AND priority = ?3 AND position = ?4 AND id != ?5",
            (job.owner, JobState.QUEUED, job.priority.rank, job.position, job.id),
        ).fetchone()
        return max(first or 0, own or 0)

    def _write(self, job: Job) -> None:
        self._db.execute(
            "UPDATE jobs SET state = ?, begun = ?, priority = ?, position = ?, turn = ?, owner = ?, not_before = ?, digest = ?,"
            " source_inode = ?, body = ? WHERE id = ?",
            (*_columns(job), job.id),
        )

    def _count(self, job: Job, change: int) -> None:
        counted = DUPLICATE if job.is_duplicate else job.state
        self._db.execute(
            "INSERT INTO counts VALUES (?1, ?2) ON CONFLICT (state) DO UPDATE SET number = number + ?2",
            (counted, change),
        )

    def _record(self, job_id: str, old: JobState | None, new: JobState, reason: str) -> None:
        self._db.execute(
            "INSERT INTO events (job_id, at, old, new, reason) VALUES (?, ?, ?, ?, ?)",
            (job_id, utc_now(), old, new, to_json(reason)),
        )


def _may_pass(error: sqlite3.Error | StoreError) -> bool:
    """Whether an error (no room, no permission, a lock) may pass and says nothing of the file."""
    known = error if isinstance(error, sqlite3.Error) else error.__cause__
    code = getattr(known, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in _PASSING


def _columns(job: Job) -> tuple[str, bool, int, int, int, int | None, float, str | None, int, str]:
    """The values of the schema's columns, in its order."""
    digest = job.dataset.digest if job.dataset else None
    begun = job.max_step > 0
    order = (job.priority.rank, job.position, job.turn, job.owner, job.not_before)
    return job.state.value, begun, *order, digest, job.source_inode, to_json(job)
