"""A database that cannot be read: set aside under a name that says so, and rebuilt from what lies on disk."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from daemon import config
from daemon.job import Job, JobState
from daemon.observability import logs
from daemon.recovery import open_store
from daemon.store import JobStore
from daemon.versions import list_versions
from tests.support.killpoints import killed_runs
from tests.support.root import Prepared, Root, wait_until
from tests.support.sound import assert_sound

STEPS = {"training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 10}}


def texts(count: int, word: str) -> list[dict[str, str]]:
    return [{"text": f"{word} {number}"} for number in range(count)]


Killed = tuple[Prepared, Job]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """A root with jobs in every state, killed while one trains; one of the trained files was deleted since."""
    root = Root(tmp_path_factory.mktemp("killed") / "root", behaviour={"*": {"step_seconds": 0.02}}, tables=STEPS)
    root.start()
    root.drop("trained.jsonl", texts(5, "trained"))
    root.finished("trained.jsonl")
    root.drop("deleted.jsonl", texts(6, "deleted"))
    deleted = root.finished("deleted.jsonl")
    root.drop("bad.jsonl", b"no row")
    root.finished("bad.jsonl")
    root.drop("running.jsonl", texts(200, "running"))
    running = root.running("running.jsonl", step=20)
    root.drop("waiting.jsonl", texts(3, "waiting"))
    wait_until(lambda: (job := root.job("waiting.jsonl")) and job.state is JobState.QUEUED)
    trainer = root.trainer(running)
    root.kill()
    wait_until(lambda: not trainer.alive)
    done = root.settings.inbox_dir / "done" / deleted.id
    for path in done.iterdir():  # as keep_done_days would
        path.unlink()
    done.rmdir()
    return Prepared(root), running


@pytest.fixture
def root(killed: Killed) -> Iterator[Root]:
    root = killed[0].again()
    yield root
    root.close()


@pytest.mark.parametrize("damage", ["noise", "cut", "empty", "pages", "a folder's worth of zeros"])
def test_no_file_is_lost_and_nothing_is_trained_twice(killed: Killed, root: Root, damage: str) -> None:
    running = killed[1]
    path = root.settings.store_path
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = path.read_bytes()
    broken = {
        "noise": b"\x93" * len(data),
        "cut": data[: len(data) // 3],
        "empty": b"not empty, yet no database" * 100,
        "pages": data[:4096] + b"\xff" * (len(data) - 4096),
        "a folder's worth of zeros": bytes(len(data)),
    }[damage]
    path.write_bytes(broken)

    root.behave({})
    root.start()
    for name in ("running.jsonl", "waiting.jsonl"):
        assert root.finished(name).state is JobState.SUCCEEDED, root.errors()
    aside = list(root.settings.state_dir.glob("queue.sqlite3.unreadable-*"))
    assert [one.read_bytes() for one in aside] == [broken]
    assert root.events("store.set_aside")
    resumed = root.job("running.jsonl")
    assert resumed is not None
    assert (resumed.id, resumed.attempt) == (running.id, 2)
    assert resumed.result is not None
    assert resumed.result.start_step >= 20
    states = {job.name: job.state for job in root.jobs()}
    assert states["trained.jsonl"] == states["deleted.jsonl"] == "succeeded"
    assert states["bad.jsonl"] == "rejected"
    # Dropped again, the same content is known, also where its file was deleted long ago.
    root.drop("again.jsonl", texts(5, "trained"))
    root.drop("once-more.jsonl", texts(6, "deleted"))
    assert {root.finished(name).state for name in ("again.jsonl", "once-more.jsonl")} == {JobState.CANCELLED}
    assert len(list_versions(root.settings.model_dir)) == 4
    assert root.stop() == 0


def test_a_store_of_a_newer_version_stops_the_daemon_and_is_left_alone(make_root: Callable[..., Root]) -> None:
    root = make_root(behaviour={})
    root.start()
    assert root.stop() == 0
    assert_sound(root)
    with closing(sqlite3.connect(root.settings.store_path)) as db, db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'")
    done = root.run("run")
    assert done.returncode == 1
    assert "99" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(root.settings.state_dir.glob("*unreadable*"))


def test_a_store_without_its_log_is_never_opened_wherever_setting_it_aside_was_killed(tmp_path: Path) -> None:
    """What stands in the log alone is newer than the database, which would look sound without it."""
    template = tmp_path / "template"
    settings = config.load(template)
    with closing(JobStore(settings.store_path)) as store:
        store.add(Job(id="older", name="older.jsonl", state=JobState.CLAIMED))
    with closing(JobStore(settings.store_path)) as store:
        store.add(Job(id="newer", name="newer.jsonl", state=JobState.CLAIMED))
        shutil.copytree(template, tmp_path / "start")  # with the log, which a close removes

    def prepare(root: Path) -> dict[str, Any]:
        shutil.copytree(tmp_path / "start", root, dirs_exist_ok=True)
        return {"store": str(config.load(root).store_path)}

    outcomes = set()
    for run in killed_runs("tests.fault.daemon.scenarios:set_aside", prepare, tmp_path / "runs"):
        path = config.load(run.root).store_path
        log = logs.configure(config.load(run.root), terminal=False)
        with closing(open_store(config.load(run.root), log)) as store:
            ids = {job.id for job in store.jobs()}
        assert ids in (set(), {"older", "newer"}), str(run)
        outcomes.add(frozenset(ids))
        aside = {entry.name for entry in path.parent.glob("queue.sqlite3.unreadable-*")}
        if not ids:
            assert {name.partition("unreadable-")[2][15:] for name in aside} >= {"", "-wal"}, str(run)
        assert not path.with_name(path.name + ".set-aside").exists(), str(run)
    assert len(outcomes) == 2


def test_a_report_that_somebody_edited_is_no_part_of_a_rebuilt_store(make_root: Callable[..., Root]) -> None:
    """What could not be read again from the store would break it for ever."""
    root = make_root(behaviour={})
    root.start()
    root.drop("bad.jsonl", b"no row")
    bad = root.finished("bad.jsonl")
    assert root.stop() == 0
    report = root.settings.inbox_dir / "failed" / bad.id / "report.json"
    report.write_text(report.read_text().replace('"bad.jsonl"', "7", 1))
    for path in root.settings.state_dir.glob("queue.sqlite3*"):
        path.unlink()
    root.start()
    root.drop("a.jsonl", texts(3, "a"))
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED
    assert root.stop() == 0
    assert not root.events("store.broken")


def test_a_rebuild_that_was_cut_short_begins_anew(make_root: Callable[..., Root]) -> None:
    root = make_root(behaviour={})
    root.start()
    root.drop("a.jsonl", texts(3, "a"))
    root.finished("a.jsonl")
    assert root.stop() == 0
    for path in root.settings.state_dir.glob("queue.sqlite3*"):
        path.unlink()
    (root.settings.state_dir / "queue.sqlite3.rebuilding").write_bytes(b"half of one")
    root.start()
    job = root.job("a.jsonl")
    assert job is not None
    assert job.state is JobState.SUCCEEDED
    assert root.stop() == 0
    assert not list(root.settings.state_dir.glob("*.rebuilding*"))
