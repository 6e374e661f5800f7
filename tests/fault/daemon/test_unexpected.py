"""An error that nobody foresaw, at every step of a file's way: it is that file's or job's, and the daemon lives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.job import JobState
from tests.support.root import Root, wait_until
from tests.support.steps import ALWAYS, PLACES, TABLES, rows

# The steps, and what has to become of the job when the error comes each time.
STEPS = {
    "a name is found": "file",
    "the claim": "file",
    "its rows are sent to be checked": "job",
    "the result of the check": "job",
    "the duplicate check": "job",
    "the holds": "job",
    "the launch": "job",
    "observing": "job",
    "the decision": "job",
    "the promotion": "job",
    "the conclusion": None,
    "the archive": None,
    "the status": None,
}


@pytest.mark.parametrize("step", STEPS)
def test_an_error_at_a_step_is_its_files_own_and_the_second_one_is_the_last(
    make_root: Callable[..., Root], tmp_path: Path, step: str
) -> None:
    place, becomes = PLACES[step], STEPS[step]
    count = tmp_path / "count"
    root = make_root(
        behaviour={}, tables=TABLES, before=("tests.support.injected:fail", place, "poison", ALWAYS, str(count))
    )
    daemon = root.start()
    root.drop("poison.jsonl", rows("poison"))
    wait_until(count.exists, what="the error to be thrown")
    for number in range(3):
        root.drop(f"good-{number}.jsonl", rows(f"good {number}"))
    for number in range(3):
        assert root.finished(f"good-{number}.jsonl").state is JobState.SUCCEEDED
    assert daemon.poll() is None
    raised = wait_until(
        lambda: root.events("unexpected.raised") or root.events("file.not_moved"), what="its name in the log"
    )
    assert "thrown by the test" in raised[0]["error"]
    if becomes == "file":
        wait_until(lambda: root.events("file.quarantined"), what="the file to be left alone")
        left = wait_until(lambda: (root.status() or {})["left_alone"], what="status to name it")
        assert left[0]["file"] == "poison.jsonl"
        assert "twice in a row" in left[0]["reason"]
        assert (root.settings.inbox_dir / "poison.jsonl").exists()
    elif becomes == "job":
        job = root.finished("poison.jsonl")
        assert job.state is JobState.FAILED
        assert "thrown by the test" in job.reason
        report = root.settings.inbox_dir / "failed" / job.id / "report.txt"
        assert "twice in a row" in report.read_text()
    # The same at a start, with the error still there.
    assert root.stop() == 0
    root.start()
    root.drop("last.jsonl", rows("last"))
    assert root.finished("last.jsonl").state is JobState.SUCCEEDED
    assert root.stop() == 0


@pytest.mark.parametrize("step", STEPS)
def test_an_error_that_comes_once_costs_the_job_nothing(
    make_root: Callable[..., Root], tmp_path: Path, step: str
) -> None:
    place = PLACES[step]
    count = tmp_path / "count"
    root = make_root(
        behaviour={}, tables=TABLES, before=("tests.support.injected:fail", place, "poison", 1, str(count))
    )
    root.start()
    root.drop("poison.jsonl", rows("poison"))
    done = root.finished("poison.jsonl")
    assert done.state is JobState.SUCCEEDED, done
    wait_until(count.exists, what="the error to be thrown")
    assert root.stop() == 0


@pytest.mark.parametrize("most", [1, ALWAYS], ids=["once", "always"])
def test_an_error_over_a_job_at_the_start_does_not_keep_the_daemon_from_starting(
    make_root: Callable[..., Root], tmp_path: Path, most: int
) -> None:
    count = tmp_path / "count"
    root = make_root(behaviour={"*": {"step_seconds": 0.05}}, tables=TABLES)
    root.start()
    root.drop("poison.jsonl", [{"text": f"poison {number}"} for number in range(100)])
    trainer = root.trainer(root.running("poison.jsonl", step=4))
    root.kill()
    wait_until(lambda: not trainer.alive, what="the trainer to follow its daemon")
    root.behave({})
    root.before = (
        "tests.support.injected:fail", "daemon.scheduler:Scheduler._recover_run", "poison", most, str(count)
    )  # fmt: skip
    root.start()
    root.drop("good.jsonl", rows("good"))
    assert root.finished("good.jsonl").state is JobState.SUCCEEDED
    assert root.finished("poison.jsonl").state is (JobState.SUCCEEDED if most == 1 else JobState.FAILED)
    assert root.events("unexpected.raised")
    assert root.stop() == 0
