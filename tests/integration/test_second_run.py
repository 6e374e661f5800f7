"""`[gate] retry_share`: a dataset that cost something runs once more, and what came out better by the gate is taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

from daemon import control
from daemon.evaluation.values import GateAction
from daemon.job import Job, JobState
from daemon.lineage import read_lineage
from daemon.store import JobStore
from daemon.versions import current_version
from tests.support.root import Root, wait_until
from tests.support.sound import assert_sound

MakeRoot = Callable[..., Root]

LOST = {"evaluation": {"passes": False, "lost": 1.0}}
KEPT = {"evaluation": {"passes": True, "lost": 0.0}}


def dropped(root: Root, name: str, *attempts: dict[str, Any]) -> None:
    root.behave({str(number): behaviour for number, behaviour in enumerate(attempts, start=1)})
    root.drop(name, [{"prompt": f"{name} {n}", "completion": "c"} for n in range(30)])


def made(make_root: MakeRoot, **gate: Any) -> Root:
    """A root with one version, and a gate that asks for a second run."""
    root = make_root(behaviour={}, tables={"gate": {"retry_share": True, **gate}})
    root.start()
    dropped(root, "earlier.jsonl", {})
    assert root.finished("earlier.jsonl").version == "0001"
    return root


def current(root: Root) -> str | None:
    found = current_version(root.settings.model_dir)
    return found.name if found else None


def waits_for_second(root: Root, name: str) -> Job:
    """Have the queue paused after the first run of a job."""
    root.running(name)
    with closing(JobStore(root.settings.store_path)) as store:
        control.pause(store, after_job=True)

    def waiting() -> Job | None:
        job = root.job(name)
        return job if job is not None and job.state is JobState.QUEUED and job.first_run else None

    return wait_until(waiting, what=f"the first run of {name}")


def test_the_better_run_is_taken_and_both_are_told(make_root: MakeRoot) -> None:
    root = made(make_root)
    dropped(root, "mended.jsonl", LOST, KEPT)
    job = root.finished("mended.jsonl")
    assert (job.state, job.version, job.attempt) == (JobState.SUCCEEDED, "0003", 2)
    assert "with twice the share of earlier rows, since version 0002 had lost something" in job.reason
    assert job.recipe is not None
    assert job.recipe["replay"]["share"] == 0.2
    [told] = root.events("job.second_run")
    assert (told["version"], told["share"]) == ("0002", 0.2)
    assert current(root) == "0003"
    assert set(read_lineage(root.settings.model_dir).discarded()) == {"0002"}
    assert_sound(root)

    dropped(root, "worse.jsonl", LOST, {"evaluation": {"passes": False, "lost": 2.0}})
    job = root.finished("worse.jsonl")
    assert (job.state, job.version) == (JobState.SUCCEEDED, "0004")
    assert job.reason.startswith("held: earlier.jsonl lost 1.0; a second run with twice the share")
    assert job.result is not None
    assert job.result.evaluation is not None
    assert job.result.evaluation.datasets[0].loss.measured == 1.0
    assert (current(root), read_lineage(root.settings.model_dir).held()) == ("0003", ["0004"])
    assert_sound(root)

    dropped(root, "fails.jsonl", LOST, {"fail": {"kind": "config", "message": "there is no room"}})
    job = root.finished("fails.jsonl")
    assert (job.state, job.version, job.failure) == (JobState.SUCCEEDED, "0005", None)
    assert job.reason.endswith("the second run, with twice the share of earlier rows, failed: there is no room")
    assert_sound(root)

    root.configure(gate={"action": "warn"})
    assert root.stop() == 0
    root.start()
    dropped(root, "warned.jsonl", LOST, LOST)
    job = root.finished("warned.jsonl")
    assert job.result is not None
    assert job.result.evaluation is not None
    assert (job.version, job.result.evaluation.action) == ("0006", GateAction.WARNED)
    assert current(root) == "0006"
    assert_sound(root)


def test_a_kill_between_the_runs_and_within_the_second_loses_neither(make_root: MakeRoot) -> None:
    root = made(make_root)
    dropped(root, "b.jsonl", {**LOST, "step_seconds": 0.3}, *[{**KEPT, "step_seconds": 0.2}] * 4)
    waits_for_second(root, "b.jsonl")
    assert_sound(root)
    root.kill()
    # Killed again after the second attempt was recorded, and before anything of it was written.
    with closing(JobStore(root.settings.store_path)) as store:
        control.resume(store)
        assert store.claim_next(time.time()) is not None
    root.start()
    root.trainer(wait_until(lambda: (job := root.job("b.jsonl")) and job.attempt == 3 and job, what="the second run"))
    root.kill()
    root.start()
    job = root.finished("b.jsonl")
    assert (job.state, job.version) == (JobState.SUCCEEDED, "0003"), job.reason
    assert (current(root), read_lineage(root.settings.model_dir).held()) == ("0003", [])
    assert len(root.events("job.second_run")) == 1
    assert_sound(root)


def test_a_person_who_promotes_or_discards_the_first_version_has_decided(make_root: MakeRoot) -> None:
    root = made(make_root)
    slow = {**LOST, "step_seconds": 0.3}
    dropped(root, "b.jsonl", slow, KEPT)
    waits_for_second(root, "b.jsonl")
    assert "version 0002, held: earlier.jsonl lost 1.0" in root.run("show", "last").stdout
    assert root.run("promote", "2").returncode == 0
    assert root.run("resume").returncode == 0
    job = root.finished("b.jsonl")
    assert (job.state, job.version) == (JobState.SUCCEEDED, "0002")
    assert "a person made version 0002 current" in job.reason
    assert_sound(root)

    dropped(root, "c.jsonl", slow, {"evaluation": {"passes": False, "lost": 2.0}})
    waits_for_second(root, "c.jsonl")
    assert root.run("discard", "3").returncode == 0
    assert root.run("resume").returncode == 0
    job = root.finished("c.jsonl")
    assert (job.version, job.reason[:5]) == ("0004", "held:")
    assert_sound(root)
