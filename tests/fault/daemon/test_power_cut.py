"""What status called queued, sealed or succeeded is there after a power cut, and everything else can be started from.

The daemon works on a disk that really loses what nobody fsynced (`tests.support.power`). It is cut at random moments of
whole jobs; then the journal of each cut is replayed, the daemon starts on it, and every job comes to its end.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import guard
from daemon.job import FINAL_STATES, JobState
from daemon.versions import damage, list_versions
from tests.support.power import Disk, stopped, why_no_disk
from tests.support.root import Root, wait_until
from tests.support.sound import assert_sound

pytestmark = pytest.mark.skipif(bool(why_no_disk()), reason=why_no_disk() or "-")

TABLES = {
    "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 3},
    "inbox": {"settle_seconds": 0.05, "rescan_seconds": 0.5},
    "queue": {"retry_seconds": 0.01, "stop_timeout": 10.0},
}
STEP_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Promised:
    """What the daemon had said when the power went."""

    queued: frozenset[str]  # jobs
    succeeded: frozenset[str]
    sealed_step: int  # of the run in progress; 0 between runs
    submitted: frozenset[str] = field(default_factory=frozenset)  # digests of files whose `submit` had returned

    @classmethod
    def by(cls, root: Root, submitted: frozenset[str]) -> Promised:
        """Read the log, up to its last whole line, and the status file."""
        lines = root.settings.log_path.read_bytes().split(b"\n")[:-1]
        events = [json.loads(line) for line in lines]
        queued = {event["job"] for event in events if event["event"] == "job.queued"}
        succeeded = {event["job"] for event in events if event["event"] == "job.succeeded"}
        status = root.status()
        assert status is not None
        shown = [job for job in status["recent"] if job["state"] == "succeeded"]
        sealed = 0
        for event in events:
            if event["event"] == "checkpoint.sealed":
                sealed = event["step"]
            elif event["event"] in ("run.started", "job.started", "job.succeeded"):
                sealed = 0
        return cls(
            queued=frozenset(queued),
            succeeded=frozenset(succeeded | {job["id"] for job in shown}),
            sealed_step=sealed,
            submitted=submitted,
        )


@dataclass(frozen=True, kw_only=True)
class Cut:
    image: Path
    promised: Promised


class Life:
    """A root on the disk, what is dropped there, and the cuts that are taken meanwhile."""

    def __init__(self, disk: Disk, seed: int) -> None:
        self.disk = disk
        self.dice = random.Random(seed)
        self.dropped: dict[str, bytes] = {}  # by name
        self.submitted: set[str] = set()
        self.cuts: list[Cut] = []

    @contextmanager
    def root(self) -> Iterator[Root]:
        root = Root(self.disk.mount_point / "root", TABLES, behaviour={"*": {"step_seconds": STEP_SECONDS}})
        try:
            yield root
        finally:
            root.close()

    def live(self, jobs: int, cuts: int) -> None:
        """Run so many jobs; cut the power at random moments until both are done."""
        with self.disk.mounted(), self.root() as root:
            root.start()
            self.disk.sync()
            while len(self.dropped) < jobs or len(self.cuts) < cuts:
                if len(self.dropped) < jobs and self.dice.random() < 0.4:
                    self.drop(root)
                elif len(self.dropped) >= jobs and all(job.state in FINAL_STATES for job in root.jobs()):
                    jobs += 1
                else:
                    time.sleep(self.dice.random() * 0.15)  # the random moment is the point, nothing is waited for
                if len(self.cuts) < cuts and self.dice.random() < 0.5:
                    self.cut(root)
            root.kill()

    def drop(self, root: Root) -> None:
        """A new dataset, by a rename without fsync as most programs do it, or by `dropforge submit`."""
        number = len(self.dropped) + 1
        name = f"set-{number}.jsonl"
        rows = "".join(json.dumps({"text": f"set {number} row {row}"}) + "\n" for row in range(5 + number * 7 % 20))
        self.dropped[name] = rows.encode()
        if self.dice.random() < 0.25:
            outside = self.disk.folder / name
            outside.write_bytes(rows.encode())
            assert root.run("submit", str(outside)).returncode == 0
            self.submitted.add(name)
        else:
            root.drop(name, rows.encode())

    def cut(self, root: Root) -> None:
        image = self.disk.folder / f"cut-{len(self.cuts)}"
        with stopped(root.start_pid):
            self.disk.cut(image)
            promised = Promised.by(root, frozenset(self.submitted))
        self.cuts.append(Cut(image=image, promised=promised))

    def check(self, cut: Cut) -> None:
        """Start from what the cut left, let everything come to its end, and compare it with what was promised."""
        with self.disk.mounted(cut.image), self.root() as root:
            steps = [found.step for found in guard.scan_checkpoints(root.settings.model_dir) if found.is_intact]
            assert max(steps, default=0) >= cut.promised.sealed_step
            root.start()
            inbox = root.settings.inbox_dir

            def quiet() -> bool:
                return not list(inbox.glob("*.jsonl")) and all(job.state in FINAL_STATES for job in root.jobs())

            try:
                wait_until(quiet, 30, "everything to come to its end")
            except AssertionError as error:
                raise AssertionError(
                    f"{error}; {sorted(inbox.iterdir())}; {root.jobs()}; {root.status()}; {root.errors()}"
                ) from None
            assert root.stop() == 0
            assert_sound(root)
            jobs = {job.id: job for job in root.jobs()}
            for job_id in cut.promised.queued:
                assert job_id in jobs, f"{job_id} was queued, and no row knows it"
                job = jobs[job_id]
                assert job.state is JobState.SUCCEEDED, f"{job.name} was queued, and is {job.state}: {job.reason}"
                assert (inbox / "done" / job_id / job.name).read_bytes() == self.dropped[job.name]
            for name in cut.promised.submitted:
                assert any(job.name == name and job.state is JobState.SUCCEEDED for job in jobs.values()), name
            versions = {version.record["job"]: version for version in list_versions(root.settings.model_dir)}
            for job_id in cut.promised.succeeded:
                assert job_id in versions, f"the version of {job_id} is gone"
            for version in versions.values():
                assert damage(version) == ()


def test_what_was_promised_survives_a_power_cut_at_any_moment(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    seed: int = request.config.getoption("--seed")
    print(f"seed {seed}")
    life = Life(Disk(tmp_path), seed)
    life.live(jobs=3, cuts=5)
    for cut in life.cuts:
        life.check(cut)
