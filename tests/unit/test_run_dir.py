"""The channel between daemon and trainer, over whatever a crash, an old version or another program leaves in it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from daemon.job import RUN_SPEC_VERSION, Dataset, Outcome, RunResult, RunSpec
from daemon.processes import identify
from daemon.run_dir import (
    EVENTS_NAME,
    PROGRESS_NAME,
    RESULT_NAME,
    SPEC_NAME,
    RunReader,
    RunWriter,
    begin_attempt,
    latest_spec,
    read_identity,
    read_spec,
    run_dir_of,
    sealed_step,
    step_in,
    write_identity,
)

ODD_STEPS = [None, "x", "7", 1.5, float("inf"), True, -1, [], {}]


def spec_in(state_dir: Path, job_id: str = "a") -> RunSpec:
    dataset = Dataset(name="a", path="a", size_bytes=1, rows=1, digest="d", format="text")
    run_dir = run_dir_of(state_dir, job_id)
    return RunSpec(
        schema_version=RUN_SPEC_VERSION, job_id=job_id, attempt=1, dataset=dataset, recipe={}, run_dir=str(run_dir),
        model_dir="m",
    )  # fmt: skip


def test_what_a_trainer_writes_the_daemon_reads(tmp_path: Path) -> None:
    spec = spec_in(tmp_path)
    run_dir = begin_attempt(spec)
    reader = RunReader(run_dir)
    assert (reader.events(), reader.progress(), reader.result()) == ([], None, None)
    writer = RunWriter(run_dir)
    writer.event("checkpoint.sealed", step=3)
    writer.progress(phase="training", step=3)
    assert read_spec(run_dir) == spec
    assert reader.events() == [("checkpoint.sealed", {"step": 3})]
    assert reader.events() == []  # each once
    progress = reader.progress()
    assert progress is not None
    assert (progress.phase, progress.step) == ("training", 3)
    result = RunResult(outcome=Outcome.SUCCEEDED, steps_run=3)
    writer.result(result)
    assert reader.result() == result
    assert sealed_step(run_dir) == 3


def test_an_attempt_reads_nothing_of_the_one_before(tmp_path: Path) -> None:
    spec = spec_in(tmp_path)
    run_dir = begin_attempt(spec)
    mine = identify(os.getpid())
    assert mine is not None
    write_identity(run_dir, mine)
    writer = RunWriter(run_dir)
    writer.event("run.stepped", step=1)
    writer.progress(phase="training")
    writer.result(RunResult(outcome=Outcome.INTERRUPTED))
    begin_attempt(replace(spec, attempt=2))
    reader = RunReader(run_dir)
    assert (reader.events(), reader.progress(), reader.result(), read_identity(run_dir)) == ([], None, None, None)


@pytest.mark.parametrize("left", [bytes(900), b'{"event": "run.st', b'{"event": "run.st' + bytes(80)])
def test_after_a_power_cut_the_next_attempts_events_are_all_read(tmp_path: Path, left: bytes) -> None:
    """Also by a reader that was there before the attempt was made ready, as the daemon's is."""
    spec = spec_in(tmp_path)
    run_dir = begin_attempt(spec)
    RunWriter(run_dir).event("run.stepped", step=1)
    with (run_dir / EVENTS_NAME).open("ab") as events:
        events.write(left)
    reader = RunReader(run_dir)
    begin_attempt(replace(spec, attempt=2))
    writer = RunWriter(run_dir)
    for step in (2, 3):
        writer.event("run.stepped", step=step)
    assert [data["step"] for _, data in reader.events()] == [2, 3]


def test_a_torn_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    reader = RunReader(tmp_path)
    with (tmp_path / EVENTS_NAME).open("a") as events:
        events.write('{"event": "run.st')
        events.flush()
        assert reader.events() == []
        events.write('epped", "step": 1}\n')
    assert reader.events() == [("run.stepped", {"step": 1})]


@pytest.mark.parametrize("text", ["\n", "[1]\n", "null\n", '{"step": 1}\n', '"x"\n', "\xff\n", "{" * 5000 + "\n"])
def test_lines_that_are_no_event_are_passed_over(tmp_path: Path, text: str) -> None:
    reader = RunReader(tmp_path)
    (tmp_path / EVENTS_NAME).write_text(text + '{"event": "run.stepped"}\n', encoding="latin-1")
    assert reader.events() == [("run.stepped", {})]


@pytest.mark.parametrize("name", [PROGRESS_NAME, RESULT_NAME])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"phase": 7}', b"\xff", b'{"outcome": "odd"}'])
def test_a_file_that_cannot_be_read_is_none_of_this_attempt(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    reader = RunReader(tmp_path)
    assert (reader.progress(), reader.result()) == (None, None)


@pytest.mark.parametrize("step", ODD_STEPS)
def test_a_step_that_is_no_count_is_none(tmp_path: Path, step: object) -> None:
    assert step_in({"step": step}, "step") == 0
    (tmp_path / EVENTS_NAME).write_text(json.dumps({"event": "checkpoint.sealed", "step": step}) + "\n")
    assert sealed_step(tmp_path) == 0


def test_a_specification_of_another_version_is_refused_and_named(tmp_path: Path) -> None:
    run_dir = begin_attempt(replace(spec_in(tmp_path), schema_version=99))
    with pytest.raises(ValueError, match="has version 99, this trainer knows"):
        read_spec(run_dir)
    assert latest_spec(tmp_path) is None
    (run_dir / SPEC_NAME).write_text("[]")
    with pytest.raises(ValueError, match=SPEC_NAME):
        read_spec(run_dir)


def test_the_run_that_was_launched_last_is_found(tmp_path: Path) -> None:
    assert latest_spec(tmp_path) is None
    for number, job_id in enumerate(("b", "a", "c")):
        run_dir = begin_attempt(spec_in(tmp_path, job_id))
        os.utime(run_dir / SPEC_NAME, ns=(0, 10 - abs(number - 1)))
    found = latest_spec(tmp_path)
    assert found is not None
    assert found.job_id == "a"
