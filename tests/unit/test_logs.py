"""The log: every event once and whole, for whoever reads it; nothing untrusted forges a line, a field or a colour."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import socket
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.config import Settings
from daemon.observability import journald, log_reader, logs
from daemon.observability.events import CONSOLE_KEYS
from daemon.observability.events import EVENTS as EVENTS_LISTED
from daemon.text import escape

TEXT = st.text(
    alphabet=st.one_of(st.characters(), st.sampled_from("\n\r\x1b\x9b\u2028\u202e\udcff \\\"'=\x00")), max_size=60
)
VALUES = st.one_of(
    TEXT, st.integers(), st.floats(), st.none(), st.lists(TEXT, max_size=3), st.dictionaries(TEXT, TEXT, max_size=2)
)
EVENTS = st.dictionaries(st.sampled_from(["job", "file", "reason", "error", "loss"]), VALUES, max_size=5)


@pytest.fixture
def make_log(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    def make(**logging_settings: Any) -> Any:
        return logs.configure(Settings(root=tmp_path, logging=logging_settings), terminal=False)

    yield make
    for handler in logging.getLogger("dropforge").handlers:
        handler.close()


def lines(tmp_path: Path, name: str = "dropforge.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "state" / "logs" / name).read_bytes().splitlines()]


def is_visible(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


@pytest.mark.parametrize("left", [b"", bytes(900), b'{"event": "cut', b'{"event": "cut' + bytes(80)])
def test_after_a_power_cut_the_next_event_has_a_line_of_its_own(
    make_log: Callable[..., Any], tmp_path: Path, left: bytes
) -> None:
    """Zeros are what a file system leaves of lines that nobody fsynced; a torn line stays, for whoever looks."""
    make_log().info("daemon.started")
    path = tmp_path / "state" / "logs" / "dropforge.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + left)
    make_log().info("daemon.stopped")
    text = path.read_bytes()
    torn = left.rstrip(b"\0")
    assert text.startswith(whole + torn + b"\n" if torn else whole)
    assert json.loads(text.splitlines()[-1])["event"] == "daemon.stopped"
    assert b"\0" not in text


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=EVENTS)
def test_an_event_is_one_line_that_has_it_whole(
    make_log: Callable[..., Any], tmp_path: Path, data: dict[str, Any]
) -> None:
    log = make_log()
    before = len(lines(tmp_path))
    log.info("file.settled", **data)
    raw = (tmp_path / "state" / "logs" / "dropforge.jsonl").read_bytes()
    assert raw.isascii()
    (event,) = lines(tmp_path)[before:]
    assert list(event)[:3] == ["timestamp", "level", "event"]
    for key, value in data.items():
        if isinstance(value, float) and not (value == value and abs(value) != float("inf")):
            assert event[key] is None  # NaN has no place in JSON
        else:
            assert event[key] == value


@settings(max_examples=300, deadline=None)
@given(name=TEXT, data=EVENTS)
def test_a_line_for_people_is_one_line_of_visible_characters(name: str, data: dict[str, Any]) -> None:
    event = {"timestamp": "2026-11-23T04:41:07Z", "level": "info", "event": name, **data}
    text = log_reader.format_line(event, colours=False)
    assert all(is_visible(character) for character in text)


@given(name=TEXT, data=EVENTS, width=st.integers(1, 120), short=st.booleans())
def test_a_line_too_long_for_a_terminal_goes_on_indented_and_says_the_same(
    name: str, data: dict[str, Any], width: int, short: bool
) -> None:
    event = {"timestamp": "2026-11-23T04:41:07Z", "level": "info", "event": name, **data}
    whole = log_reader.format_line(event, colours=False, short=short)
    broken = log_reader.format_line(event, colours=False, short=short, width=width)
    assert broken.split() == whole.split()
    following = broken.split("\n")[1:]
    assert all(line.startswith("    ") for line in following)
    assert all(len(line) <= width or " " not in line.strip() for line in following)
    assert log_reader.format_line(event, colours=False, short=short, width=len(whole)) == whole


@given(text=TEXT, job=TEXT)
def test_no_text_passes_for_another_key(text: str, job: str) -> None:
    """What stands outside quotes is written by us: `reason=x job=forged` in a value stays inside its quotes."""
    shown = log_reader.format_line({"event": "e", "reason": text, "job": job}, colours=False)
    outside = shown.replace("\\\\", "").replace('\\"', "")
    bare = "".join(part for number, part in enumerate(outside.split('"')) if number % 2 == 0)
    assert bare.count("=") == 2


def test_an_exception_s_own_text_cannot_pass_for_an_event(make_log: Callable[..., Any], tmp_path: Path) -> None:
    log = make_log()
    try:
        raise ValueError("x\n2026-11-23 04:41:07 info    job.succeeded  \x1b[2J")
    except ValueError:
        log.exception("file.not_moved", job="j")
    (event,) = lines(tmp_path)
    text = log_reader.format_line(event, colours=False)
    assert "ValueError" in text
    assert "\x1b" not in text
    assert all(line.startswith("    | ") for line in text.split("\n")[1:])


@settings(max_examples=200, deadline=None)
@given(data=EVENTS)
def test_the_journal_reads_each_value_back_and_none_that_was_forged(data: dict[str, Any]) -> None:
    fields = parse_datagram(
        journald.render(None, "", {"event": "job.failed", "level": "error", **data}).encode("latin-1")
    )
    assert set(fields) == {
        "MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "DROPFORGE_EVENT", "DROPFORGE_LEVEL",
        *(f"DROPFORGE_{key.upper()}" for key in data),
    }  # fmt: skip
    assert fields["PRIORITY"] == "3"
    assert all(is_visible(character) for character in fields["MESSAGE"])
    for key, value in data.items():
        if isinstance(value, str):
            assert fields[f"DROPFORGE_{key.upper()}"] == value.encode("utf-8", "backslashreplace").decode()[:4000]


def parse_datagram(data: bytes) -> dict[str, str]:
    """The journal's own reading: `KEY=value` lines, or the key, a length, and so many bytes."""
    fields: dict[str, str] = {}
    while data:
        key, _, rest = data.partition(b"\n")
        if b"=" in key:
            name, _, value = key.partition(b"=")
            data = rest
        else:
            name, size = key, int.from_bytes(rest[:8], "little")
            value, data = rest[8 : 8 + size], rest[8 + size + 1 :]
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


