"""What is left alone: over restarts, and until it changes."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from daemon.job import Job, JobState
from daemon.left_alone import MOST_FILES, LeftAlone
from daemon.store import JobStore


def test_a_job_is_left_alone_over_restarts_until_it_changes(tmp_path: Path) -> None:
    with closing(JobStore(tmp_path / "queue.sqlite3")) as store:
        job = store.add(Job(id="j", name="a.jsonl", state=JobState.FAILED))
        left_alone = LeftAlone(store)
        left_alone.add_job(job.id, job.updated_at)
        left_alone.add_job("a folder without a row")
        again = LeftAlone(store)
        assert again.has(job.id, job.updated_at)
        assert again.has("a folder without a row")
        assert not again.has("another")
        assert not again.has(job.id, "later")


def test_what_has_changed_is_forgotten_when_another_comes(tmp_path: Path) -> None:
    with closing(JobStore(tmp_path / "queue.sqlite3")) as store:
        job = store.add(Job(id="j", name="a.jsonl", state=JobState.FAILED))
        left_alone = LeftAlone(store)
        left_alone.add_job(job.id, "earlier")
        left_alone.add_job("another")
        assert not LeftAlone(store).has(job.id, "earlier")


def test_a_file_is_left_alone_once_a_name_and_the_newest_of_very_many(tmp_path: Path) -> None:
    with closing(JobStore(tmp_path / "queue.sqlite3")) as store:
        left_alone = LeftAlone(store)
        left_alone.add_file(("normal", "a\udcff.job.toml", 1))
        left_alone.add_file(("normal", "a\udcff.job.toml", 2))
        assert LeftAlone(store).files == [("normal", "a\udcff.job.toml", 2)]
        for number in range(MOST_FILES):
            left_alone.add_file(("low", f"{number}.jsonl", number))
        assert len(LeftAlone(store).files) == MOST_FILES
