"""When a dropped file is settled: a pure decision from what was observed and when, on our own clock.

No decision uses a file's times as a point in time (copies keep old ones, clocks jump); they only tell that something
changed between two observations.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from daemon.config import InboxSettings
from daemon.dataset.source import COMPRESSIONS, kind_of_mode
from daemon.inbox.watcher import NameEvents
from daemon.job import Priority


@dataclass(frozen=True, slots=True)
class FileStat:
    """What lstat says of a file. Two that are equal: nothing changed in between."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    mode: int

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
        )

    @property
    def kind(self) -> str | None:
        """What it is when it is not a regular file."""
        return kind_of_mode(self.mode)

    def same_content(self, other: FileStat) -> bool:
        """Whether nothing but the ctime differs, which a rename changes."""
        return replace(self, ctime_ns=0) == replace(other, ctime_ns=0)


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
    must_settle: bool = False  # its writer was seen to come back
    came_back: bool = False  # a file of this name was taken at its first close a moment before
    writer_asked_at: float = float("-inf")  # when /proc was searched for its writer
    reason: str = ""  # why it is not taken
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
            self.closes, self.renamed_in, self.must_settle = 0, False, False
        self.stat = stat
        self.unchanged_since = now

    def add_events(self, events: NameEvents, now: float) -> None:
        """Record events of the name."""
        self.last_event_at = now
        self.closes += events.closes
        self.renamed_in |= events.renamed_in
        # A writer that closes and opens again may do so once more: only stillness shows that it is done.
        self.must_settle |= self.closes > 1


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
    if still >= settings.settle_seconds and not (stat.size_bytes == 0 and still < 2 * settings.settle_seconds):
        return Settled(f"unchanged for {still:.1f} s", whole_only=False)
    until_settled = settings.settle_seconds - still
    reason = f"settling: it changed {still:.1f} s ago"
    if stat.size_bytes == 0:
        return Wait("settling: it is empty", max(0.0, until_settled + settings.settle_seconds))
    if _may_be_quick(candidate, settings):
        quiet = now - max(candidate.unchanged_since, candidate.last_event_at or now)
        if quiet >= settings.quiet_seconds:
            how = "renamed in" if candidate.renamed_in else "closed by its writer"
            return Settled(f"{how}, and whole", whole_only=True)
        return Wait(reason, min(until_settled, settings.quiet_seconds - quiet))
    return Wait(reason, until_settled)


def _may_be_quick(candidate: Candidate, settings: InboxSettings) -> bool:
    if candidate.last_event_at is None or candidate.must_settle:
        return False  # found by a scan: its writer may go on
    if candidate.name.lower().endswith(tuple(COMPRESSIONS)):
        return False  # the end of a compressed file does not show that it is whole
    return candidate.renamed_in or settings.take_on_close
