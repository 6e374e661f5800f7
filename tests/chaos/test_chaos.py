"""Random death: daemon, trainer and the child that reads rows are killed at any moment, while people and files come.

The seed is printed and can be given back (`--seed`); `make chaos` runs the same with thousands of kills.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress

import pytest
from blake3 import blake3

import guard
from daemon import control
from daemon.errors import DropforgeError
from daemon.job import FINAL_STATES, Job, JobState
from daemon.store import JobStore
from daemon.versions import Version, list_versions
from tests.support.fake_trainer import adapter_bytes
from tests.support.root import Root, children_of, wait_until
from tests.support.sound import assert_sound

TABLES = {
    "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 3},
    "inbox": {"settle_seconds": 0.05, "rescan_seconds": 0.5},
    "queue": {"retry_seconds": 0.01, "max_attempts": 10_000, "stop_timeout": 10.0},
}
REAL_TABLES = {**TABLES, "training": {"save_steps": 2, "num_train_epochs": 4.0, "learning_rate": 3e-3}}


class Chaos:
    """What is done to one root, and what has to come of it."""

    def __init__(self, root: Root, seed: int, *, real: bool) -> None:
        self.root = root
        self.real = real
        self.dice = random.Random(seed)
        self.dropped: Counter[str] = Counter()  # digest of the content -> times
        self.sets = 0
        self.kills: Counter[str] = Counter()
        self.cancelled: set[str] = set()

    def drop(self) -> None:
        """A new dataset, sometimes broken, sometimes one that was dropped before, sometimes under an old name."""
        if self.dice.random() < 0.7:
            self.sets += 1
            number = self.sets
        else:
            number = self.dice.randrange(self.sets + 1)
        rows = "".join(json.dumps({"text": f"set {number} row {row}"}) + "\n" for row in range(1 + number * 7 % 40))
        if self.dice.random() < 0.1:
            rows += '{"text": cut'
        name = f"set-{self.dice.randrange(30)}.jsonl"
        folder = self.dice.choice(["", "", "high", "low"])
        if (self.root.settings.inbox_dir / folder / name).exists():
            return  # a drop onto a file that waits would replace it, as any rename does
        self.dropped[blake3(rows.encode()).hexdigest()] += 1
        self.root.drop(name, rows.encode(), folder=folder)

    def bother(self) -> None:
        """A person does something."""
        settings = self.root.settings
        with closing(JobStore(settings.store_path)) as store, suppress(DropforgeError):
            jobs = store.jobs(limit=20, newest=True)
            match self.dice.randrange(6):
                case 0:
                    control.pause(store, after_job=self.dice.random() < 0.5)
                case 1 | 2:
                    control.resume(store)
                case 3 if jobs:
                    control.retry(settings, store, self.dice.choice(jobs))
                case 4 if jobs:
                    control.move(store, self.dice.choice(jobs), first=True, priority=None)
                case 5 if jobs and self.dice.random() < 0.3:
                    job = self.dice.choice(jobs)
                    control.cancel(settings, store, job, hand_back=False)
                    self.cancelled.add(job.id)

    def kill(self) -> None:
        """SIGKILL to one of the processes that there are now."""
        daemon = self.root.start_pid
        children = list(children_of(daemon))
        victim = self.dice.choice(["daemon", "daemon", "child", "trainer"])
        if victim == "daemon" or not children:
            self.root.kill()
            self.kills["daemon"] += 1
            self.root.start()
            return
        trainers = [child for child in children if "daemon.dataset" not in child[1]]
        pid, command = self.dice.choice(trainers if victim == "trainer" and trainers else children)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.kills["rows" if "daemon.dataset" in command else "trainer"] += 1

    def check(self) -> None:
        """Let everything come to its end, then look at all of it."""
        with closing(JobStore(self.root.settings.store_path)) as store:
            control.resume(store)
        inbox = self.root.settings.inbox_dir

        def quiet() -> bool:
            waiting = [path for folder in (inbox, inbox / "high", inbox / "low") for path in folder.glob("*.jsonl")]
            return not waiting and all(job.state in FINAL_STATES for job in self.root.jobs())

        wait_until(quiet, 1800 if self.real else 240, "everything to come to its end")
        assert self.root.stop() == 0
        assert_sound(self.root)
        self._check_files()
        self._check_training()
        self.root.start()

    def _check_files(self) -> None:
        """Each content is there as often as it was dropped, byte for byte."""
        found: Counter[str] = Counter()
        for place in ("done", "failed", "processing"):
            for path in (self.root.settings.inbox_dir / place).glob("*/*.jsonl"):
                found[blake3(path.read_bytes()).hexdigest()] += 1
        assert found == self.dropped

    def _check_training(self) -> None:
        """Each content is trained at most once, each version by its own steps from its own parent, in one line."""
        jobs = {job.id: job for job in self.root.jobs()}
        succeeded = [job for job in jobs.values() if job.state is JobState.SUCCEEDED]
        digests = Counter(job.dataset.digest for job in succeeded if job.dataset)
        twice = {digest for digest, times in digests.items() if times > 1}
        assert not {
            digest
            for digest in twice
            if not any(j.force for j in succeeded if j.dataset and j.dataset.digest == digest)
        }
        versions = list_versions(self.root.settings.model_dir)
        assert [version.record["job"] for version in versions] == [
            job.id for job in sorted(succeeded, key=lambda job: int(job.version or 0))
        ]
        lineage = [
            json.loads(line) for line in (self.root.settings.model_dir / "lineage.jsonl").read_text().splitlines()
        ]
        assert [line["version"] for line in lineage] == [version.name for version in versions]
        parent: Version | None = None
        for version in versions:
            if not self.real:  # what the real one learns cannot be told beforehand
                assert weights_of(version) == expected_weights(jobs[version.record["job"]], parent), version.name
            parent = version


def expected_weights(job: Job, parent: Version | None) -> bytes:
    """The chain of digests over the parent and every step, each taken once and in order."""
    weights = parent.digest if parent else "base"
    assert job.dataset is not None
    assert job.result is not None
    for step in range(1, job.result.steps_planned + 1):
        weights = blake3(f"{weights}:{job.dataset.digest}:{step}".encode()).hexdigest()
    return adapter_bytes(weights)


def weights_of(version: Version) -> bytes:
    return (version.path / "adapter_model.safetensors").read_bytes()


@pytest.mark.timeout(7200)
def test_every_job_ends_right_once_whatever_is_killed(
    make_root: Callable[..., Root], request: pytest.FixtureRequest
) -> None:
    """With the quick trainer, or with `--real-trainer` the real one on a tiny model."""
    kills: int = request.config.getoption("--kills")
    seed: int = request.config.getoption("--seed")
    real: bool = request.config.getoption("--real-trainer")
    print(f"seed {seed}, {kills} kills")
    if real:
        root = make_root(base_model=request.getfixturevalue("tiny_base"), tables=REAL_TABLES)
    else:
        root = make_root(behaviour={"*": {"step_seconds": 0.01}}, tables=TABLES)
    chaos = Chaos(root, seed, real=real)
    root.start()
    done = 0
    while done < kills:
        for _ in range(chaos.dice.randrange(3)):
            chaos.drop()
        if chaos.dice.random() < 0.3:
            chaos.bother()
        time.sleep(
            chaos.dice.random() * (6.0 if real else 0.3)
        )  # the random moment is the point, nothing is waited for
        chaos.kill()
        done = sum(chaos.kills.values())
        if done % 50 == 49:
            chaos.check()
    chaos.check()
    print(dict(chaos.kills), dict(Counter(job.state.value for job in root.jobs())))
    succeeded = [job for job in root.jobs() if job.state is JobState.SUCCEEDED]
    assert len(succeeded) >= (1 if real else 5)
    assert guard.read_metadata(root.settings.model_dir).run is not None
