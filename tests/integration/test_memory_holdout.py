"""Rows that were held out of one dataset stay out of training, however a later file spells them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon.job import Job, JobState
from daemon.memory.store import dataset_dir, memory_dir_of, read_memory
from tests.support.root import Root
from tests.support.sound import assert_sound

MakeRoot = Callable[..., Root]
SHORT = {"training": {"max_steps": 2, "learning_rate": 1e-3}, "data": {"max_length": 64}}
COUNT = 60


def pairs(count: int = COUNT, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"Question {n}? ", "completion": f"answer {n}"} for n in range(start, start + count)]


def lines(rows: list[Any], **spelling: Any) -> bytes:
    return "".join(json.dumps(row, **spelling) + "\n" for row in rows).encode()


def kept(root: Root, job: Job, which: str) -> set[str]:
    """Digests of a dataset's rows in the memory."""
    assert job.dataset is not None
    memory = read_memory(dataset_dir(memory_dir_of(root.settings.state_dir), job.dataset.digest))
    assert memory is not None
    return {row.digest for row in (memory.rows() if which == "rows" else memory.held_out())}


def finished(root: Root, name: str, content: Any) -> Job:
    root.drop(name, content)
    job = root.finished(name)
    assert job.result is not None, f"{job.reason} {root.errors()}"
    return job


def test_a_held_out_row_is_not_trained_through_a_later_file_however_it_is_written(
    make_root: MakeRoot, tiny_base: Path
) -> None:
    """Other order of keys, no spaces, a further column, turns in place of text, a lower fraction: always the same rows."""
    root = make_root(base_model=tiny_base, tables=SHORT)
    root.start()
    first = finished(root, "first.jsonl", pairs())
    held_out = kept(root, first, "held_out")
    assert first.result is not None
    assert first.result.held_out_rows == len(held_out) == COUNT // 5
    assert not held_out & kept(root, first, "rows")

    turns = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in pairs()
    ]
    again = {
        "keys.jsonl": lines([dict(reversed(row.items())) for row in pairs()]),
        "spaces.jsonl": lines(pairs(), separators=(",", ":")),
        "column.jsonl": lines([{"id": n, **row} for n, row in enumerate(pairs())]),
        "turns.jsonl": lines(turns),
        "order.jsonl": lines(pairs()[::-1]),
    }
    for name, content in again.items():
        job = finished(root, name, content)
        assert job.state is JobState.SUCCEEDED, job.reason
        assert job.result is not None
        assert (job.result.withheld_rows, job.result.held_out_rows) == (len(held_out), 0)
        assert not held_out & kept(root, job, "rows")
        assert len(kept(root, job, "rows")) == COUNT - len(held_out)
    (root.settings.inbox_dir / "few.job.toml").write_text("[data]\nheld_out_fraction = 0.0\n")
    job = finished(root, "few.jsonl", [{**row, "n": 1} for row in pairs()])
    assert job.result is not None
    assert not held_out & kept(root, job, "rows")

    shown = json.loads(root.run("show", job.id, "--json").stdout)
    assert shown["result"]["withheld_rows"] == len(held_out)
    assert any("held out of first.jsonl" in warning for warning in job.result.warnings)
    assert f"{len(held_out)} rows, held out of earlier datasets" in root.run("show", job.id).stdout
    report = (root.settings.inbox_dir / "done" / job.id / "report.txt").read_text()
    assert "held out of first.jsonl" in report
    assert_sound(root)


def test_a_file_of_held_out_rows_is_refused_with_their_dataset_and_trained_by_force(
    make_root: MakeRoot, tiny_base: Path
) -> None:
    root = make_root(base_model=tiny_base, tables=SHORT)
    root.start()
    first = finished(root, "first.jsonl", pairs())
    held_out = kept(root, first, "held_out")
    numbers = {n for n in range(COUNT) if pair_digest(n) in held_out}
    assert len(numbers) == len(held_out)
    stolen = [row for n, row in enumerate(pairs()) if n in numbers] + pairs(4, start=900)
    said = root.path / "stolen.jsonl"
    said.write_bytes(lines(stolen))
    refused = " ".join(root.run("check", str(said)).stdout.split())
    assert f"{len(held_out)} of {len(stolen)} rows are held-out rows of first.jsonl" in refused
    job = finished(root, "stolen.jsonl", stolen)
    assert job.state is JobState.FAILED
    assert re.search(rf"{len(held_out)} of {len(stolen)} rows are held-out rows of first\.jsonl", job.reason)
    (root.settings.inbox_dir / "forced.job.toml").write_text("force = true\n")
    forced = finished(root, "forced.jsonl", [{**row, "n": 1} for row in stolen])
    assert forced.state is JobState.SUCCEEDED, forced.reason
    assert kept(root, forced, "rows") >= held_out
    # They measure nothing any more: a third file trains them as well.
    third = finished(root, "third.jsonl", [{**row, "n": 2} for row in stolen])
    assert third.state is JobState.SUCCEEDED, third.reason
    assert third.result is not None
    assert third.result.withheld_rows == 0
    assert_sound(root)


def pair_digest(number: int) -> str:
    from daemon.dataset.rows import Format, Rules, check_row, identity_of

    [row] = pairs(1, start=number)
    return identity_of(check_row(json.dumps(row).encode(), Format.PROMPT_COMPLETION, Rules())).digest


def test_a_file_of_one_row_is_trained_and_said_to_be_too_small_to_measure(make_root: MakeRoot, tiny_base: Path) -> None:
    root = make_root(base_model=tiny_base, tables=SHORT)
    root.start()
    job = finished(root, "one.jsonl", pairs(1))
    assert job.state is JobState.SUCCEEDED, job.reason
    assert job.result is not None
    assert (job.result.rows, job.result.held_out_rows, job.result.held_out_before) == (1, 0, None)
    assert "too small to measure" in root.run("show", job.id).stdout
    assert_sound(root)


@pytest.mark.parametrize("kept_anyway", [False, True])
def test_of_a_file_that_is_deleted_after_training_no_row_lives_on_unless_that_is_set(
    make_root: MakeRoot, tiny_base: Path, kept_anyway: bool
) -> None:
    tables = {**SHORT, "inbox": {"on_success": "delete"}, "replay": {"keep_deleted": kept_anyway}}
    root = make_root(base_model=tiny_base, tables=tables)
    root.start()
    job = finished(root, "secret.jsonl", pairs())
    assert job.state is JobState.SUCCEEDED, job.reason
    state = root.settings.state_dir
    found = [path for path in state.rglob("*") if path.is_file() and b"Question 7?" in path.read_bytes()]
    assert bool(found) is kept_anyway
    assert bool(kept(root, job, "rows")) is kept_anyway


def test_what_one_reading_of_a_file_held_out_stays_held_out_under_other_settings(
    make_root: MakeRoot, tiny_base: Path
) -> None:
    """The same bytes are trained again under another train_on, and hold fewer rows out."""
    root = make_root(base_model=tiny_base, tables=SHORT)
    root.start()
    held_out = kept(root, finished(root, "first.jsonl", pairs()), "held_out")
    (root.settings.inbox_dir / "again.job.toml").write_text('[data]\ntrain_on = "all"\nheld_out_fraction = 0.0\n')
    assert finished(root, "again.jsonl", pairs()).state is JobState.SUCCEEDED
    third = finished(root, "third.jsonl", [{"n": 1, **row} for row in pairs()])
    assert third.result is not None
    assert third.result.withheld_rows == len(held_out)
    assert not held_out & kept(root, third, "rows")
