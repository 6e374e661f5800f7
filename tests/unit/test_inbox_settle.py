"""When a file has settled: decided from what was seen and heard, on our own clock, never from a file's times."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from daemon.config import InboxSettings
from daemon.in_hand import InHand
from daemon.inbox.candidates import CandidateTracker
from daemon.inbox.layout import NameKind, name_kind, sidecar_name
from daemon.inbox.settle import Candidate, EarlierClaim, FileStat, Settled, Wait, decide
from daemon.inbox.watcher import NameEvents
from daemon.job import Priority

SETTINGS = InboxSettings(settle_seconds=2.0, quiet_seconds=0.02)
LOOK = FileStat(device=1, inode=2, size_bytes=3, mtime_ns=4, ctime_ns=5, mode=stat.S_IFREG | 0o644, owner=6)
CLOSED, RENAMED = NameEvents(closes=1), NameEvents(renamed_in=True)


def candidate(look: FileStat = LOOK, name: str = "x.jsonl") -> Candidate:
    made = Candidate(priority=Priority.NORMAL, name=name, first_seen=100.0, since="")
    made.observe(look, 100.0)
    return made


@pytest.mark.parametrize(("now", "taken"), [(100.0, False), (101.9, False), (102.0, True), (500.0, True)])
def test_a_file_found_by_a_scan_must_stay_the_same_for_settle_seconds(now: float, taken: bool) -> None:
    """Seconds since we first saw it as it is."""
    assert isinstance(decide(candidate(), now, SETTINGS), Settled) is taken


@pytest.mark.parametrize("change", [{"size_bytes": 9}, {"mtime_ns": 9}, {"ctime_ns": 9}, {"inode": 9}, {"mode": 9}])
def test_whatever_changes_starts_the_clock_again(change: dict[str, int]) -> None:
    """Size, either time, inode: one look that differs is enough."""
    made = candidate()
    made.observe(replace(LOOK, **change), 101.9)
    assert isinstance(decide(made, 103.8, SETTINGS), Wait)
    assert isinstance(decide(made, 103.9, SETTINGS), Settled)


@pytest.mark.parametrize("mtime_ns", [0, 10**18 * 9])
def test_a_files_own_times_say_nothing_about_its_age(mtime_ns: int) -> None:
    """Copied with old times, or from a clock that is ahead."""
    made = candidate(replace(LOOK, mtime_ns=mtime_ns, ctime_ns=mtime_ns))
    assert isinstance(decide(made, 101.0, SETTINGS), Wait)
    assert isinstance(decide(made, 102.0, SETTINGS), Settled)


@pytest.mark.parametrize("events", [CLOSED, RENAMED])
def test_what_was_closed_or_renamed_in_may_be_taken_after_a_moment_if_it_is_whole(events: NameEvents) -> None:
    """Whole: it ends in a newline, and nobody has it open for writing."""
    made = candidate()
    made.add_events(events, 100.0)
    assert isinstance(decide(made, 100.01, SETTINGS), Wait)
    verdict = decide(made, 100.03, SETTINGS)
    assert isinstance(verdict, Settled)
    assert verdict.whole_only
    settled = decide(made, 102.0, SETTINGS)
    assert isinstance(settled, Settled)
    assert not settled.whole_only


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param({"closes": 2}, id="closed_twice"),
        pytest.param({"name": "x.jsonl.gz"}, id="compressed"),
        pytest.param({"settings": replace}, id="close_does_not_count"),
        pytest.param({"came_back": True}, id="its_writer_came_back"),
    ],
)
def test_the_quick_way_is_closed_to_files_that_may_not_be_finished(spoil: dict[str, object]) -> None:
    """They settle like any other."""
    made = candidate(name=str(spoil.get("name", "x.jsonl")))
    made.must_settle = bool(spoil.get("came_back"))
    made.add_events(NameEvents(closes=int(spoil.get("closes", 1))), 100.0)
    settings = SETTINGS.model_copy(update={"take_on_close": False}) if "settings" in spoil else SETTINGS
    assert isinstance(decide(made, 101.0, settings), Wait)
    assert isinstance(decide(made, 102.0, settings), Settled)


def test_another_file_under_the_same_name_has_a_history_of_its_own() -> None:
    """What was heard was of the old inode."""
    made = candidate()
    made.add_events(NameEvents(closes=3), 100.0)
    made.observe(replace(LOOK, inode=9), 101.0)
    made.add_events(RENAMED, 101.0)
    assert isinstance(decide(made, 101.05, SETTINGS), Settled)


def test_an_empty_file_gets_twice_the_time() -> None:
    """Somebody may be about to write it."""
    made = candidate(replace(LOOK, size_bytes=0))
    made.add_events(CLOSED, 100.0)
    assert isinstance(decide(made, 103.9, SETTINGS), Wait)
    assert isinstance(decide(made, 104.0, SETTINGS), Settled)


@pytest.mark.parametrize("when", [100.0, 100.01, 101.0, 101.999])
def test_a_waiting_file_is_looked_at_again_when_it_may_have_settled(when: float) -> None:
    """Not much later, and never in a tight loop."""
    verdict = decide(candidate(), when, SETTINGS)
    assert isinstance(verdict, Wait)
    assert when + verdict.seconds == pytest.approx(102.0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.jsonl", NameKind.DATA),
        ("X.JSONL.GZ", NameKind.DATA),
        ("x.jsonl.zst", NameKind.DATA),
        ("x.ndjson", NameKind.DATA),
        ("X.NDJSON.zst", NameKind.DATA),
        ("x (1).jsonl", NameKind.DATA),
        ("x.jsonl (1)", NameKind.OTHER),
        ("x.job.toml", NameKind.SIDECAR),
        (".x.jsonl.Ab12", NameKind.UNFINISHED),
        (".x.jsonl", NameKind.UNFINISHED),
        ("x.jsonl~", NameKind.UNFINISHED),
        ("~x.jsonl", NameKind.UNFINISHED),
        ("x.jsonl.part", NameKind.UNFINISHED),
        ("x.jsonl.crdownload", NameKind.UNFINISHED),
        ("x.json", NameKind.OTHER),
        ("jsonl", NameKind.OTHER),
        ("x.jsonl.bz2", NameKind.OTHER),
    ],
)
def test_what_a_name_stands_for(name: str, kind: NameKind) -> None:
    """By its ending alone."""
    assert name_kind(name) is kind


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.JSONL.zst", "x.ndjson", "x.NDJSON.gz"])
def test_a_sidecar_is_named_after_its_file(name: str) -> None:
    """Whatever it is compressed with."""
    assert sidecar_name(name) == "x.job.toml"


def test_a_file_that_never_settles_is_shown_as_waiting_for_ever(tmp_path: Path) -> None:
    """A day of a writer that comes back every second: never taken, at every moment there with its reason."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"text": "a"}\n')
    found = CandidateTracker({Priority.NORMAL: tmp_path}, SETTINGS, in_hand=InHand())
    for second in range(86_400):
        if second % 60 == 0:
            found.scan(float(second), full=True)
        os.utime(path, (second, second))
        found.examine_due(float(second))
        (waiting,) = found.unsettled()
        assert waiting.reason.startswith("settling")
        assert found.deferred == 0
    assert found.next_settled(86_400.0) is None


