"""When a waiting job will be done, told before it runs and compared with how long it took."""

from __future__ import annotations

import json
from pathlib import Path

from daemon.job import JobState, seconds_between
from tests.support.root import Root, wait_until

ROW = {"text": "twenty-four letters, each"}
STEP_SECONDS, FIRST_STEP_SECONDS = 0.04, 1.5


def test_the_first_large_job_after_tiny_ones_takes_about_as_long_as_was_told(tmp_path: Path) -> None:
    """Within a factor of two of its launch to its end, although the tiny ones are nearly all start and first step."""
    behaviour = {"*": {"step_seconds": STEP_SECONDS, "first_step_seconds": FIRST_STEP_SECONDS}}
    root = Root(tmp_path, {"training": {"save_steps": 1000}}, behaviour=behaviour)
    try:
        root.start()
        for number, rows in enumerate((40, 48, 64)):  # five to eight steps of eight rows
            root.drop(f"tiny{number}.jsonl", [{**ROW, "n": f"{number}.{row}"} for row in range(rows)])
            root.finished(f"tiny{number}.jsonl")
        assert root.run("pause").returncode == 0
        root.drop("large.jsonl", [{**ROW, "n": f"large.{row}"} for row in range(2400)])
        (queued,) = wait_until(lambda: [job for job in listed(root) if job["state"] == JobState.QUEUED])
        told = queued["eta_seconds"]
        assert root.run("resume").returncode == 0
        wait_until(lambda: [job for job in listed(root) if job["state"] == JobState.RUNNING])
        root.drop("behind.jsonl", [{**ROW, "n": f"behind.{row}"} for row in range(8)])
        (behind,) = wait_until(lambda: [job for job in listed(root) if job["state"] == JobState.QUEUED])
        # The one that runs does not tell yet when it will be done, and the next waits for it all the same.
        assert behind["eta_seconds"] > 0.5 * told
        job = root.finished("large.jsonl")
        taken = seconds_between(job.started_at, job.finished_at)
    finally:
        root.close()
    assert job.state is JobState.SUCCEEDED
    assert taken is not None
    assert 0.5 * taken <= told <= 2 * taken, f"{told:.1f} s were told, and it took {taken:.1f} s"


def listed(root: Root) -> list[dict[str, object]]:
    """What `dropforge jobs` says to programs."""
    found: list[dict[str, object]] = json.loads(root.run("jobs", "--json").stdout)["jobs"]
    return found
