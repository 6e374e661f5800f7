"""SIGKILL at every COMMIT of the store and every rename in one job's life: enumerated, not sampled."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from daemon.job import JobState
from daemon.versions import list_versions
from tests.support.root import Root, environment, fork_server, wait_until
from tests.support.sound import assert_sound

TABLES = {
    "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 2},
    "queue": {"retry_seconds": 0.0},
}
FAILS_FIRST = {"1": {"fail": {"kind": "diverged", "message": "as the test says"}}}
DIES_FIRST = {"1": {"die_at": 3}}


def live(root: Root, command: str, kill_at: int = 0) -> tuple[int, list[str]]:
    """One process of this root; its exit code and the points that it passed."""
    points = root.path / "points.txt"
    arguments = ["--root", str(root.path), *command.split(), *(["--once"] if command == "run" else [])]
    before = ("tests.support.life:kill_at", kill_at, str(points))
    done = fork_server().run(arguments, env=environment(), timeout=120, before=before)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, points.read_text().splitlines()


def no_trainer(root: Root) -> bool:
    return not any(root.trainer_alive(folder) for folder in (root.settings.state_dir / "runs").glob("*"))


def dropped(root: Root) -> None:
    root.drop("a.jsonl", [{"text": f"row {number}"} for number in range(4)])


def queued_and_paused(root: Root) -> None:
    """A job waits in a paused queue."""
    root.start()
    assert root.run("pause").returncode == 0
    dropped(root)
    wait_until(lambda: (job := root.job("a.jsonl")) and job.state is JobState.QUEUED)
    assert root.stop() == 0


def idle(root: Root) -> None:
    """A daemon has been here, so that there is a queue to pause."""
    assert root.run("run", "--once").returncode == 0
    dropped(root)


def failed(root: Root) -> None:
    """A job has failed, and would succeed now."""
    dropped(root)
    assert root.run("run", "--once").returncode == 1


def promoted_before(root: Root) -> None:
    """There is a version already, and its checkpoints are in the way."""
    root.drop("before.jsonl", [{"text": "another dataset"}] * 3)
    assert root.run("run", "--once").returncode == 0
    dropped(root)


# What is killed, after what, with which trainer; and what people say afterwards, where they were not heard.
LIVES = {
    "from the inbox to a version": ("run", dropped, {}, ()),
    "a second version over the first": ("run", promoted_before, {}, ()),
    "a trainer that dies once": ("run", dropped, DIES_FIRST, ()),
    "retry": ("retry LAST", failed, FAILS_FIRST, ("retry LAST",)),
    "cancel --return": ("cancel LAST --return", queued_and_paused, {}, ("resume",)),
    "cancel": ("cancel LAST", queued_and_paused, {}, ("resume", "cancel LAST", "retry LAST")),
    "pause": ("pause", idle, {}, ("resume",)),
    "resume": ("resume", queued_and_paused, {}, ("resume",)),
}


LONG = {"a second version over the first", "a trainer that dies once"}  # each as long as the first one
# Where a life has many points, a quick run takes each so many of them, and `make chaos` all.
STRIDES = {"from the inbox to a version": 5, "cancel": 2, "cancel --return": 2, "retry": 2}


def lives() -> Iterator[Any]:
    """Each life at all of its points, and those that are short or have strides once a day."""
    for name in LIVES:
        stride = STRIDES.get(name, 1)
        if name not in LONG:
            yield pytest.param(name, stride, id=name)
        if name in LONG or stride > 1:
            yield pytest.param(name, 1, id=f"{name}, every point", marks=pytest.mark.chaos)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "stride"), lives())
def test_a_job_survives_death_at_each_point_of_its_life(make_root: Callable[..., Root], name: str, stride: int) -> None:
    """After each death the job ends right, once: one version, its steps run, its file in one place."""
    command, prepare, behaviour, afterwards = LIVES[name]

    root = make_root(behaviour=behaviour, tables=TABLES)
    prepare(root)
    prepared = shutil.copytree(root.path, root.path.with_name("prepared"), symlinks=True)
    last = [job.id for job in root.jobs()][-1:] or ["?"]
    command = command.replace("LAST", last[0])
    _, points = live(root, command)
    assert len(points) >= (15 if command == "run" else 1), points
    for number in range(len(points), 0, -stride):  # the last point is always among them
        shutil.rmtree(root.path)
        shutil.copytree(prepared, root.path, symlinks=True)
        code, passed = live(root, command, number)
        where = f"killed at {passed[-1]} of {len(points)}"
        assert code == -9, where
        wait_until(partial(no_trainer, root), what=f"the trainer to follow its daemon, {where}")
        for said in afterwards:  # some of it may have been heard: that is refused, and harms nothing
            root.run(*said.replace("LAST", last[0]).split())
        assert root.run("run", "--once").returncode == 0, f"{where}: {root.errors()}"
        ended_right(root, where)


def ended_right(root: Root, where: str) -> None:
    trained = [job for job in root.jobs() if job.name == "a.jsonl" and job.state is JobState.SUCCEEDED]
    assert len(trained) == 1, f"{where}: {[(job.name, job.state, job.reason) for job in root.jobs()]}"
    assert trained[0].result is not None
    assert trained[0].result.steps_run == trained[0].result.steps_planned == 4, where
    versions = [version.name for version in list_versions(root.settings.model_dir)]
    assert versions[-1] == trained[0].version, where
    assert len(versions) == len({job.id for job in root.jobs() if job.state is JobState.SUCCEEDED}), where
    assert not (root.settings.inbox_dir / "a.jsonl").exists(), where
    assert_sound(root)