def test_a_journal_that_is_gone_does_not_end_the_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = journald.JournalHandler(str(tmp_path / "nobody"))
    handler.emit(logging.LogRecord("x", logging.INFO, "", 0, "told all the same", (), None))
    assert "told all the same" in capsys.readouterr().err
    handler.close()


def test_an_event_of_any_size_reaches_the_journal(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "journal"))
        handler = journald.JournalHandler(str(tmp_path / "journal"))
        text = journald.render(None, "", {"event": "job.failed", **{f"key{n}": "ä" * 100_000 for n in range(10)}})
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, text, (), None))
        assert parse_datagram(listener.recv(1 << 20))["DROPFORGE_EVENT"] == "job.failed"
        handler.close()


def test_the_log_is_rotated_by_size_and_number(make_log: Callable[..., Any], tmp_path: Path) -> None:
    log = make_log(max_bytes=2000, backups=2)
    for number in range(100):
        log.info("file.settled", number=number)
    names = sorted(path.name for path in (tmp_path / "state" / "logs").iterdir())
    assert names == ["dropforge.jsonl", "dropforge.jsonl.1", "dropforge.jsonl.2"]
    assert all((tmp_path / "state" / "logs" / name).stat().st_size <= 2000 for name in names)
    told = [event["number"] for name in reversed(names) for event in lines(tmp_path, name)]
    assert told == list(range(told[0], 100))


def test_a_log_that_was_moved_away_is_opened_again(make_log: Callable[..., Any], tmp_path: Path) -> None:
    log = make_log(max_bytes=0)
    log.info("file.settled", number=1)
    path = tmp_path / "state" / "logs" / "dropforge.jsonl"
    path.rename(path.with_name("moved"))
    log.info("file.settled", number=2)
    logs.reopen()
    log.info("file.settled", number=3)
    assert [event["number"] for event in lines(tmp_path, "moved")] == [1, 2]
    assert [event["number"] for event in lines(tmp_path)] == [3]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")  # noqa: PTH110
