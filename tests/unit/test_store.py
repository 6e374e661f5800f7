"""The store: every move of a job is one compare-and-set with its event, and survives the process."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from daemon.errors import NotFound, StoreError
from daemon.job import TRANSITIONS, Dataset, Job, JobState, Priority
from daemon.store import JobStore, TransitionRefused


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "queue.sqlite3")


def queued(store: JobStore, job_id: str, **fields: object) -> Job:
    store.add(Job(id=job_id, name=f"{job_id}.jsonl", state=JobState.CLAIMED, **fields))  # type: ignore[arg-type]
    return store.transition(job_id, JobState.CLAIMED, JobState.QUEUED, "checked")


def test_a_move_and_its_event_are_both_there_after_reopening(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "queue.sqlite3")
    queued(store, "a")
    store.close()
    again = JobStore(tmp_path / "queue.sqlite3")
    assert again.get("a").state is JobState.QUEUED
    assert [(event.old, event.new) for event in again.events("a")] == [(None, "claimed"), ("claimed", "queued")]


@pytest.mark.parametrize("old", list(JobState))
@pytest.mark.parametrize("new", list(JobState))
def test_only_moves_of_the_table_happen(store: JobStore, old: JobState, new: JobState) -> None:
    store.add(Job(id="a", name="a", state=old))
    if new in TRANSITIONS[old]:
        assert store.transition("a", old, new, "because").state is new
    else:
        with pytest.raises(TransitionRefused):
            store.transition("a", old, new, "because")
        assert store.get("a").state is old
        assert len(store.events("a")) == 1


def test_of_two_that_saw_the_same_state_one_wins(tmp_path: Path) -> None:
    one, two = JobStore(tmp_path / "q"), JobStore(tmp_path / "q")
    queued(one, "a")
    one.transition("a", JobState.QUEUED, JobState.RUNNING, "mine")
    with pytest.raises(TransitionRefused, match="it is running"):
        two.transition("a", JobState.QUEUED, JobState.CANCELLED, "mine")


def test_priority_then_arrival_decides_and_back_off_waits(store: JobStore) -> None:
    queued(store, "late-normal")
    queued(store, "low", priority=Priority.LOW)
    queued(store, "high-waiting", priority=Priority.HIGH, not_before=100.0)
    queued(store, "high", priority=Priority.HIGH)
    order = []
    while (job := store.claim_next(now=50.0)) is not None:
        order.append(job.id)
        assert job.attempt == 1
    assert order == ["high", "late-normal", "low"]
    assert store.claim_next(now=100.0) is not None


def test_names_of_any_bytes_survive(store: JobStore) -> None:
    name = os.fsdecode(b"caf\xe9 \n\x1b[31m.jsonl")
    dataset = Dataset(name=name, path=f"/tmp/{name}", size_bytes=1, rows=1, digest="00", format="text")
    store.add(Job(id="a", name=name, state=JobState.CLAIMED, dataset=dataset, reason=f"found {name}"))
    job = store.get("a")
    assert job.name == name
    assert job.dataset == dataset
    assert os.fsencode(job.name) == b"caf\xe9 \n\x1b[31m.jsonl"


def test_a_job_is_found_by_either_end_of_its_id_unless_that_is_ambiguous(store: JobStore) -> None:
    for job_id in ("20260101-000000-aaaa", "20260101-000000-bbbb"):
        store.add(Job(id=job_id, name="x", state=JobState.CLAIMED))
    assert store.find("bbbb").id.endswith("bbbb")
    with pytest.raises(NotFound, match="more than one"):
        store.find("2026")
    with pytest.raises(NotFound, match="no such job"):
        store.find("%")


@pytest.mark.parametrize("content", [b"this is no database at all, but long enough to be read as one" * 40, b"{}"])
def test_what_is_no_store_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "queue.sqlite3"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="left as it is"):
        JobStore(path)
    assert path.read_bytes() == content


def test_a_store_of_a_newer_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite3"
    JobStore(path).close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'")
    db.close()
    with pytest.raises(StoreError, match="99"):
        JobStore(path)
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT value FROM meta").fetchone() == ("99",)
    db.close()
