"""The store: every move of a job is one compare-and-set with its event, and survives the process."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from daemon.errors import NotFound, StoreError
from daemon.job import TRANSITIONS, Dataset, Job, JobState, Priority, from_json, to_json
from daemon.store import BrokenStore, JobStore, NewerStore, TransitionRefused


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
    assert [(event.old, event.new) for event in again.transitions("a")] == [(None, "claimed"), ("claimed", "queued")]


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
        assert len(store.transitions("a")) == 1


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


def test_a_job_that_has_begun_goes_on_first_and_is_waited_for(store: JobStore) -> None:
    """Whatever ran before it would clear its checkpoints: hours of a GPU, for a back-off of seconds."""
    queued(store, "normal")
    queued(store, "begun", priority=Priority.LOW, max_step=400, not_before=100.0)
    queued(store, "high", priority=Priority.HIGH)
    assert [job.id for job in store.queue()] == ["begun", "high", "normal"]
    assert store.claim_next(now=50.0) is None
    assert store.next_due(now=50.0) == 100.0
    order = [job.id for job in iter(lambda: store.claim_next(now=100.0), None) if job is not None]
    assert order == ["begun", "high", "normal"]


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_a_day_holds_no_job_back(store: JobStore, jump: float) -> None:
    """Back-offs are kept as times of day; one that the clock was set back behind must not wait for a day."""
    queued(store, "a", not_before=1e9 + 30)
    assert store.claim_next(1e9) is None
    assert store.claim_next(1e9 + 30 + jump) is not None


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
    with pytest.raises(BrokenStore, match="left as it is"):
        JobStore(path)
    assert path.read_bytes() == content


def test_a_store_that_cannot_be_opened_now_is_not_called_broken(tmp_path: Path) -> None:
    """No permission, no room, a lock: the file may be whole, and is not set aside."""
    path = tmp_path / "queue.sqlite3"
    JobStore(path).close()
    (tmp_path / "queue.sqlite3-wal").mkdir()  # SQLite cannot open its log: as without permission, whoever we are
    with pytest.raises(StoreError) as caught:
        JobStore(path)
    assert not isinstance(caught.value, BrokenStore)


def test_a_wish_for_a_job_that_has_moved_on_is_refused(store: JobStore) -> None:
    """Or a cancellation of a running job would be lost on one that went back to the queue."""
    job = queued(store, "a")
    with pytest.raises(TransitionRefused, match="queued"):
        store.update(job.id, expected=JobState.RUNNING, cancel_request="cancel")
    assert store.get(job.id).cancel_request == ""


def test_the_keys_of_stored_jobs_are_those_of_earlier_releases(store: JobStore) -> None:
    """Fields may be renamed; stores on disk and scripts that read `show --json` know the keys."""
    job = queued(store, "a", cancel_request="return", attempts_without_progress=2)
    plain = json.loads(to_json(job))
    assert (plain["wanted"], plain["fruitless"]) == ("return", 2)
    assert not {"cancel_request", "attempts_without_progress"} & plain.keys()
    assert from_json(to_json(job), Job) == job == store.get("a")


def test_a_store_of_a_newer_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite3"
    JobStore(path).close()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'")
    with pytest.raises(NewerStore, match="99"):
        JobStore(path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT value FROM meta").fetchone() == ("99",)


def test_a_store_of_version_1_is_opened_and_knows_everything_it_knew(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite3"
    shutil.copyfile(Path(__file__).parents[1] / "data" / "queue-v1.sqlite3", path)
    store = JobStore(path)
    assert [job.state for job in store.jobs()] == ["succeeded", "failed", "queued", "queued", "rejected"]
    assert {state: number for state, number in store.counts().items() if number} == {
        "succeeded": 1, "failed": 1, "queued": 2, "rejected": 1,
    }  # fmt: skip
    assert [job.name for job in store.queue()] == ["3.jsonl", "2.jsonl"]  # the other one has low priority
    assert [event.new for event in store.transitions("20260101-000000-0000")] == [
        "claimed",
        "queued",
        "running",
        "succeeded",
    ]
    assert [job.version for job in store.with_digest("aa" * 32, {JobState.SUCCEEDED})] == ["0001"]
    store.close()
    assert JobStore(path).counts()["queued"] == 2


def test_damage_that_opening_does_not_meet_is_found_by_checking(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite3"
    store = JobStore(path)
    for number in range(300):
        queued(store, f"job-{number:04}")
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    data = bytearray(path.read_bytes())
    for page in range(5, len(data) // 4096):
        data[page * 4096 : page * 4096 + 200] = b"\xff" * 200
    path.write_bytes(data)
    with pytest.raises(BrokenStore):
        JobStore(path, check=True)
    assert path.read_bytes() == data


def test_a_name_of_any_bytes_finds_no_job(store: JobStore) -> None:
    queued(store, "job-1")
    with pytest.raises(NotFound, match="there is no such job"):
        store.find("b\udcff\n")


def test_counts_are_those_of_the_rows_after_any_moves(store: JobStore) -> None:
    for number in range(5):
        queued(store, f"job-{number}")
    store.claim_next(0.0)
    store.transition("job-1", JobState.QUEUED, JobState.CANCELLED, "not wanted")
    store.transition("job-1", JobState.CANCELLED, JobState.CLAIMED, "wanted after all")
    store.transition("job-0", JobState.RUNNING, JobState.SUCCEEDED, "done")
    store.transition("job-2", JobState.QUEUED, JobState.CANCELLED, "not wanted")
    for job_id in ("job-3", "job-4"):
        store.transition(job_id, JobState.QUEUED, JobState.CANCELLED, "trained before", duplicate_of="job-0")
    store.transition("job-4", JobState.CANCELLED, JobState.CLAIMED, "trained again", duplicate_of=None)
    jobs = store.jobs()
    counted = {state.value: sum(job.state is state and not job.is_duplicate for job in jobs) for state in JobState}
    assert store.counts() == {**counted, "duplicate": 1}


def test_a_store_of_before_duplicates_were_counted_counts_them(tmp_path: Path) -> None:
    """The rows of the old form are brought to the new one by the migration alone."""
    path = tmp_path / "queue.sqlite3"
    store = JobStore(path)
    for number in range(3):
        queued(store, f"job-{number}")
    store.transition("job-0", JobState.QUEUED, JobState.CANCELLED, "not wanted")
    store.transition("job-1", JobState.QUEUED, JobState.CANCELLED, "trained before", duplicate_of="job-9")
    store.close()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DELETE FROM counts WHERE state = 'duplicate'")
        db.execute("UPDATE counts SET number = 2 WHERE state = 'cancelled'")
        db.execute("UPDATE meta SET value = '4' WHERE key = 'schema_version'")
    again = JobStore(path)
    assert {name: number for name, number in again.counts().items() if number} == {
        "queued": 1, "cancelled": 1, "duplicate": 1,
    }  # fmt: skip


def test_a_job_that_is_moved_first_runs_next_within_its_priority(store: JobStore) -> None:
    for job_id in ("a", "b", "c"):
        queued(store, job_id)
    queued(store, "high", priority=Priority.HIGH)
    store.reorder("c", first=True)
    store.reorder("b", first=True)
    assert [job.id for job in store.queue()] == ["high", "b", "c", "a"]
    store.transition("a", JobState.QUEUED, JobState.CANCELLED, "not wanted")
    with pytest.raises(TransitionRefused):
        store.reorder("a", first=True)


def test_what_people_ask_for_outlives_the_process(tmp_path: Path) -> None:
    JobStore(tmp_path / "q").set_control("paused", {"by": "ann"})
    again = JobStore(tmp_path / "q")
    assert again.control("paused") == {"by": "ann"}
    again.set_control("paused", None)
    assert again.control("paused") is None


def test_pruning_forgets_the_moves_of_old_jobs_but_not_what_was_trained(store: JobStore) -> None:
    dataset = Dataset(name="x", path="x", size_bytes=1, rows=1, digest="ab" * 32, format="text")
    queued(store, "trained")
    store.claim_next(0.0)
    store.transition("trained", JobState.RUNNING, JobState.SUCCEEDED, "done", dataset=dataset)
    queued(store, "failed")
    store.claim_next(0.0)
    store.transition("failed", JobState.RUNNING, JobState.FAILED, "broken")
    queued(store, "waiting")
    assert store.prune("2000-01-01") == 0
    assert store.prune("9999-01-01") == 2
    assert [job.id for job in store.jobs()] == ["trained", "waiting"]
    assert store.with_digest("ab" * 32, {JobState.SUCCEEDED})
    assert (store.transitions("trained"), len(store.transitions("waiting"))) == ([], 2)
    assert store.counts()["failed"] == 0