def test_a_log_that_cannot_be_written_is_told_once(
    make_log: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "state" / "logs"
    folder.mkdir(parents=True)
    (folder / "dropforge.jsonl").symlink_to("/dev/full")
    log = make_log()
    for _ in range(5):
        log.info("file.settled")
    assert capsys.readouterr().err.count("cannot write the log") == 1
    assert "space" in logs.write_error().lower()


def test_a_log_that_cannot_be_opened_is_told_and_written_as_soon_as_it_can(
    make_log: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_the_way = tmp_path / "state" / "logs" / "dropforge.jsonl"
    in_the_way.mkdir(parents=True)
    log = make_log()
    for number in range(3):
        log.info("file.settled", number=number)
    assert capsys.readouterr().err.count("cannot write the log") == 1
    assert "told on stderr alone" in logs.problem()
    in_the_way.rmdir()
    log.info("file.settled", number=3)
    assert logs.problem() == ""
    assert [event["number"] for event in lines(tmp_path)] == [3]


def test_a_listener_hears_also_what_is_not_written(tmp_path: Path) -> None:
    heard: list[str] = []
    settings_ = Settings(root=tmp_path, logging={"level": "error"})
    log = logs.configure(settings_, terminal=False, listeners=[lambda name, data: heard.append(name)])
    log.info("job.succeeded", job="j")
    assert heard == ["job.succeeded"]
    assert lines(tmp_path) == []


@settings(max_examples=60, deadline=None)
@given(
    ops=st.lists(st.sampled_from(["write", "write", "write", "rotate", "read", "move", "truncate_last"]), max_size=40)
)
def test_a_reader_that_follows_sees_every_line_once_across_rotation(
    tmp_path_factory: pytest.TempPathFactory, ops: list[str]
) -> None:
    """However writes, rotations and reads fall; at most BACKUPS rotations between two reads, as files are then gone."""
    folder = tmp_path_factory.mktemp("log")
    path = folder / "dropforge.jsonl"
    reader = log_reader.LogReader(path)
    written, seen, rotated = 0, [], 0
    for op in ops:
        if op == "write":
            with path.open("ab") as file:
                file.write(b'{"n": %d}\n' % written)
            written += 1
        elif op == "rotate" and path.exists() and rotated < 3:
            for number in (2, 1):
                old = folder / f"dropforge.jsonl.{number}"
                if old.exists():
                    old.rename(folder / f"dropforge.jsonl.{number + 1}")
            path.rename(folder / "dropforge.jsonl.1")
            rotated += 1
        elif op == "read":
            seen += [event["n"] for _, event in reader.read()]
            rotated = 0
    seen += [event["n"] for _, event in reader.read()]
    reader.close()
    assert seen == list(range(written))


def test_a_line_in_the_middle_of_its_writing_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"n": 1}\n{"n"')
    reader = log_reader.LogReader(path)
    assert [event for _, event in reader.read()] == [{"n": 1}]
    with path.open("ab") as file:
        file.write(b": 2}\nnot json\n[]\n")
    assert [event for _, event in reader.read()] == [{"n": 2}]
    path.write_bytes(b'{"n": 3}\n')  # cut in place, as logrotate's copytruncate does
    assert [event for _, event in reader.read()] == [{"n": 3}]
    reader.close()


@pytest.mark.parametrize(
    ("job", "level", "expected"),
    [
        ("", "debug", [1, 2, 3]),
        ("", "warning", [2, 3]),
        ("abc", "debug", [1, 2]),
        ("-1", "debug", [1, 2]),
        ("zz", "debug", []),
    ],
)
def test_events_are_chosen_by_job_and_level(job: str, level: str, expected: list[int]) -> None:
    events = [
        {"n": 1, "job": "abc-1", "level": "info"},
        {"n": 2, "job": "abc-1", "level": "warning"},
        {"n": 3, "level": "error"},
    ]
    wanted = log_reader.EventFilter(job=job, level=level)
    assert [event["n"] for event in events if wanted(event)] == expected


@given(TEXT)
def test_escaped_text_is_visible_and_short(text: str) -> None:
    shown = escape(text, most=50)
    assert len(shown) <= 50
    assert all(is_visible(character) for character in shown)


CONSOLE_LINES = [
    (
        {"event": "job.succeeded", "dataset": "a.jsonl", "reason": "2 of 2 steps", "attempt": 1, "version": "0001",
         "size_bytes": 236, "digest": "5" * 64, "tried": [], "steps_run": 2, "steps_planned": 2, "start_step": 0,
         "reasons": ["there are no checkpoints"], "train_loss": 7.945447921752930, "held_out_before": None,
         "base": {"name": "./base_model", "weights": "3" * 64}, "warnings": [], "total_seconds": 7.7111, "job": "j"},
        "job.succeeded  dataset=a.jsonl version=0001 steps_run=2 steps_planned=2 train_loss=7.945 total_seconds=7.711"
        " job=j",
    ),
    (
        {"event": "job.failed", "job": "j", "dataset": "a.jsonl", "attempt": 3, "overrides": {"lora": {"r": 4}},
         "reason": "no base model\n  at base_model", "hint": "put one there\\nor name another: a\\\\name"},
        'job.failed  dataset=a.jsonl attempt=3 reason="no base model; at base_model"'
        ' hint="put one there; or name another: a\\\\name" job=j',
    ),
    (
        {"event": "dataset.checked", "job": "j", "rows": 4, "skipped_rows": 0, "size_bytes": 3 * 2**20,
         "unused_keys": {"id": 4, "source": 2}, "warnings": ["all rows are equal (4 rows)", "short (2 rows)"]},
        'dataset.checked  rows=4 size_bytes="3.0 MiB" unused_keys="id; source"'
        ' warnings="all rows are equal (4 rows); short (2 rows)" job=j',
    ),
    (
        {"event": "plugin.told", "job": "j", "flag": False, "sure": True, "share": 0.123456, "base": {"a": 1},
         "digests": ["a" * 64], "path": Path("/a/b"), "nested": [{"a": 1}], "none": None, "empty": ""},
        "plugin.told  sure=true share=0.1235 path=/a/b job=j",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("event", "line"), CONSOLE_LINES, ids=[event["event"] for event, _ in CONSOLE_LINES])
def test_the_console_shows_what_a_person_needs(event: dict[str, Any], line: str) -> None:
    event = {"timestamp": "2026-11-23T04:41:07Z", "level": "info", **event}
    shown = log_reader.format_line(log_reader.brief(event), colours=False)
    assert shown == f"2026-11-23 04:41:07 info    {line}"


def test_what_the_console_shows_are_keys_that_events_have() -> None:
    for name, keys in CONSOLE_KEYS.items():
        assert set(keys) <= set(EVENTS_LISTED[name].keys)


def test_the_console_is_brief_where_the_file_is_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = logs.configure(Settings(root=tmp_path))
    log.error("job.failed", job="j", dataset="a.jsonl", reason="one\ntwo", digest="5" * 64, steps_run=0)
    said = capfd.readouterr().err
    assert said.endswith('job.failed  dataset=a.jsonl reason="one; two" job=j\n')
    (event,) = lines(tmp_path)
    assert (event["reason"], event["digest"], event["steps_run"]) == ("one\ntwo", "5" * 64, 0)


def test_a_screen_that_shows_the_steps_gets_no_line_for_each(tmp_path: Path) -> None:
    screen = io.StringIO()
    log = logs.configure(Settings(root=tmp_path), screen=screen)
    log.info("run.stepped", step=5, loss=2.0)
    log.info("checkpoint.sealed", step=5, job="20261125-201527-0042")
    log.warning("queue.held", reason="no space")
    assert [re.sub(r"^[0-9]{2}:[0-9]{2}:[0-9]{2} ", "", line) for line in screen.getvalue().splitlines()] == [
        "checkpoint.sealed  step=5 job=0042",
        'warning queue.held  reason="no space"',
    ]
    assert [event["event"] for event in lines(tmp_path)] == ["run.stepped", "checkpoint.sealed", "queue.held"]


@given(name=st.one_of(TEXT, st.sampled_from(sorted(CONSOLE_KEYS))), data=EVENTS)
def test_a_brief_line_is_one_line_of_visible_characters(name: str, data: dict[str, Any]) -> None:
    event = {"timestamp": "2026-11-23T04:41:07Z", "level": "info", "event": name, **data}
    text = log_reader.format_line(log_reader.brief(event), colours=False)
    assert all(is_visible(character) for character in text)
