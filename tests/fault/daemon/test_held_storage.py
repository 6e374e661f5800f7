"""A machine that refuses to record anything for a while: the daemon holds, says why, and goes on by itself.

The trainer that runs goes on, no attempt is spent, and nothing is lost.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from daemon.job import JobState
from daemon.versions import list_versions
from tests.support.disks import build_failing_disk, full, mounted, remount, without_inodes
from tests.support.root import QUICK, Root, wait_until
from tests.support.sound import assert_sound

TABLES = {
    "training": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "save_steps": 10,
        "save_total_limit": 1,
    },
    "queue": {**QUICK["queue"], "max_attempts": 2, "min_free_bytes": 0},
}
LIMITS = {"stall_timeout": 3.0}  # shorter than the disk is full for: what cannot be reported is no stall
SLOW = {"*": {"step_seconds": 0.03}}


def rows(count: int, word: str) -> list[dict[str, str]]:
    return [{"text": f"{word} {number}"} for number in range(count)]


def told(root: Root, *words: str) -> dict[str, Any] | None:
    """The status, once its reason has one of these words."""
    status = root.status()
    return status if status and any(word in status["reason"] for word in words) else None


def heartbeat(root: Root) -> float:
    """When the daemon wrote its status last, on its monotonic clock."""
    status = root.status()
    assert status
    return float(status["monotonic_seconds"])


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    remount(path, "ro")
    try:
        yield
    finally:
        remount(path, "rw")


@pytest.fixture(scope="module")
def failing_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_failing_disk(tmp_path_factory.mktemp("faults"))


FULL = ("full", "free for records", "more files", "unable to open", "No space", "I/O error")
FAULTS: dict[str, tuple[str, Callable[[Path], AbstractContextManager[None]]]] = {
    "state is full": ("state", full),
    "state has no inodes": ("state", without_inodes),
    "the whole root is full": ("", full),
    "the whole root has no inodes": ("", without_inodes),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_disk_that_takes_nothing_while_a_job_trains_holds_until_it_does(
    make_root: Callable[..., Root], tmp_path: Path, fault: str
) -> None:
    part, break_disk = FAULTS[fault]
    (tmp_path / "root" / part).mkdir(parents=True)
    with mounted(tmp_path / "root" / part, "300m", options="nr_inodes=3000"):
        root = make_root(behaviour=SLOW, tables={**TABLES, "queue": {**TABLES["queue"], **LIMITS}})
        (root.path / "base" / "config.json").write_text('{"hidden_size": 8, "num_hidden_layers": 1}')
        daemon = root.start()
        root.drop("before.jsonl", rows(2, "before"))
        root.finished("before.jsonl")
        root.drop("a.jsonl", rows(250, "a"))
        running = root.running("a.jsonl", step=20)
        # Dropped from another disk where the root is full: by a rename it would not come.
        with break_disk(tmp_path / "root" / part):
            if part:
                root.drop("b.jsonl", rows(3, "b"))
            wait_until(lambda: told(root, *FULL), what="the status to say that nothing can be recorded")
            wait_until(lambda: "queue.held" in root.errors(), what="a word on stderr")
            if fault == "state is full":  # for longer than a stall may last, nothing happens
                seen = heartbeat(root)
                wait_until(lambda: heartbeat(root) > seen + 2 * LIMITS["stall_timeout"])
            held = [line for line in root.errors().splitlines() if "queue.held" in line]
            assert len(held) <= 2, held
            assert daemon.poll() is None
        if not part:
            root.drop("b.jsonl", rows(3, "b"))
        root.behave({})
        done = root.finished("a.jsonl")
        assert done.state is JobState.SUCCEEDED, done
        assert done.attempts_without_progress == 0
        if part:  # where the model's disk is full too, its checkpoints could not be sealed
            assert (done.attempt, done.id) == (1, running.id)
        assert root.finished("b.jsonl").state is JobState.SUCCEEDED
        assert not [event for event in root.events("job.requeued") if event["failure"] not in ("no_space", None)]
        assert daemon.poll() is None
        assert root.stop() == 0
        assert "Traceback" not in (root.path / "daemon.err").read_text()
        assert len(list_versions(root.settings.model_dir)) == 3
        assert_sound(root)


@pytest.mark.parametrize("break_disk", [full, without_inodes])
def test_a_full_disk_under_the_inbox_or_the_model_alone_holds_until_there_is_room(
    make_root: Callable[..., Root],
    tmp_path: Path,
    break_disk: Callable[[Path], AbstractContextManager[None]],
) -> None:
    model, inbox = tmp_path / "root" / "current_model", tmp_path / "root" / "inbox"
    for folder in (model, inbox):
        folder.mkdir(parents=True)
    with mounted(model, "300m", options="nr_inodes=2000"), mounted(inbox, "8m", options="nr_inodes=500"):
        root = make_root(behaviour=SLOW, tables=TABLES)
        (root.path / "base" / "config.json").write_text('{"hidden_size": 8, "num_hidden_layers": 1}')
        daemon = root.start()
        root.drop("a.jsonl", rows(150, "a"))
        running = root.running("a.jsonl", step=20)
        with break_disk(model):
            wait_until(lambda: told(root, *FULL), what="the status to say that the model's disk is full")
        root.behave({})
        done = root.finished("a.jsonl")
        assert (done.state, done.id, done.attempt) == (JobState.SUCCEEDED, running.id, 2)
        assert done.attempts_without_progress == 0
        assert done.result is not None
        assert done.result.start_step >= 20

        beside = inbox / ".b.jsonl.part"
        beside.write_text('{"text": "b"}\n')
        with break_disk(inbox):
            beside.rename(inbox / "b.jsonl")  # takes no room
            wait_until(lambda: told(root, *FULL), what="the status to say that the inbox's disk is full")
            assert root.job("b.jsonl") is None
        assert root.finished("b.jsonl").state is JobState.SUCCEEDED
        assert [job.name for job in root.jobs()] == ["a.jsonl", "b.jsonl"]
        assert daemon.poll() is None
        assert root.stop() == 0
        assert_sound(root)


def test_a_daemon_starts_on_a_full_disk_and_waits_for_room(make_root: Callable[..., Root]) -> None:
    root = make_root(behaviour={}, tables=TABLES)
    with mounted(root.settings.state_dir, "8m"):
        root.start()
        assert root.stop() == 0
        with full(root.settings.state_dir):
            root.drop("a.jsonl", rows(3, "a"))
            root.start()
            assert wait_until(lambda: told(root, *FULL))
        assert root.finished("a.jsonl").state is JobState.SUCCEEDED
        assert root.stop() == 0
        assert_sound(root)


def test_a_stop_on_a_full_disk_ends_and_the_next_start_finishes(make_root: Callable[..., Root]) -> None:
    root = make_root(behaviour=SLOW, tables=TABLES)
    with mounted(root.settings.state_dir, "8m"):
        root.start()
        root.drop("a.jsonl", rows(300, "a"))
        running = root.running("a.jsonl", step=20)
        with full(root.settings.state_dir):
            assert root.stop() == 0
        assert not root.trainer_alive(root.settings.state_dir / "runs" / running.id)
        root.behave({})
        root.start()
        done = root.finished("a.jsonl")
        assert (done.state, done.attempt, done.attempts_without_progress) == (JobState.SUCCEEDED, 2, 0)
        assert done.result is not None
        assert done.result.start_step >= 20
        assert root.stop() == 0
        assert_sound(root)


def test_a_store_that_another_process_locks_for_long_holds_and_the_trainer_goes_on(
    make_root: Callable[..., Root],
) -> None:
    root = make_root(behaviour=SLOW, tables=TABLES)
    daemon = root.start()
    root.drop("a.jsonl", rows(200, "a"))
    running = root.running("a.jsonl", step=10)
    trainer = root.trainer(running)
    with closing(sqlite3.connect(root.settings.store_path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        root.drop("b.jsonl", rows(3, "b"))
        status = wait_until(lambda: told(root, "locked"), what="the status to say that the store is locked")
        assert status
        wait_until(lambda: not trainer.alive, what="the trainer to end meanwhile")
        assert daemon.poll() is None
        other.execute("ROLLBACK")
    done = root.finished("a.jsonl")
    assert (done.state, done.attempt) == (JobState.SUCCEEDED, 1)
    assert root.finished("b.jsonl").state is JobState.SUCCEEDED
    assert root.stop() == 0
    assert "Traceback" not in root.errors()
    assert_sound(root)


@pytest.mark.parametrize("damage", ["an altered row", "tables that are gone"])
def test_a_store_that_is_damaged_while_it_is_used_is_rebuilt_and_the_trainer_goes_on(
    make_root: Callable[..., Root], damage: str
) -> None:
    root = make_root(behaviour=SLOW, tables=TABLES)
    daemon = root.start()
    root.drop("before.jsonl", rows(2, "before"))
    before = root.finished("before.jsonl")
    root.drop("a.jsonl", rows(300, "a"))
    running = root.running("a.jsonl", step=20)
    root.drop("b.jsonl", rows(3, "b"))
    wait_until(lambda: (job := root.job("b.jsonl")) and job.state is JobState.QUEUED)
    path = root.settings.store_path
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        statement = "UPDATE jobs SET body = substr(body, 9)" if damage == "an altered row" else "DROP TABLE jobs"
        db.execute(statement)
    wait_until(lambda: root.events("store.rebuilt"), what="the store to be rebuilt")
    assert daemon.poll() is None
    root.behave({})
    done = root.finished("a.jsonl")
    assert (done.state, done.id, done.attempt) == (JobState.SUCCEEDED, running.id, 1)
    assert root.finished("b.jsonl").state is JobState.SUCCEEDED
    assert (root.job("before.jsonl") or before).id == before.id
    assert len(list(root.settings.state_dir.glob("queue.sqlite3.unreadable-*[0-9]"))) == 1
    assert root.stop() == 0
    assert "Traceback" not in root.errors()
    assert len(list_versions(root.settings.model_dir)) == 3


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS], ids=["EIO", "EROFS"])
def test_a_disk_that_fails_every_write_for_a_while_holds_and_the_trainer_goes_on(
    make_root: Callable[..., Root], failing_disk: Path, tmp_path: Path, number: int
) -> None:
    broken = tmp_path / "broken"
    root = make_root(
        behaviour=SLOW,
        tables=TABLES,
        variables={
            "LD_PRELOAD": str(failing_disk),
            "FAULT_ROOT": str(tmp_path / "root" / "state"),
            "FAULT_CALL": "write",
            "FAULT_ERRNO": str(number),
            "FAULT_FOREVER": "1",
            "FAULT_WHILE": str(broken),
        },
    )
    daemon = root.start()
    root.drop("a.jsonl", rows(250, "a"))
    root.running("a.jsonl", step=20)
    broken.touch()
    root.drop("b.jsonl", rows(3, "b"))
    wait_until(lambda: "queue.held" in (root.path / "daemon.err").read_text(), what="a word on stderr")
    assert daemon.poll() is None
    broken.unlink()
    done = root.finished("a.jsonl")
    assert (done.state, done.attempt) == (JobState.SUCCEEDED, 1), done
    assert root.finished("b.jsonl").state is JobState.SUCCEEDED
    assert root.stop() == 0
    assert "Traceback" not in (root.path / "daemon.err").read_text()
    assert not list(root.settings.state_dir.glob("*unreadable*"))
    assert_sound(root)


def test_run_once_on_a_disk_that_became_read_only_ends_with_a_sentence(
    make_root: Callable[..., Root], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_root(behaviour={}, tables=TABLES)
    root.start()
    assert root.stop() == 0
    inbox = root.settings.inbox_dir
    kept = inbox.with_name("kept")
    shutil.copytree(inbox, kept)
    with mounted(inbox, "8m"):
        shutil.copytree(kept, inbox, dirs_exist_ok=True)
        (inbox / "a.jsonl").write_text('{"text": "a"}\n')
        os.utime(inbox / "a.jsonl", (1, 1))
        with read_only(inbox):
            done = root.run("run", "--once", timeout=60)
        assert done.returncode == 1, done.stderr
        assert "read-only file system" in done.stderr
        assert "Traceback" not in done.stderr
        again = root.run("run", "--once")
        assert again.returncode == 0, again.stderr
