"""When a dropped file is settled: a pure decision from what was observed and when, on our own clock.

No decision uses a file's times as a point in time (copies keep old ones, clocks jump); they only tell that something
changed between two observations, and beside one another that a copy kept its source's time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from daemon.config import InboxSettings
from daemon.dataset.source import COMPRESSIONS, kind_of_mode
from daemon.inbox.watcher import NameEvents
from daemon.job import Priority

# Patience, in settle_seconds: with a file of one line, which may be the first of many, and with any file at most.
SINGLE_LINE_PATIENCE, LONGEST_PATIENCE = 5.0, 10.0
KEPT_TIME_NS = 4_000_000_000  # between mtime and ctime; less may be a change of mode, or a coarse clock
PAUSES = 3.0  # a file must stay the same for so many of the longest pauses that its writer made


@dataclass(frozen=True, slots=True)
class FileStat:
    """What lstat says of a file. Two that are equal: nothing changed in between."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    mode: int
    owner: int  # user id

    @classmethod
    def of(cls, found: object) -> FileStat:
        """Make one from an os.stat_result."""
        return cls(
            found.st_dev,  # type: ignore[attr-defined]
            found.st_ino,  # type: ignore[attr-defined]
            found.st_size,  # type: ignore[attr-defined]
            found.st_mtime_ns,  # type: ignore[attr-defined]
            found.st_ctime_ns,  # type: ignore[attr-defined]
            found.st_mode,  # type: ignore[attr-defined]
            found.st_uid,  # type: ignore[attr-defined]
        )

    @property
    def kind(self) -> str | None:
        """What it is when it is not a regular file."""
        return kind_of_mode(self.mode)

    @property
    def kept_its_time(self) -> bool:
        """Whether its mtime was set to an earlier one, as `cp -p`, `mv` and their like do last.

        Who appends writes mtime and ctime alike.
        """
        return self.ctime_ns - self.mtime_ns >= KEPT_TIME_NS

    def same_content(self, other: FileStat) -> bool:
        """Whether nothing but the ctime differs, which a rename changes."""
        return replace(self, ctime_ns=0) == replace(other, ctime_ns=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlierClaim:
    """The claim of a file whose name has come again."""

    job_id: str
    claimed_at: float  # on our monotonic clock
    changed_at: float  # when it was seen to change for the last time, likewise
    owner: int  # user id


@dataclass(slots=True)
class Candidate:
    """A name in the inbox that may become a job, and what is known of it. Times are of our monotonic clock."""

    priority: Priority  # of the folder that it lies in
    name: str
    first_seen: float
    since: str  # the same moment by the wall clock
    stat: FileStat | None = None
    unchanged_since: float = 0.0
    last_event_at: float | None = None  # of the latest event
    closes: int = 0  # events of this inode
    renamed_in: bool = False
    closed_at: float | None = None  # of the latest close
    must_settle: bool = False  # its writer was seen to come back
    longest_pause: float = 0.0  # between its writer's visits, as far as they were heard of
    single_line: bool = False  # so may be the first of many: writers that append a line at a time begin so
    continues: EarlierClaim | None = None  # a file of this name was taken not long before
    writer_asked_at: float = float("-inf")  # when /proc was searched for its writer
    reason: str = ""  # why it is not taken
    unreadable: bool = False  # it could not be opened; it is taken when it can
    due: float = 0.0  # when to examine it again
    failed_claims: int = 0
    settled: bool = False  # it waits for a place in the queue only

    key: tuple[Priority, str] = field(init=False)  # folder and name; one object for all tables

    def __post_init__(self) -> None:
        self.key = (self.priority, self.name)

    def observe(self, stat: FileStat, now: float) -> None:
        """Record what lstat says now; whatever changed starts the clock again."""
        if stat == self.stat:
            return
        if self.stat is not None and stat.inode != self.stat.inode:
            self.closes, self.closed_at, self.renamed_in, self.must_settle = 0, None, False, False
            self.longest_pause = 0.0
        if self.continues is not None and stat.owner != self.continues.owner:  # another user's, of the same name
            self.continues, self.must_settle, self.longest_pause = None, False, 0.0
        self.stat = stat
        self.single_line = False  # not looked at yet
        self.unchanged_since = now

    def add_events(self, events: NameEvents, now: float) -> None:
        """Record events of the name."""
        self.last_event_at = now
        if events.closes:
            if self.closed_at is not None:
                self.longest_pause = max(self.longest_pause, now - self.closed_at)
            self.closed_at = now
        self.closes += events.closes
        self.renamed_in |= events.renamed_in
        # A writer that closes and opens again may do so once more: only stillness shows that it is done.
        self.must_settle |= self.closes > 1

    def follow(self, earlier: EarlierClaim, now: float, settings: InboxSettings) -> None:
        """Record that a file of this name was taken before: its writer may go on under the same name."""
        self.continues = earlier
        pause = now - earlier.changed_at
        if pause <= LONGEST_PATIENCE * settings.settle_seconds:
            self.must_settle, self.longest_pause = True, pause

    @property
    def continued_job(self) -> str | None:
        """The job whose file this one goes on with, as far as can be told: it came soon, or with one line again."""
        if self.continues is None or self.renamed_in or not (self.must_settle or self.single_line):
            return None
        return self.continues.job_id


@dataclass(frozen=True)
class Wait:
    """Not settled: why, and how many seconds until it may be."""

    reason: str
    seconds: float


@dataclass(frozen=True)
class Settled:
    """Still for long enough. `whole_only`: it must also end in a newline and have no writer."""

    reason: str
    whole_only: bool


def decide(candidate: Candidate, now: float, settings: InboxSettings) -> Wait | Settled:
    """Decide whether the file has been still for long enough."""
    stat = candidate.stat
    if stat is None:
        return Wait("not examined yet", 0.0)
    still = now - candidate.unchanged_since
    until_settled = required_stillness(candidate, settings) - still
    if until_settled <= 0:
        return Settled(f"unchanged for {still:.1f} s", whole_only=False)
    if stat.size_bytes == 0:
        return Wait("settling: it is empty", until_settled)
    reason = _why_settling(candidate, still, now)
    if _may_be_quick(candidate, settings):
        quiet = now - max(candidate.unchanged_since, candidate.last_event_at or now)
        if quiet >= settings.quiet_seconds:
            how = "renamed in" if candidate.renamed_in else "closed by its writer"
            return Settled(f"{how}, and whole", whole_only=True)
        return Wait(reason, min(until_settled, settings.quiet_seconds - quiet))
    return Wait(reason, until_settled)


def required_stillness(candidate: Candidate, settings: InboxSettings) -> float:
    """Return how many seconds a file must stay the same before it is taken.

    A writer that was seen to pause may pause as long again, and twice as long when its machine is busy.
    """
    factor = 1.0
    if candidate.stat is not None and candidate.stat.size_bytes == 0:
        factor = 2.0
    elif candidate.single_line:
        factor = SINGLE_LINE_PATIENCE
    most = LONGEST_PATIENCE * settings.settle_seconds
    return max(factor * settings.settle_seconds, min(most, PAUSES * candidate.longest_pause))


def _why_settling(candidate: Candidate, still: float, now: float) -> str:
    if candidate.continues is not None and candidate.must_settle:
        ago = now - candidate.continues.claimed_at
        return f"settling: rows came after job {candidate.continues.job_id} took this name {ago:.0f} s ago"
    if candidate.single_line:
        return f"settling: it has one line, and changed {still:.1f} s ago; renamed in, it would be taken at once"
    return f"settling: it changed {still:.1f} s ago"


def _may_be_quick(candidate: Candidate, settings: InboxSettings) -> bool:
    if candidate.last_event_at is None or candidate.must_settle or candidate.single_line:
        return False  # found by a scan, or its writer may go on
    if candidate.name.lower().endswith(tuple(COMPRESSIONS)):
        return False  # the end of a compressed file does not show that it is whole
    return candidate.renamed_in or settings.take_on_close
