"""What people are told, and when: one summary instead of a hundred notices, none in quiet hours, none lost."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from daemon import notice_sender
from daemon.config import NotifySettings, Settings
from daemon.errors import ConfigError
from daemon.holds import Hold, HoldKind
from daemon.notice_sender import NOTICES_KEY, NoticeSender, read_urls
from daemon.notices import FIRST_SECONDS, MOST_LINES, Notice, Summary, send_at, summary_from
from daemon.store import JobStore

NOW = datetime(2026, 11, 25, 12, 0).timestamp()


def due(
    summary: Summary, *, sent_at: float = 0.0, failures: int = 0, quiet: tuple[str, ...] = (), now: float = NOW
) -> float:
    return send_at(summary, sent_at=sent_at, failures=failures, summary_seconds=300, quiet_hours=quiet, now=now)


def many(count: int) -> Summary:
    summary = Summary()
    for number in range(count):
        summary = summary.add("failed", f"failed: {number}.jsonl: a reason", NOW + number)
    return summary


def test_a_hundred_ends_are_one_notice_that_counts_them() -> None:
    notice = many(100).add("held", "the queue is held: no space", NOW).compose(Path("/forge"))
    assert notice.title == "Dropforge: 100 failed, 1 held"
    assert notice.body.count("a reason") == MOST_LINES
    assert f"... and {101 - MOST_LINES} more" in notice.body
    assert "/forge on " in notice.body


def test_the_first_event_is_told_at_once_and_what_follows_waits_for_the_summary() -> None:
    assert due(many(1)) == NOW + FIRST_SECONDS
    assert due(many(1), sent_at=NOW - 10) == NOW + 290
    assert due(many(1), sent_at=NOW - 1000) == NOW + FIRST_SECONDS


def test_a_notice_that_nobody_took_is_tried_after_growing_times() -> None:
    waits = [due(many(1), sent_at=NOW, failures=failures) - NOW for failures in range(1, 7)]
    assert waits == [60, 300, 1800, 3600, 3600, 3600]


def test_in_quiet_hours_nothing_is_sent_until_their_end() -> None:
    assert due(many(1), quiet=("11:00-13:30",)) == datetime(2026, 11, 25, 13, 30).timestamp()
    assert due(many(1), quiet=("13:00-14:00",)) == NOW + FIRST_SECONDS


def test_a_clock_that_was_set_back_holds_nothing_up() -> None:
    late = many(1)
    assert due(late, sent_at=NOW, now=NOW - 10**6) <= NOW - 10**6 + 300 + FIRST_SECONDS


def test_a_summary_is_kept_and_read_again_whatever_stands_there() -> None:
    summary = many(30).add("recovered", "the queue goes on", NOW)
    assert summary_from(json.loads(json.dumps(asdict(summary)))) == summary
    for other in (None, {}, [], "text", {"counts": {"failed": "x"}, "lines": [], "since": 0}, {"counts": {}}):
        assert not summary_from(other)
    assert summary.merge(Summary()) == summary == Summary().merge(summary)


@pytest.mark.parametrize("wrong", [{"events": ["finished"]}, {"quiet_hours": ["at night"]}, {"summary_seconds": 0}])
def test_settings_that_say_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        NotifySettings.model_validate(wrong)


def test_addresses_of_a_file_are_used_only_when_it_is_closed_to_others(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text("# mine\nntfy://one/topic\n\n  json://two  \n")
    settings = Settings.model_validate({"root": tmp_path, "notify": {"urls": ["json://zero"], "urls_file": "secrets"}})
    secrets.chmod(0o644)
    with pytest.raises(ConfigError, match="every account can read it"):
        read_urls(settings)
    secrets.chmod(0o640)
    assert read_urls(settings) == ("json://zero", "ntfy://one/topic", "json://two")
    secrets.unlink()
    with pytest.raises(ConfigError, match="urls_file"):
        read_urls(settings)


class Log:
    """Keeps the names of the lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, event: str, **facts: Any) -> None:
        self.lines.append(event)

    warning = error = info


def make_sender(root: Path, store: JobStore, **notify: Any) -> NoticeSender:
    settings = Settings.model_validate(
        {"root": root, "notify": {"urls": ["json://nowhere"], "held_seconds": 0, **notify}}
    )
    return NoticeSender(settings, store, Log())


def kept(store: JobStore) -> Summary:
    return summary_from((store.control(NOTICES_KEY) or {}).get("summary"))


def test_a_hold_is_told_once_with_its_end_also_over_a_restart(tmp_path: Path) -> None:
    with closing(JobStore(tmp_path / "queue.sqlite3")) as store:
        sender = make_sender(tmp_path, store)
        hold = Hold(kind=HoldKind.NO_SPACE, reason="no space")
        for _ in range(3):
            sender.watch_hold(hold)
        sender.watch_hold(Hold(kind=HoldKind.NO_SPACE, reason="less space"))
        assert kept(store).counts == {"held": 1}
        sender.watch_hold(Hold(kind=HoldKind.GPU, reason="in use"))  # another one
        assert kept(store).counts == {"held": 2}
        again = make_sender(tmp_path, store)
        again.watch_hold(None)
        again.watch_hold(None)
        assert kept(store).counts == {"held": 2, "recovered": 1}


def test_windows_of_the_schedule_and_holds_that_pass_are_not_told(tmp_path: Path) -> None:
    with closing(JobStore(tmp_path / "queue.sqlite3")) as store:
        make_sender(tmp_path, store).watch_hold(Hold(kind=HoldKind.SCHEDULE, reason="at night"))
        short = make_sender(tmp_path, store, held_seconds=3600)
        short.watch_hold(Hold(kind=HoldKind.GPU, reason="in use"))
        short.watch_hold(None)
        assert not kept(store)


def test_only_events_of_the_list_are_told_and_nothing_where_nobody_is_named(tmp_path: Path) -> None:
    with closing(JobStore(tmp_path / "queue.sqlite3")) as store:
        make_sender(tmp_path, store, events=["failed"]).tell("succeeded", "a.jsonl")
        make_sender(tmp_path, store, urls=[]).tell("failed", "a.jsonl")
        assert not kept(store)
        make_sender(tmp_path, store).tell("failed", "a\nSubject: forged\x1b[2J.jsonl")
        assert kept(store).lines[0].isprintable()


def test_without_apprise_it_is_said_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notice_sender.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("daemon.notices.FIRST_SECONDS", 0.0)
    with closing(JobStore(tmp_path / "queue.sqlite3")) as store:
        sender = make_sender(tmp_path, store)
        sender.tell("failed", "a.jsonl")
        sender.poll()
        assert "pip install" in sender.warnings[0]
        assert kept(store).counts == {"failed": 1}


def test_a_title_has_no_word_of_a_dropper() -> None:
    assert Summary().add("failed", "evil", NOW).compose(Path("/forge")) == Notice(
        title="Dropforge: 1 failed", body=Summary().add("failed", "evil", NOW).compose(Path("/forge")).body
    )