def at_work(*closes: float) -> Candidate:
    """A file whose writer closed it at these times, each time with another row."""
    made = Candidate(priority=Priority.NORMAL, name="x.jsonl", first_seen=closes[0], since="")
    for number, at in enumerate(closes):
        made.add_events(CLOSED, at)
        made.observe(replace(LOOK, size_bytes=10 * (number + 1)), at)
    return made


def settled_after(made: Candidate) -> float:
    """Seconds without a change after which it may be taken."""
    low, high = 0.0, 3600.0
    while high - low > 0.01:
        middle = (low + high) / 2
        settled = isinstance(decide(made, made.unchanged_since + middle, SETTINGS), Settled)
        low, high = (low, middle) if settled else (middle, high)
    return round(high, 1)


@pytest.mark.parametrize(
    ("closes", "seconds"),
    [
        pytest.param((100.0,), 0.0, id="closed_once"),
        pytest.param((100.0, 100.1), 2.0, id="closed_twice_at_once"),
        pytest.param((100.0, 101.0), 3.0, id="every_second"),
        pytest.param((100.0, 103.0, 106.0), 9.0, id="every_three_seconds"),
        pytest.param((100.0, 103.0, 103.2), 9.0, id="the_longest_pause_counts"),
        pytest.param((100.0, 115.0), 20.0, id="patience_has_an_end"),
    ],
)
def test_a_writer_that_paused_may_pause_three_times_as_long_again(closes: tuple[float, ...], seconds: float) -> None:
    """By the closes that were heard; a file that was closed once is taken at once."""
    assert settled_after(at_work(*closes)) == pytest.approx(seconds, abs=0.05)


def test_a_file_of_one_line_may_be_the_first_of_many() -> None:
    """It gets five times the time; a second line shows how its writer goes on."""
    made = at_work(100.0)
    made.single_line = True
    assert settled_after(made) == 10.0
    assert "renamed in" in decide(made, 101.0, SETTINGS).reason
    made.add_events(CLOSED, 103.0)
    made.observe(replace(LOOK, size_bytes=99), 103.0)
    assert settled_after(made) == 9.0


@pytest.mark.parametrize(
    ("pause", "seconds", "single_line", "continues"),
    [
        pytest.param(1.0, 3.0, False, True, id="at_once"),
        pytest.param(15.0, 20.0, False, True, id="soon"),
        pytest.param(60.0, 0.0, False, False, id="a_whole_file_later"),
        pytest.param(60.0, 10.0, True, True, id="a_line_later"),
    ],
)
def test_a_name_that_comes_back_goes_on_with_the_file_that_was_taken(
    pause: float, seconds: float, single_line: bool, continues: bool
) -> None:
    """Unless it comes late and whole: then it is another file, which is taken at once."""
    made = candidate()
    made.add_events(CLOSED, 100.0)
    made.follow(EarlierClaim(job_id="job-1", claimed_at=99.0, changed_at=100.0 - pause, owner=6), 100.0, SETTINGS)
    made.single_line = single_line
    assert settled_after(made) == pytest.approx(seconds, abs=0.05)
    assert made.continued_job == ("job-1" if continues else None)
    made.add_events(RENAMED, 100.0)
    assert made.continued_job is None
