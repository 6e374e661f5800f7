"""`[schedule]`: when jobs may run. Hours of the week, a machine that nobody uses, a GPU that is cool enough.

Hours are wall-clock time of the daemon's time zone, so that a window stays where people expect it when clocks are changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import lru_cache
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from daemon.recipe import Section

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
COOLING_DEGREES = 10.0  # below pause_celsius, where resume_celsius is not set
HOURS_HINT = 'write it as "Mon-Fri 19:00-07:00", "Sat,Sun 00:00-24:00" or "22:00-06:00"'
_WINDOW = re.compile(r"(?:(?P<days>[A-Za-z][A-Za-z,\- ]*?)\s+)?(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})")


class ScheduleSettings(Section):
    """`[schedule]`: when jobs may run; nothing is set: always."""

    hours: tuple[str, ...] = Field(
        (), description='Windows in which jobs may start, local time: ["Mon-Fri 19:00-07:00", "Sat,Sun 00:00-24:00"].'
    )
    gpu_idle: bool = Field(False, description="Jobs start only while no other program has memory on the GPU.")
    nobody_logged_in: bool = Field(False, description="Jobs start only while nobody is logged in to this machine.")
    at_end: Literal["finish", "seal"] = Field(
        "finish",
        description="A running job when its window ends or somebody logs in: it finishes, or seals a checkpoint and goes on in the next window.",
    )
    pause_celsius: float = Field(
        0.0, ge=0, le=150, description="A GPU that is this hot has its job seal a checkpoint and wait; 0: never."
    )
    resume_celsius: float = Field(
        0.0, ge=0, le=150, description="It goes on at this; 0: ten degrees below pause_celsius."
    )

    @field_validator("hours")
    @classmethod
    def _readable(cls, hours: tuple[str, ...]) -> tuple[str, ...]:
        parse_hours(hours)
        return hours

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.resume_celsius and self.resume_celsius >= self.pause_celsius:
            raise ValueError("resume_celsius has to be below pause_celsius")
        return self


@dataclass(frozen=True, kw_only=True)
class Window:
    """A part of some days of the week, as wall-clock time; one that ends at or before its beginning ends on the next day."""

    days: frozenset[int]  # 0 is Monday
    start: timedelta  # since midnight
    length: timedelta

    def has(self, moment: datetime) -> bool:
        """Whether `moment`, naive local time, is inside."""
        today = moment.date()
        return any(begin <= moment < end for begin, end in map(self._on, (today, today - timedelta(days=1))) if end)

    def borders(self, first: date, days: int) -> Iterator[datetime]:
        """Yield beginnings and ends of those that begin on `days` days from `first` on."""
        for number in range(days):
            begin, end = self._on(first + timedelta(days=number))
            if end:
                yield from (begin, end)

    def _on(self, day: date) -> tuple[datetime, datetime | None]:
        begin = datetime.combine(day, datetime.min.time()) + self.start
        return begin, begin + self.length if day.weekday() in self.days else None


@lru_cache(maxsize=16)
def parse_hours(hours: tuple[str, ...]) -> tuple[Window, ...]:
    """Return the windows of `[schedule] hours`, or of any list written so. Raises ValueError with what is wrong and how to write it."""
    return tuple(map(_parse, hours))


def is_open(windows: Sequence[Window], now: float) -> bool:
    """Whether a moment, in seconds since the epoch, is in any of the windows; without windows it always is."""
    return not windows or any(window.has(datetime.fromtimestamp(now)) for window in windows)


def next_change(windows: Sequence[Window], now: float) -> float | None:
    """Return when `is_open` will be another than now, in seconds since the epoch; None: never."""
    current, first = is_open(windows, now), datetime.fromtimestamp(now).date() - timedelta(days=1)
    walls = {wall for window in windows for wall in window.borders(first, 10)}
    # A time that a change of clocks repeats is met twice, at most one of them being the border.
    moments = {wall.replace(fold=fold).timestamp() for wall in walls for fold in (0, 1)}
    return next((at for at in sorted(moments) if at > now and is_open(windows, at) is not current), None)


def why_closed(settings: ScheduleSettings, now: float) -> str:
    """Say that `now` is in no window, and when the next one begins; empty when it is in one."""
    windows = parse_hours(settings.hours)
    if is_open(windows, now):
        return ""
    opens = next_change(windows, now)
    until = f" at {datetime.fromtimestamp(opens):%a %Y-%m-%d %H:%M}" if opens is not None else " never"
    return f"jobs start in {', '.join(settings.hours)} alone; the next window opens{until} ([schedule] hours)"


def too_hot(settings: ScheduleSettings, celsius: float | None, *, was_hot: bool) -> bool:
    """Whether a GPU is to be left alone: from `pause_celsius` on, until it has cooled to `resume_celsius`.

    One whose temperature is not known (None) stays what it was.
    """
    if not settings.pause_celsius:
        return False
    if celsius is None:
        return was_hot
    return celsius > resume_celsius(settings) if was_hot else celsius >= settings.pause_celsius


def resume_celsius(settings: ScheduleSettings) -> float:
    """Return the temperature at which a job that waits for a cooler GPU goes on."""
    return settings.resume_celsius or settings.pause_celsius - COOLING_DEGREES


def _parse(text: str) -> Window:
    found = _WINDOW.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no window of time; {HOURS_HINT}")
    start, end = (_since_midnight(text, hour, minute) for hour, minute in (found.group(2, 3), found.group(4, 5)))
    if start == timedelta(days=1):
        raise ValueError(f"{text!r} begins at 24:00; write 00:00 of the next day")
    length = end - start if end > start else end - start + timedelta(days=1)
    return Window(days=_days(text, found["days"]), start=start, length=length)


def _since_midnight(text: str, hour: str, minute: str) -> timedelta:
    since = timedelta(hours=int(hour), minutes=int(minute))
    if int(minute) > 59 or since > timedelta(days=1):
        raise ValueError(f"{text!r} has {hour}:{minute}, which is no time of a day; {HOURS_HINT}")
    return since


def _days(text: str, named: str | None) -> frozenset[int]:
    """The days that "Mon-Fri,Sun" names; all of them where none is named."""
    if named is None:
        return frozenset(range(len(DAYS)))
    days: set[int] = set()
    for part in named.split(","):
        ends = [_day(text, name) for name in part.split("-")]
        if len(ends) > 2:
            raise ValueError(f"{text!r} has {part.strip()!r}, which is no range of days; {HOURS_HINT}")
        first, last = ends[0], ends[-1]
        days |= {day % len(DAYS) for day in range(first, last + (len(DAYS) if last < first else 0) + 1)}
    return frozenset(days)


def _day(text: str, name: str) -> int:
    short = name.strip()[:3].title()
    if short not in DAYS or not name.strip().isalpha():
        raise ValueError(f"{text!r} has {name.strip()!r}, which is no day; days are {', '.join(DAYS)}")
    return DAYS.index(short)
