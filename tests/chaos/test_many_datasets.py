"""Fifty datasets one after the other, with the real trainer: what comes with their number stays small."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.job import JobState
from daemon.memory.store import ROWS_NAME, list_memories, memory_dir_of
from daemon.run_dir import read_events, run_dir_of
from tests.support.root import Root
from tests.support.sound import assert_sound

MakeRoot = Callable[..., Root]
DATASETS, ROWS = 50, 200
MEMORY_BYTES = 512 * 1024  # a third of what all of it would take
TABLES = {
    "training": {"learning_rate": 1e-3, "save_steps": 1000},
    "data": {"max_length": 64},
    "replay": {"memory_bytes": MEMORY_BYTES},
    "gate": {"action": "warn"},  # each file is about other things: what is held is another test's matter
}


def rows(number: int) -> list[dict[str, str]]:
    filler = "and so on, " * 4
    return [
        {"prompt": f"In house {number}, what is in room {n}? ", "completion": f"{filler}chair {n * 31 % 97 + number}"}
        for n in range(ROWS)
    ]


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_fifty_datasets_take_a_bounded_memory_and_status(make_root: MakeRoot, tiny_base: Path) -> None:
    """Memory keeps to its bytes and starves no dataset, the status is less than 64 KB; what scoring took is printed."""
    root = make_root(base_model=tiny_base, tables=TABLES)
    root.start()
    scored = seconds = wall = 0.0
    largest = 0
    for number in range(DATASETS):
        root.drop(f"{number:02}.jsonl", rows(number))
        job = root.finished(f"{number:02}.jsonl", timeout=600)
        assert job.state is JobState.SUCCEEDED, job.reason
        assert job.result is not None
        wall += job.result.wall_seconds
        for name, data in read_events(run_dir_of(root.settings.state_dir, job.id)):
            if name == "run.gate_judged":
                scored, seconds = scored + data["scored_tokens"], seconds + data["seconds"]
        largest = max(largest, root.settings.status_path.stat().st_size)
        memories, problems = list_memories(memory_dir_of(root.settings.state_dir))
        assert problems == []
        assert sum(memory.meta.mark(ROWS_NAME).size_bytes for memory in memories) <= MEMORY_BYTES
    told = {
        "datasets": len(memories),
        "kept_bytes": sum(memory.meta.mark(ROWS_NAME).size_bytes for memory in memories),
        "kept_rows": [memory.meta.mark(ROWS_NAME).rows for memory in memories],
        "status_bytes": largest,
        "scored_tokens": scored,
        "scoring_share_of_wall": round(seconds / wall, 4),
        "replayed_datasets_of_the_last": len(job.result.replayed),
    }
    print(json.dumps(told))
    assert len(memories) == DATASETS
    # Every dataset keeps a part of its own: the sharing starves none.
    assert min(told["kept_rows"]) > 0
    assert largest < 64 * 1024
    assert_sound(root)
