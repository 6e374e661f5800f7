"""One invariant check that any test may end with: is everything in this root accounted for?"""

from __future__ import annotations

import json
import os

from daemon.in_hand import NOTE_NAME
from daemon.job import FINAL_STATES, JobState
from daemon.lineage import read_lineage
from daemon.memory.store import (
    FILE_NAMES,
    HELD_OUT_NAME,
    META_NAME,
    RETIRED_INDEX,
    ROWS_NAME,
    held_out_registry,
    list_memories,
    memory_dir_of,
)
from daemon.versions import list_versions
from tests.support.root import Root
from tests.support.sound_model import assert_model_dir_sound


def assert_sound(root: Root) -> None:
    """Every job is in one state and its file in one place; versions, lineage and jobs agree; nothing half-done is left."""
    settings = root.settings
    assert_model_dir_sound(settings.model_dir)
    jobs = {job.id: job for job in root.jobs()}
    inbox = settings.inbox_dir
    places = {
        name: {entry.name for entry in os.scandir(inbox / name)} if (inbox / name).is_dir() else set()
        for name in ("processing", "done", "failed")
    }
    for job in jobs.values():
        at = [name for name, ids in places.items() if job.id in ids]
        if job.state in FINAL_STATES:
            expected = ["failed"] if job.state in (JobState.FAILED, JobState.REJECTED) else ["done"]
            if job.state is JobState.CANCELLED:
                expected = [name for name in at if name in ("done", "failed")]
        else:
            expected = ["processing"]
        assert at == expected, f"job {job.id} is {job.state}, its file is in {at}"
        if job.state is JobState.CANCELLED and job.dataset is None:
            continue  # its claim was taken back: the file stayed in the inbox, and became another job
        if job.state is JobState.CANCELLED and job.cancel_request == "return":
            continue  # a person has it back
        assert any(entry.name == job.name for entry in os.scandir(inbox / at[0] / job.id)), f"{job.id} lost its file"
    for name, ids in places.items():
        assert ids <= jobs.keys(), f"{name}/ holds {ids - jobs.keys()}, which no job knows"

    succeeded = {job.version: job for job in jobs.values() if job.state is JobState.SUCCEEDED}
    for job in succeeded.values():
        if job.result is None:  # only the folders tell of it: the queue was lost, or older than they
            assert job.reason == f"known from version {job.version}"
            continue
        assert job.result.steps_planned >= job.result.steps_run >= 1
        assert job.result.steps_run == job.result.steps_planned or job.result.stopped_early
    assert len(succeeded) == sum(job.state is JobState.SUCCEEDED for job in jobs.values()), "two jobs claim one version"
    running = {job.id for job in jobs.values() if job.state is JobState.RUNNING}
    assert len(running) <= 1
    first_runs = {job.first_run.version: job.id for job in jobs.values() if job.first_run}
    for version in list_versions(settings.model_dir):
        owner = version.record["job"]
        is_known = succeeded.get(version.name) == jobs[owner] or first_runs.get(version.name) == owner
        assert is_known or owner in running, f"{version.name} has no job"
    for name in read_lineage(settings.model_dir).held():
        job = succeeded.get(name)
        assert job is None or job.result is None or job.reason.startswith("held: "), f"{name} is held in silence"
    assert_memory_sound(root)
    note = settings.state_dir / NOTE_NAME
    if (root.status() or {}).get("status") == "stopped" and note.exists():
        assert not note.read_bytes().strip(), "a daemon that stopped in order left a note of what it had in hand"
    lines = settings.log_path.read_bytes().splitlines() if settings.log_path.exists() else []
    for line in lines:
        json.loads(line)


def assert_memory_sound(root: Root) -> None:
    """Every memory is as it was written, is of a dataset that was trained, and no row of it is both held out and kept to train."""
    settings = root.settings
    trained = {str(version.record.get("dataset_digest")) for version in list_versions(settings.model_dir)}
    open_jobs = {job.dataset.digest for job in root.jobs() if job.dataset and job.state not in FINAL_STATES}
    memories, problems = list_memories(memory_dir_of(settings.state_dir))
    assert problems == []
    held_out, problems = held_out_registry(memories)
    assert problems == []
    retired = {digest for memory in memories for digest in memory.retired()}
    for memory in memories:
        meta = memory.meta
        assert meta.digest in trained | open_jobs, f"{memory.path} is of a dataset that no version has learned"
        assert {name for name in FILE_NAMES if (memory.path / name).exists()} >= meta.files.keys()
        rows, apart = memory.rows(), memory.held_out()
        assert (len(rows), len(apart)) == (meta.mark(ROWS_NAME).rows, meta.mark(HELD_OUT_NAME).rows)
        assert {row.digest for row in apart} <= held_out.keys() | retired
        both = {row.digest for row in rows} & {row.digest for row in apart}
        assert not both, f"{memory.path} keeps held-out rows to train"
        if meta.discarded:
            assert {path.name for path in memory.path.iterdir()} <= {META_NAME, RETIRED_INDEX}
    kept_bytes = sum(memory.meta.mark(ROWS_NAME).size_bytes for memory in memories)
    assert kept_bytes <= settings.replay.memory_bytes
