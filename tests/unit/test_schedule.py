"""When jobs may run: windows of the week by wall clock, over changes of clocks, and a GPU's temperature."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
from pydantic import ValidationError

from daemon.schedule import ScheduleSettings, is_open, next_change, parse_hours, too_hot, why_closed


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A time zone whose clocks change, at 02:00 on 2026-03-29 and at 03:00 on 2026-10-25, without a database of zones."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("19:00-07:00", ["2026-11-25 19:00", "2026-11-26 06:59"], ["2026-11-25 18:59", "2026-11-25 07:00"]),
        ("Fri 22:00-06:00", ["2026-11-27 23:00", "2026-11-28 05:59"], ["2026-11-26 23:00", "2026-11-28 22:30"]),
        ("Sat,Sun 00:00-24:00", ["2026-11-28 00:00", "2026-11-29 23:59"], ["2026-11-27 23:59", "2026-11-30 00:00"]),
        ("Fri-Mon 12:00-13:00", ["2026-11-30 12:30", "2026-11-27 12:00"], ["2026-12-01 12:30", "2026-11-26 12:30"]),
        ("monday 8:00-9:00", ["2026-11-30 08:30"], ["2026-12-01 08:30"]),
        ("00:00-24:00", ["2026-11-25 00:00", "2026-11-25 23:59"], []),
    ],
)
def test_a_window_is_what_it_reads_like(hours: str, inside: list[str], outside: list[str], berlin: None) -> None:
    windows = parse_hours((hours,))
    assert [text for text in inside if not is_open(windows, at(text))] == []
    assert [text for text in outside if is_open(windows, at(text))] == []


@pytest.mark.parametrize(
    "hours", ["19-7", "19:00", "Foo 1:00-2:00", "25:00-2:00", "1:60-2:00", "Mon-Tue-Wed 1:00-2:00", "24:00-1:00", ""]
)
def test_what_is_no_window_is_refused_with_its_own_words(hours: str) -> None:
    with pytest.raises(ValidationError, match=repr(hours)):
        ScheduleSettings(hours=(hours,))


def test_the_time_until_which_it_waits_is_the_first_at_which_it_may_run(berlin: None) -> None:
    """Every minute over both changes of clocks is compared with a search minute by minute."""
    chosen = random.Random(3)
    for hours in (("22:00-06:00",), ("02:30-03:30",), ("Sun 02:15-02:45", "Mon 00:00-24:00"), ("01:00-02:30",)):
        windows = parse_hours(hours)
        for day in ("2026-03-28 12:00", "2026-10-24 12:00"):
            now = at(day) + 60 * chosen.randrange(24 * 60)
            change = next_change(windows, now)
            minute = now - now % 60
            searched = next(
                t
                for t in (minute + 60 * n for n in range(1, 14 * 24 * 60))
                if is_open(windows, t) is not is_open(windows, now)
            )
            assert change == searched, (hours, datetime.fromtimestamp(now))


def test_what_is_always_or_never_the_same_has_no_next_change(berlin: None) -> None:
    assert next_change(parse_hours(("00:00-24:00",)), at("2026-11-25 12:00")) is None
    assert next_change((), at("2026-11-25 12:00")) is None


def test_the_reason_names_the_windows_and_the_next_beginning(berlin: None) -> None:
    settings = ScheduleSettings(hours=("Mon-Fri 19:00-07:00",))
    assert why_closed(settings, at("2026-11-28 12:00")) == (
        "jobs start in Mon-Fri 19:00-07:00 alone; the next window opens at Mon 2026-11-30 19:00 ([schedule] hours)"
    )
    assert why_closed(settings, at("2026-11-25 20:00")) == ""
    assert why_closed(ScheduleSettings(), 0.0) == ""


@pytest.mark.parametrize(
    ("celsius", "was_hot", "hot"),
    [
        (79, False, False),
        (80, False, True),
        (71, True, True),
        (70, True, False),
        (None, True, True),
        (None, False, False),
    ],
)
def test_a_hot_gpu_has_to_cool_before_it_works_again(celsius: float | None, was_hot: bool, hot: bool) -> None:
    assert too_hot(ScheduleSettings(pause_celsius=80), celsius, was_hot=was_hot) is hot


def test_a_temperature_to_go_on_at_is_below_that_of_the_pause() -> None:
    with pytest.raises(ValidationError, match="resume_celsius has to be below"):
        ScheduleSettings(pause_celsius=80, resume_celsius=80)
    assert not too_hot(ScheduleSettings(), 200.0, was_hot=True)


def test_hours_may_be_a_week_long_and_none_is_left_out(berlin: None) -> None:
    start = datetime(2026, 11, 23)
    windows = parse_hours(("Mon-Sun 00:00-24:00",))
    assert all(is_open(windows, (start + timedelta(hours=hour)).timestamp()) for hour in range(24 * 14))
