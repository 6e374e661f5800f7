"""When waiting jobs will be done: from tokens, so that tiny jobs say nothing wrong of a large one."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daemon.cli.estimates import Pace, format_duration, measure_pace, queue_etas
from daemon.dataset.rows import Rules
from daemon.dataset.validate import scan_dataset
from daemon.job import Dataset, Job, JobState, Outcome, RunResult

BYTES_PER_TOKEN = 4


def job(
    *, rows: int, row_bytes: int = 1000, epochs: float = 1.0, content_bytes: int | None = None, **fields: Any
) -> Job:
    size = rows * row_bytes if content_bytes is None else content_bytes
    dataset = Dataset(
        name="x.jsonl", path="", size_bytes=size // 5 if content_bytes is None else size, content_bytes=size, rows=rows,
        digest="", format="text",
    )  # fmt: skip
    recipe = {"training": {"num_train_epochs": epochs}, "data": {"max_length": 2048}}
    fields = {"state": JobState.QUEUED, "id": f"job-{rows}", "attempt": 1, **fields}
    return Job(name="x.jsonl", dataset=dataset, recipe=recipe, **fields)


def trained(*, rows: int, start: float, rate: float, attempt: int = 1, **fields: Any) -> Job:
    """A job that took `start` seconds and then its tokens at `rate`."""
    waiting = job(rows=rows, **fields)
    assert waiting.dataset is not None
    tokens = int(waiting.dataset.content_bytes * fields.get("epochs", 1.0) / BYTES_PER_TOKEN)
    result = RunResult(
        outcome=Outcome.SUCCEEDED, rows=rows, tokens_trained=tokens, tokens_per_second=rate,
        wall_seconds=start + tokens / rate,
    )  # fmt: skip
    return job(rows=rows, state=JobState.SUCCEEDED, result=result, attempt=attempt, **fields)


def test_the_first_large_job_after_tiny_ones_is_estimated_by_its_tokens() -> None:
    """Eight seconds for four rows is the cost of a start: a row more costs its tokens."""
    tiny = [trained(rows=4, start=8.0, rate=1500.0), trained(rows=6, start=8.4, rate=1800.0)]
    large = job(rows=10_000)
    (eta,) = queue_etas([large], measure_pace(tiny), None).values()
    assert eta == pytest.approx(8.2 + 10_000 * 250 / 1800, rel=0.01)  # 23 minutes
    assert eta < 0.1 * 10_000 * 8.2 / 4  # seconds a row said hours


def test_the_largest_of_the_recent_jobs_gives_the_speed() -> None:
    """Short runs end before a device is as fast as it gets."""
    finished = [trained(rows=4, start=8.0, rate=200.0), trained(rows=5000, start=9.0, rate=4000.0)]
    pace = measure_pace(finished)
    assert pace is not None
    assert pace.tokens_per_second == 4000.0
    assert pace.start_seconds == pytest.approx(8.5, abs=0.1)
    assert pace.seconds(finished[1]) == pytest.approx(finished[1].result.wall_seconds, rel=0.05)


def test_of_runs_of_one_size_the_fastest_gives_the_speed() -> None:
    """What else the machine did made the others slower."""
    finished = [
        trained(rows=rows, start=8.0, rate=rate) for rows, rate in ((50, 40.0), (40, 130.0), (60, 99.0), (2, 900.0))
    ]
    pace = measure_pace(finished)
    assert pace is not None
    assert pace.tokens_per_second == 130.0


def test_a_slow_first_step_belongs_to_the_start() -> None:
    """Of two steps, the first of which compiles and loads, the second says how fast a run is."""
    tiny = trained(rows=4, start=0.0, rate=100.0)
    assert tiny.result is not None
    assert tiny.dataset is not None
    result = replace(tiny.result, steady_tokens_per_second=1000.0)
    times = {"started_at": "2026-01-01T00:00:00.000Z", "finished_at": "2026-01-01T00:00:20.000Z"}
    pace = measure_pace([replace(tiny, result=result, **times)])
    assert pace is not None
    assert pace.tokens_per_second == 1000.0
    assert pace.start_seconds == pytest.approx(20.0 - result.tokens_trained / 1000.0)  # the process's own start counts


def test_epochs_and_cut_rows_count() -> None:
    """Twice the epochs are twice the tokens; a row has no more than max_length."""
    pace = Pace(start_seconds=0.0, tokens_per_second=100.0, tokens_per_byte=0.25)
    assert pace.seconds(job(rows=10, epochs=2.0)) == 2 * pace.seconds(job(rows=10))
    assert pace.seconds(job(rows=10, row_bytes=10**6)) == pytest.approx(10 * 2048 / 100)


def test_where_the_steps_are_set_they_count_and_not_the_epochs() -> None:
    """Of a large file a part is trained then, and a small one again and again."""
    pace = Pace(start_seconds=0.0, tokens_per_second=100.0, tokens_per_byte=0.25)

    def stopped(one: Job, steps: int, rows_a_step: int = 8) -> Job:
        training = {
            "num_train_epochs": 9.0, "max_steps": steps,
            "per_device_train_batch_size": rows_a_step // 2, "gradient_accumulation_steps": 2,
        }  # fmt: skip
        return replace(one, recipe={**(one.recipe or {}), "training": training})

    whole = pace.seconds(job(rows=800))
    assert pace.seconds(stopped(job(rows=800), 10)) == pytest.approx(whole / 10)
    assert pace.seconds(stopped(job(rows=80), 200)) == pytest.approx(2 * whole)
    assert pace.seconds(stopped(job(rows=800), -1)) == pytest.approx(9 * whole)
    tokens = 80 * 1000 // BYTES_PER_TOKEN  # a tenth of the rows' tokens
    measured = trained(rows=800, start=1.0, rate=50.0)
    assert measured.result is not None
    measured = stopped(replace(measured, result=replace(measured.result, tokens_trained=tokens)), 10)
    learned = measure_pace([measured])
    assert learned is not None
    assert learned.tokens_per_byte == pytest.approx(1 / BYTES_PER_TOKEN)


def test_of_a_job_that_runs_what_it_took_so_far_is_done() -> None:
    pace = Pace(start_seconds=5.0, tokens_per_second=250.0, tokens_per_byte=0.25)
    running = job(rows=10, started_at="2026-01-01T00:00:00.000Z")
    assert pace.seconds_left(running, "2026-01-01T00:00:04.000Z") == pytest.approx(11.0)
    assert pace.seconds_left(running, "2026-01-01T01:00:00.000Z") == 0.0
    assert pace.seconds_left(job(rows=10), "2026-01-01T01:00:00.000Z") is None


def test_what_cannot_be_known_is_not_estimated() -> None:
    """No finished job, none that trained, or only parts of some."""
    assert measure_pace([]) is None
    assert measure_pace([job(rows=1, state=JobState.SUCCEEDED)]) is None
    assert measure_pace([trained(rows=9, start=1.0, rate=9.0, attempt=2)]) is None
    assert queue_etas([job(rows=1)], None, 5.0) == {}


def test_jobs_are_done_one_after_the_other() -> None:
    """The running one first."""
    pace = Pace(start_seconds=1.0, tokens_per_second=250.0, tokens_per_byte=0.25)
    first, second = job(rows=1, id="a"), job(rows=2, id="b")
    assert queue_etas([first, second], pace, 10.0) == {"a": 12.0, "b": 15.0}
    assert [format_duration(40), format_duration(23 * 60), format_duration(5.8 * 3600)] == ["40 s", "23 min", "5.8 h"]
    assert format_duration(12 * 86400) == "12 days"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_compressed_dataset_counts_by_its_content(tmp_path: Path, suffix: str) -> None:
    """The pass tells how many bytes the rows have."""
    rows = b'{"text": "a row"}\n' * 1000
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(rows) if suffix.endswith("gz") else rows)
    assert scan_dataset(path, Rules()).dataset.content_bytes == len(rows)
