"""Notices to people: which events are told, collected into one summary, and when that may be sent.

Values in, values out; `daemon/notice_sender.py` sends them.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from daemon.schedule import is_open, next_change, parse_hours

NoticeEvent = Literal["failed", "rejected", "held", "recovered", "succeeded"]
EVENTS: tuple[NoticeEvent, ...] = get_args(NoticeEvent)
MOST_LINES = 20  # of a summary; of more, the number
FIRST_SECONDS = 2.0  # what happens at one moment is one notice
RETRY_SECONDS = (60.0, 300.0, 1800.0, 3600.0)  # after a notice that nobody took; the last one from then on
GIVE_UP_SECONDS = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What people read."""

    title: str
    body: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was not sent yet. Times are seconds since the epoch."""

    counts: Mapping[str, int] = field(default_factory=dict)  # by event
    lines: tuple[str, ...] = ()  # the first MOST_LINES
    since: float = 0.0  # of the first event

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, event: str, line: str, now: float) -> Summary:
        """Return the summary with one more event."""
        return Summary(
            counts={**self.counts, event: self.counts.get(event, 0) + 1},
            lines=(*self.lines, line) if len(self.lines) < MOST_LINES else self.lines,
            since=self.since if self else now,
        )

    def merge(self, later: Summary) -> Summary:
        """Return one summary of both; this one came first."""
        events: set[str] = {*self.counts, *later.counts}
        return Summary(
            counts={event: self.counts.get(event, 0) + later.counts.get(event, 0) for event in events},
            lines=(*self.lines, *later.lines)[:MOST_LINES],
            since=self.since if self else later.since,
        )

    def compose(self, root: Path) -> Notice:
        """Return the notice. The title has no word that a dropper chose."""
        told = ", ".join(f"{self.counts[event]} {event}" for event in EVENTS if self.counts.get(event))
        more = sum(self.counts.values()) - len(self.lines)
        lines = [*self.lines, *([f"... and {more} more"] if more > 0 else []), "", f"{root} on {socket.gethostname()}"]
        return Notice(title=f"Dropforge: {told}", body="\n".join(lines))


def summary_from(value: Any) -> Summary:
    """Return a summary as it was kept; an empty one for anything else."""
    try:
        counts: dict[str, int] = {event: int(value["counts"][event]) for event in EVENTS if event in value["counts"]}
        return Summary(counts=counts, lines=tuple(map(str, value["lines"]))[:MOST_LINES], since=float(value["since"]))
    except (KeyError, TypeError, ValueError):
        return Summary()


def send_at(
    summary: Summary, *, sent_at: float, failures: int, summary_seconds: float, quiet_hours: tuple[str, ...], now: float
) -> float:
    """Return when a summary is to be sent, in seconds since the epoch.

    The first event goes out at once. What follows within `summary_seconds` of that waits and is one notice, what comes in
    quiet hours waits for their end, and what nobody took for a growing time. A clock that was set back holds nothing up.
    """
    pause = RETRY_SECONDS[min(failures, len(RETRY_SECONDS)) - 1] if failures else summary_seconds
    at = max(min(summary.since, now) + FIRST_SECONDS, min(sent_at, now) + pause)
    windows = parse_hours(quiet_hours)
    if windows and is_open(windows, max(at, now)):
        return next_change(windows, max(at, now)) or float("inf")
    return at
