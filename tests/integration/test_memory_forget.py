"""What is forgotten is gone: from the memory, from what open runs have drawn, and from what they go on with."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from daemon.job import Job, JobState
from daemon.memory import replay
from daemon.memory.store import Discarded, dataset_dir, memory_dir_of, read_memory
from daemon.run_dir import run_dir_of
from tests.support.root import Root, allow, slowed, wait_until
from tests.support.sound import assert_sound

MakeRoot = Callable[..., Root]
TABLES: Mapping[str, Mapping[str, Any]] = {
    "training": {"learning_rate": 1e-3, "save_steps": 1, "logging_steps": 1},
    "data": {"max_length": 64},
}


def pairs(topic: str, count: int = 60) -> list[dict[str, str]]:
    return [{"prompt": f"{topic} {n}? ", "completion": f"answer {n} of {topic}"} for n in range(count)]


def trained(root: Root, name: str, content: Any) -> Job:
    root.drop(name, content)
    job = root.finished(name)
    assert job.state is JobState.SUCCEEDED, f"{job.reason} {root.errors()}"
    return job


def files_with(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def begun(root: Root) -> Job:
    """Two trained datasets, and a third one in the middle of its run, which rehearses both."""
    slowed(root)
    allow(root, 10_000)
    root.start()
    trained(root, "a.jsonl", pairs("apple"))
    trained(root, "b.jsonl", pairs("pear"))
    allow(root, 3)
    root.drop("c.jsonl", pairs("plum", 100))
    job = root.running("c.jsonl", step=2)
    assert files_with(run_dir_of(root.settings.state_dir, job.id), "of apple")
    return job


def assert_without_apples(root: Root, job: Job) -> None:
    assert job.state is JobState.SUCCEEDED, f"{job.reason} {root.errors()}"
    assert job.result is not None
    assert job.result.start_step == 0
    assert [dataset.name for dataset in job.result.replayed] == ["b.jsonl"]
    assert files_with(root.settings.state_dir, "of apple") == []
    assert_sound(root)


def test_a_run_that_was_killed_starts_over_without_what_was_forgotten_meanwhile(
    make_root: MakeRoot, tiny_base: Path
) -> None:
    root = make_root(base_model=tiny_base, tables=TABLES)
    job = begun(root)
    trainer = root.trainer(job)
    root.kill()
    os.kill(trainer.pid, signal.SIGKILL)
    wait_until(lambda: not trainer.alive, what="the trainer to be gone")
    done = root.run("memory", "forget", "a.jsonl")
    assert done.returncode == 0, done.stderr
    assert f"job {job.id} rehearsed rows of it, and starts over without them" in done.stdout
    assert "versions 0001 to 0002 have learned it" in done.stdout
    allow(root, 10_000)
    root.start()
    ended = root.finished("c.jsonl")
    assert_without_apples(root, ended)
    assert ended.result is not None
    assert ended.result.verdict == "stale"
    assert any("replay.datasets" in reason and "a.jsonl" in reason for reason in ended.result.reasons)


def test_a_running_job_is_asked_to_leave_and_starts_over_without(make_root: MakeRoot, tiny_base: Path) -> None:
    root = make_root(base_model=tiny_base, tables=TABLES)
    job = begun(root)
    assert job.dataset is not None
    first = root.job("a.jsonl")
    assert first is not None
    assert first.dataset is not None
    done = root.run("memory", "forget", first.dataset.digest[:12])
    assert done.returncode == 0, done.stderr
    wait_until(lambda: root.events("trainer.asked_to_leave"), what="the trainer to be asked to leave")
    allow(root, 10_000)
    ended = root.finished("c.jsonl")
    assert_without_apples(root, ended)
    assert ended.attempts_without_progress == 0


def test_memory_lists_what_is_kept_and_says_what_is_not(make_root: MakeRoot, tiny_base: Path) -> None:
    root = make_root(base_model=tiny_base, tables=TABLES)
    assert "nothing is kept yet" in root.run("memory").stdout
    root.start()
    trained(root, "a.jsonl", pairs("apple"))
    trained(root, "b.jsonl", pairs("pear", 20))
    found = json.loads(root.run("memory", "--json").stdout)
    assert found["problems"] == []
    a, b = found["datasets"]
    assert (a["name"], a["trained_rows"], a["kept_rows"], a["held_out_rows"]) == ("a.jsonl", 48, 48, 12)
    assert (a["versions"], b["versions"]) == (["0001", "0002"], ["0002"])
    assert a["rehearsed"] is b["rehearsed"] is True
    assert (b["trained_rows"], b["held_out_rows"]) == (20, 0)
    shown = root.run("memory").stdout
    assert "a.jsonl" in shown
    assert "0001-0002" in shown
    assert root.run("rollback", "1").returncode == 0
    assert [one["rehearsed"] for one in json.loads(root.run("memory", "--json").stdout)["datasets"]] == [True, False]

    assert root.run("rollback", "2").returncode == 0
    trained(root, "again.jsonl", [{"n": 1, **row} for row in pairs("apple", 40)])
    missing = root.run("memory", "forget", "c.jsonl")
    assert missing.returncode == 4
    assert "cannot find the memory of c.jsonl: there is none" in missing.stderr
    done = root.run("memory", "forget", "a.jsonl")
    assert done.returncode == 0
    assert "of the same rows are kept of again.jsonl" in done.stdout
    assert "forgotten" in root.run("memory").stdout
    assert root.run("memory", "forget", "a.jsonl").returncode == 0  # said twice, nothing is harmed
    assert_sound(root)


def test_rows_of_files_that_keep_done_days_deletes_do_not_live_on(make_root: MakeRoot, tiny_base: Path) -> None:
    root = make_root(base_model=tiny_base, tables=TABLES)
    root.start()
    job = trained(root, "a.jsonl", pairs("apple"))
    assert root.stop() == 0
    assert files_with(root.settings.state_dir, "of apple")
    root.configure(inbox={"keep_done_days": 1e-6})
    root.start()
    done = root.settings.inbox_dir / "done" / job.id
    wait_until(lambda: not done.exists(), what="the file to be deleted")
    assert files_with(root.settings.state_dir, "of apple") == []
    assert job.dataset is not None
    memory = read_memory(dataset_dir(memory_dir_of(root.settings.state_dir), job.dataset.digest))
    assert memory is not None
    assert memory.meta.discarded is Discarded.DELETED


@pytest.mark.parametrize("left", ["rows", "frozen"])
def test_a_start_finishes_what_a_crash_cut_short_of_forgetting(make_root: MakeRoot, tiny_base: Path, left: str) -> None:
    """Killed after the note that it is forgotten, with rows, or what a run had drawn of them, still there."""
    root = make_root(base_model=tiny_base, tables=TABLES)
    root.start()
    first = trained(root, "a.jsonl", pairs("apple"))
    second = trained(root, "b.jsonl", pairs("pear"))
    assert root.stop() == 0
    assert first.dataset is not None
    folder = dataset_dir(memory_dir_of(root.settings.state_dir), first.dataset.digest)
    run_dir = run_dir_of(root.settings.state_dir, second.id)
    kept = {
        path: path.read_bytes()
        for path in (folder / "rows.jsonl", *run_dir.glob(f"{replay.MANIFEST_NAME}*"), run_dir / replay.ROWS_NAME)
    }
    assert root.run("memory", "forget", "a.jsonl").returncode == 0
    for path, content in kept.items():
        if (path.parent == folder) is (left == "rows"):
            path.write_bytes(content)
    assert files_with(root.settings.state_dir, "of apple")
    root.start()
    assert files_with(root.settings.state_dir, "of apple") == []
    assert_sound(root)


def test_a_start_removes_the_memory_of_a_job_that_ended_without_a_version(make_root: MakeRoot, tiny_base: Path) -> None:
    root = make_root(base_model=tiny_base, tables=TABLES)
    root.start()
    trained(root, "a.jsonl", pairs("apple"))
    root.drop("bad.jsonl", pairs("apple", 12)[:1] * 3 + [{"prompt": "x", "completion": ""}])
    job = root.finished("bad.jsonl")
    assert root.stop() == 0
    folder = dataset_dir(memory_dir_of(root.settings.state_dir), "ab" * 32)
    folder.mkdir()
    meta = {
        "name": "bad.jsonl", "digest": "ab" * 32, "job": job.id, "trained_rows": 1, "trained_tokens": 1, "train_on": "auto",
        "created_at": f"{time.time():.0f}",
    }  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))
    root.start()
    assert folder.exists() is (job.state is JobState.SUCCEEDED)
