"""SIGKILL, or a full disk, at every call that changes the memories: nothing wrong is ever read, and a second call finishes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.dataset.rows import Row
from daemon.job import ReplayedDataset
from daemon.memory import replay
from daemon.memory.store import (
    META_NAME,
    DatasetMeta,
    Discarded,
    MemoryDamaged,
    dataset_dir,
    encode_row,
    held_out_registry,
    list_memories,
    memory_dir_of,
    write_memory,
)
from tests.fault.daemon import scenarios
from tests.support.killpoints import KilledRun, full_disk_runs, killed_runs

OLD, AGAIN = "a" * 64, "b" * 64
Runs = Callable[[str, Callable[[Path], dict[str, Any]], Path], Iterator[KilledRun]]


def line(number: int, topic: str) -> bytes:
    return encode_row(Row(kind="text", text=f"{topic} {number}" * 9, line=number, content_digest=digest(number, topic)))


def digest(number: int, topic: str) -> str:
    return f"{number:02x}{topic.encode().hex():0<30}"[:32]


def write(folder: Path, name: str, of: str, topic: str, count: int) -> None:
    meta = DatasetMeta(
        name=name, digest=of, job="job", trained_rows=count, trained_tokens=9, train_on="auto", created_at="2026"
    )
    rows = [line(number, topic) for number in range(count)]
    held_out = [(digest(number, topic), line(number, topic)) for number in range(count, count + 3)]
    write_memory(folder, meta, rows=rows, held_out=held_out)


def prepare(root: Path) -> dict[str, Any]:
    """Two memories, one of them of the dataset that a run has trained again, and what an open run has drawn."""
    memories = memory_dir_of(root)
    write(dataset_dir(memories, OLD), "old.jsonl", OLD, "old", 20)
    write(dataset_dir(memories, AGAIN), "again.jsonl", AGAIN, "before", 5)
    write(root / "runs" / "job" / "memory", "again.jsonl", AGAIN, "after", 8)
    drawn = [ReplayedDataset(name="old.jsonl", digest=OLD, rows=2, tokens=9)]
    (root / "runs" / "open").mkdir()
    replay.freeze(root / "runs" / "open", {}, drawn, [line(number, "old") for number in range(2)])
    return {"state": str(root)}


def readable(root: Path) -> dict[str, list[str]]:
    """The texts of each kept memory's rows; a memory may be refused as damaged, and never read wrong."""
    memories, problems = list_memories(memory_dir_of(root))
    assert problems == []
    found = {}
    for memory in memories:
        try:
            texts = [row.line.decode() for row in memory.rows()]
            apart = {row.digest for row in memory.held_out()}
        except MemoryDamaged:
            continue
        found[memory.meta.name] = texts
        if memory.is_kept:
            assert apart <= held_out_registry([memory])[0].keys()
            assert len(texts) == memory.meta.mark("rows.jsonl").rows
    return found


@pytest.mark.parametrize("runs", [killed_runs, full_disk_runs], ids=["killed", "full"])
def test_a_promotion_keeps_each_memory_as_it_was_or_as_it_shall_be(tmp_path: Path, runs: Runs) -> None:
    for run in runs("tests.fault.daemon.scenarios:keep_memory", prepare, tmp_path):
        before = readable(run.root)
        for name, topics in (("old.jsonl", {"old"}), ("again.jsonl", {"before", "after"})):
            topic = {text.split('"text": "')[1].split()[0] for text in before.get(name, [])}
            assert len(topic) <= 1, str(run)
            assert topic <= topics, str(run)
        assert scenarios.keep_memory(str(run.root)) == ""
        after = readable(run.root)
        assert all("after" in text for text in after["again.jsonl"]), str(run)
        assert after.keys() == {"old.jsonl", "again.jsonl"}
        assert sum(len(text) for texts in after.values() for text in texts) <= 3000
        # The smallest hashes stay: what is left is a beginning of what was.
        assert after["old.jsonl"] == [line(number, "old").decode() for number in range(len(after["old.jsonl"]))]
        assert len(after["old.jsonl"]) >= 5
        assert not (run.root / "runs" / "job" / "memory" / META_NAME).exists()


@pytest.mark.parametrize("runs", [killed_runs, full_disk_runs], ids=["killed", "full"])
def test_what_is_forgotten_is_never_half_there(tmp_path: Path, runs: Runs) -> None:
    """From the first note on nothing draws it; a second call, or the next start, deletes the rest."""

    def with_name(root: Path) -> dict[str, Any]:
        return {**prepare(root), "name": "old.jsonl"}

    for run in runs("tests.fault.daemon.scenarios:forget", with_name, tmp_path):
        memories, _ = list_memories(memory_dir_of(run.root))
        [memory] = [found for found in memories if found.meta.digest == OLD]
        assert len(memory.rows()) == (20 if memory.is_kept else 0), str(run)
        assert scenarios.forget(str(run.root), "old.jsonl") == ""
        assert not [path for path in run.root.rglob("*") if path.is_file() and b"old 1" in path.read_bytes()], str(run)
        memories, _ = list_memories(memory_dir_of(run.root))
        assert {found.meta.name: found.meta.discarded for found in memories} == {
            "old.jsonl": Discarded.FORGOTTEN,
            "again.jsonl": Discarded.NO,
        }
