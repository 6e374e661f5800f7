"""Rows of earlier datasets are trained again beside the new ones: those that the current version has learned, no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from daemon.job import Job, JobState, Outcome, RunSpec
from daemon.memory import replay
from daemon.memory.store import DatasetMemory, dataset_dir, digest_of, memory_dir_of, read_memory
from daemon.run_dir import run_dir_of
from tests.support.inprocess import StopAfterLoading, events, promote, specify, train
from tests.support.root import Root
from tests.support.sound import assert_sound

MakeRoot = Callable[..., Root]
SHORT = {"training": {"learning_rate": 1e-3, "save_steps": 1}, "data": {"max_length": 64}}


def pairs(topic: str, count: int = 60, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"{topic} {n}? ", "completion": f"answer {n} of {topic}"} for n in range(start, start + count)]


def finished(root: Root, name: str, content: Any) -> Job:
    root.drop(name, content)
    job = root.finished(name)
    assert job.state is JobState.SUCCEEDED, f"{job.reason} {root.errors()}"
    return job


def replayed(root: Root, job: Job) -> dict[str, int]:
    assert job.result is not None
    found = {dataset.name: dataset.rows for dataset in job.result.replayed}
    path = run_dir_of(root.settings.state_dir, job.id) / replay.ROWS_NAME
    assert sum(found.values()) == (len(path.read_text().splitlines()) if path.exists() else 0)
    return found


def memory_of(state_dir: Path, digest: str) -> DatasetMemory:
    memory = read_memory(dataset_dir(memory_dir_of(state_dir), digest))
    assert memory is not None
    return memory


def frozen_digests(run_dir: Path) -> list[str]:
    return [json.loads(line)["digest"] for line in (run_dir / replay.ROWS_NAME).read_text().splitlines()]


def test_a_run_rehearses_what_its_parent_has_learned_also_after_a_rollback(
    make_root: MakeRoot, tiny_base: Path
) -> None:
    root = make_root(base_model=tiny_base, tables={**SHORT, "limits": {"max_steps": 20}})
    root.start()
    first = finished(root, "a.jsonl", pairs("apple"))
    assert replayed(root, first) == {}
    second = finished(root, "b.jsonl", pairs("pear"))
    # 48 new rows: a quarter of the whole is 16 rows, which is also the least of each dataset.
    assert replayed(root, second).keys() == {"a.jsonl"}
    assert 12 <= replayed(root, second)["a.jsonl"] <= 16
    assert second.result is not None
    assert second.result.steps_run == -(-(second.result.rows + replayed(root, second)["a.jsonl"]) // 8)
    third = finished(root, "c.jsonl", pairs("plum", 200))
    assert replayed(root, third).keys() == {"a.jsonl", "b.jsonl"}
    assert third.result is not None
    assert third.result.steps_run > 20  # 20 of its own rows: a limit is of what a file asks for
    shown = " ".join(root.run("show", third.id).stdout.split())
    assert "rows of earlier datasets" in shown
    assert "of a.jsonl" in shown

    assert root.run("rollback", "1").returncode == 0
    after = finished(root, "d.jsonl", pairs("fig"))
    assert replayed(root, after).keys() == {"a.jsonl"}
    (root.settings.inbox_dir / "e.job.toml").write_text('[training]\nstart_from = "base"\n')
    assert replayed(root, finished(root, "e.jsonl", pairs("date"))) == {}
    assert_sound(root)


def specified(folder: Path, name: str, base: Path, rows: list[dict[str, str]], **tables: Any) -> RunSpec:
    """A run over `rows` on the model directory and state that all runs in `folder` share."""
    from dataclasses import replace

    spec = specify(folder / name, rows, base, {**SHORT, **tables}, format_="prompt_completion")
    shared = {"model_dir": str(folder / "model"), "state_dir": str(folder / "state")}
    for path in shared.values():
        Path(path).mkdir(exist_ok=True)
    return replace(spec, job_id=name, dataset=replace(spec.dataset, name=f"{name}.jsonl"), **shared)


def trained(spec: RunSpec) -> Any:
    result = train(spec)
    assert result.outcome is Outcome.SUCCEEDED, result.message
    promote(spec, result)
    return result


def test_a_stopped_run_goes_on_with_the_same_rows_and_ends_with_the_weights_of_one_that_was_not(
    tiny_base: Path, tmp_path: Path
) -> None:
    weights = []
    for folder in (tmp_path / "stopped", tmp_path / "whole"):
        folder.mkdir()
        key = memory_dir_of(folder / "state") / "key"
        key.parent.mkdir(parents=True)
        key.write_bytes(b"k" * 32)
        trained(specified(folder, "a", tiny_base, pairs("apple")))
        spec = specified(folder, "b", tiny_base, pairs("pear"))
        if folder.name == "stopped":
            assert train(spec, StopAfterLoading()).outcome is Outcome.INTERRUPTED
            before = (Path(spec.run_dir) / replay.ROWS_NAME).read_bytes()
            result = train(spec)
            assert (result.start_step, result.verdict) == (1, "resume")
            assert (Path(spec.run_dir) / replay.ROWS_NAME).read_bytes() == before
        else:
            result = train(spec)
        assert sum(dataset.rows for dataset in result.replayed) > 0
        weights.append(load_file(Path(result.candidate or "", "adapter_model.safetensors")))
    stopped, whole = weights
    assert all(bool((stopped[name] == whole[name]).all()) for name in whole)


def test_no_row_is_rehearsed_that_is_held_out_or_stands_in_the_new_file(tiny_base: Path, tmp_path: Path) -> None:
    a = specified(tmp_path, "a", tiny_base, pairs("apple"))
    trained(a)
    # Half of the new file is of the first: also a union of all files, dropped every night.
    b = specified(tmp_path, "b", tiny_base, [*pairs("apple", 40), *pairs("pear", 80)])
    result = trained(b)
    rehearsed = set(frozen_digests(Path(b.run_dir)))
    assert rehearsed
    first, second = (memory_of(tmp_path / "state", spec.dataset.digest) for spec in (a, b))
    assert not rehearsed & {row.digest for row in (*first.held_out(), *second.held_out(), *second.rows())}
    assert rehearsed <= {row.digest for row in first.rows()}
    assert result.withheld_rows > 0
    union = specified(tmp_path, "union", tiny_base, [*pairs("apple"), *pairs("pear", 80)])
    assert trained(union).replayed == ()


def test_a_new_answer_retires_the_old_one_for_training_and_for_measuring(tiny_base: Path, tmp_path: Path) -> None:
    a = specified(tmp_path, "a", tiny_base, pairs("apple"))
    trained(a)
    changed = [{**row, "completion": "something else"} for row in pairs("apple", 30)]
    b = specified(tmp_path, "b", tiny_base, [*changed, *pairs("pear")])
    trained(b)
    first, second = (memory_of(tmp_path / "state", spec.dataset.digest) for spec in (a, b))
    answered = {row.asks for row in second.rows()}
    gone = {row.digest for row in (*first.rows(), *first.held_out()) if row.asks in answered}
    assert len(gone) >= 20
    assert gone == second.retired()
    c = specified(tmp_path, "c", tiny_base, pairs("plum", 300))
    trained(c)
    rehearsed = set(frozen_digests(Path(c.run_dir)))
    assert rehearsed & {row.digest for row in first.rows()}
    assert not rehearsed & gone
    assert events(b, "run.replay_drawn")[0]["replaced_rows"] == len(gone)


@pytest.mark.parametrize("damage", ["edited", "cut", "meta", "gone", "another_version"])
def test_a_damaged_memory_is_passed_over_and_told(tiny_base: Path, tmp_path: Path, damage: str) -> None:
    a = specified(tmp_path, "a", tiny_base, pairs("apple", 30))
    trained(a)
    folder = dataset_dir(memory_dir_of(tmp_path / "state"), a.dataset.digest)
    path = folder / ("meta.json" if damage == "meta" else "rows.jsonl")
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "another_version":  # whole, and yet not what is read
        other = content.replace(b'"asks"', b'"asked"')
        path.write_bytes(other)
        meta = (folder / "meta.json").read_text()
        marks = json.loads(meta)["files"]["rows.jsonl"]
        meta = meta.replace(marks["digest"], digest_of(other)).replace(str(len(content)), str(len(other)))
        (folder / "meta.json").write_text(meta)
    else:
        path.write_bytes(content[: len(content) // 2] if damage in ("cut", "meta") else content.replace(b"7", b"8", 1))
    result = train(specified(tmp_path, "b", tiny_base, pairs("pear", 30)))
    assert result.outcome is Outcome.SUCCEEDED
    assert result.replayed == ()
    told = [warning for warning in result.warnings if str(folder) in warning]
    assert len(told) == 1


def test_a_root_of_before_there_was_a_memory_goes_on(make_root: MakeRoot, tiny_base: Path) -> None:
    """Its versions name datasets of which nothing is kept."""
    import shutil

    root = make_root(base_model=tiny_base, tables=SHORT)
    root.start()
    finished(root, "a.jsonl", pairs("apple", 30))
    shutil.rmtree(memory_dir_of(root.settings.state_dir))
    assert replayed(root, finished(root, "b.jsonl", pairs("pear", 30))) == {}
    assert replayed(root, finished(root, "c.jsonl", pairs("plum", 30))).keys() == {"b.jsonl"}
    assert_sound(root)
