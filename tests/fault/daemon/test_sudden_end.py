"""A daemon that dies over one file or job, at every step of its way, each time: two deaths, then it is given up and named.

Nothing is raised where it dies: it is killed, as by the watchdog, for memory, or by a fault in native code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.inbox import layout
from daemon.job import FINAL_STATES, FailureKind, JobState
from tests.support.root import Root, wait_until
from tests.support.sound import assert_sound
from tests.support.steps import ALWAYS, PLACES, TABLES, rows

MOST_LIVES = 6
# The steps, and what becomes of the job: it fails; it fails without having been one; or it ended already, and is left alone.
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
    "the archive": "ended",
    "the log": "ended",
    "the status": "ended",
}
QUICK_ONES = {"the launch", "the archive"}


def live(root: Root, names: list[str]) -> bool:
    """Start the daemon; returns whether it lived until all files were finished, and False when it died before."""
    try:
        daemon = root.start()
    except AssertionError:  # it ended before it watched
        return False

    def is_over() -> bool:
        jobs = [root.job(name) for name in names]
        return daemon.poll() is not None or all(job is not None and job.state in FINAL_STATES for job in jobs)

    wait_until(is_over, what="an end of the daemon or of the jobs")
    status = root.status()
    beat = status["monotonic_seconds"] if status else 0.0
    # What was done last is shown by a later heartbeat, or kills it.
    wait_until(lambda: daemon.poll() is not None or ((root.status() or {}).get("monotonic_seconds", 0.0) > beat + 0.5))
    return daemon.poll() is None


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=[] if step in QUICK_ONES else [pytest.mark.chaos]) for step in STEPS]
)
def test_a_daemon_that_dies_over_one_input_each_time_gives_it_up_after_the_second(
    make_root: Callable[..., Root], tmp_path: Path, step: str
) -> None:
    place, becomes = PLACES[step], STEPS[step]
    count = tmp_path / "count"
    root = make_root(
        behaviour={}, tables=TABLES, before=("tests.support.injected:die", place, "poison", ALWAYS, str(count))
    )
    root.drop("poison.jsonl", rows("poison"))
    root.drop("good.jsonl", rows("good"))
    lives = 1
    while not live(root, ["poison.jsonl", "good.jsonl"]):
        lives += 1
        assert lives <= MOST_LIVES, root.errors()
    deaths = [event for event in root.events("daemon.ended_suddenly") if event["step"] != "idle"]
    assert len(deaths) >= 2
    assert len(count.read_bytes()) <= (2 if becomes == "file" else 3)
    assert root.finished("good.jsonl").state is JobState.SUCCEEDED
    job = root.job("poison.jsonl")
    assert job is not None
    if becomes != "ended":
        assert job.state is JobState.FAILED
        assert "times in a row" in job.reason
        folder = root.settings.inbox_dir / layout.FAILED / job.id
        assert "times in a row" in (folder / "report.txt").read_text()
        assert (folder / "poison.jsonl").exists()
    assert root.events("job.quarantined") or root.events("file.quarantined")
    assert not (root.settings.inbox_dir / "poison.jsonl").exists()
    # It stays given up, although whoever handles it dies still.
    assert root.stop() == 0
    root.start()
    root.drop("last.jsonl", rows("last"))
    assert root.finished("last.jsonl").state is JobState.SUCCEEDED
    assert root.stop() == 0
    if step != "the archive":
        assert_sound(root)


def test_a_file_that_was_moved_aside_goes_with_its_sidecar_and_can_be_tried_again(
    make_root: Callable[..., Root], tmp_path: Path
) -> None:
    root = make_root(behaviour={}, tables=TABLES)
    root.before = (
        "tests.support.injected:die", "daemon.inbox.intake:claim", "poison", ALWAYS, str(tmp_path / "count")
    )  # fmt: skip
    (root.settings.inbox_dir / "poison.job.toml").write_text("[training]\nseed = 3\n")
    root.drop("poison.jsonl", rows("poison"))
    assert not live(root, ["poison.jsonl"])
    assert not live(root, ["poison.jsonl"])
    assert live(root, ["poison.jsonl"])
    job = root.finished("poison.jsonl")
    folder = root.settings.inbox_dir / layout.FAILED / job.id
    assert (folder / "poison.job.toml").exists()
    assert job.failure is FailureKind.INTERNAL
    assert root.stop() == 0
    root.before = ()
    root.start()
    again = root.run("retry", job.id)
    assert again.returncode == 0, again.stderr
    wait_until(lambda: (now := root.job("poison.jsonl")) and now.state is JobState.SUCCEEDED)
    done = root.finished("poison.jsonl")
    assert done.id == job.id
    assert done.overrides["training"]["seed"] == 3
    assert root.stop() == 0
    assert_sound(root)


def test_one_death_costs_a_job_nothing(make_root: Callable[..., Root], tmp_path: Path) -> None:
    count = tmp_path / "count"
    place = "daemon.inbox.validation:Validator._apply"
    root = make_root(behaviour={}, tables=TABLES, before=("tests.support.injected:die", place, "poison", 1, str(count)))
    root.drop("poison.jsonl", rows("poison"))
    assert not live(root, ["poison.jsonl"])
    assert live(root, ["poison.jsonl"])
    assert root.finished("poison.jsonl").state is JobState.SUCCEEDED
    (event,) = root.events("daemon.ended_suddenly")
    assert (event["step"], event["times"]) == ("checked", 1)
    assert root.stop() == 0
    assert_sound(root)
