"""What is published of the ends of jobs."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from daemon import notifications
from daemon.config import HookSettings, Settings
from daemon.in_hand import InHand
from daemon.job import Job, JobState
from daemon.left_alone import LeftAlone
from daemon.notice_sender import NoticeSender
from daemon.notifications import Notifier
from daemon.store import JobStore


class Log:
    """Keeps the jobs of the lines."""

    def __init__(self) -> None:
        self.jobs: list[str] = []

    def info(self, event: str, **facts: Any) -> None:
        self.jobs.append(facts["job"])


def test_thousands_of_ends_are_published_over_several_ticks_each_once_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifications, "MOST_TRANSITIONS", 5)
    with closing(JobStore(tmp_path / "queue.sqlite3")) as store:
        log = Log()
        notices = NoticeSender(Settings(root=tmp_path), store, log)
        notifier = Notifier(
            store, hooks=HookSettings(), notices=notices, in_hand=InHand(), left_alone=LeftAlone(), log=log
        )
        names = [f"job-{number}" for number in range(8)]
        for name in names:
            store.add(Job(id=name, name="a.jsonl", state=JobState.QUEUED))
            store.finish(name, JobState.QUEUED, JobState.CANCELLED, "a person cancelled it")
        ticks = 1
        while notifier.publish():
            assert len(log.jobs) <= ticks * 5
            ticks += 1
        assert log.jobs == names
        assert ticks > 3
        assert not Notifier(
            store, hooks=HookSettings(), notices=notices, in_hand=InHand(), left_alone=LeftAlone(), log=log
        ).publish()
        assert log.jobs == names
