"""What status called queued, sealed or succeeded, and what a command said, is there after a power cut.

Daemon and commands work on a disk that really loses what nobody fsynced (`tests.support.power`). It is cut at random moments
of whole jobs; then the journal of each cut is replayed, the daemon starts on it, and every job comes to its end.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import guard
from daemon import config
from daemon.holds import PAUSED_KEY
from daemon.inbox import layout
from daemon.job import FINAL_STATES, Job, JobState
from daemon.lineage import read_lineage
from daemon.root_identity import contradiction, read_parts
from daemon.store import JobStore
from daemon.versions import current_version, damage, list_versions
from tests.support.inprocess import rows as gsm8k_rows
from tests.support.power import Disk, stopped, why_no_disk
from tests.support.root import Root, dropforge, wait_until
from tests.support.sound import assert_sound

pytestmark = pytest.mark.skipif(bool(why_no_disk()), reason=why_no_disk() or "-")

TABLES = {
    "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 3},
    "inbox": {"settle_seconds": 0.05, "rescan_seconds": 0.5},
    "queue": {"retry_seconds": 0.01, "stop_timeout": 10.0},
}
REAL_TABLES = {**TABLES, "training": {"save_steps": 2, "num_train_epochs": 2.0, "learning_rate": 3e-3}}
STATES = ("job.queued", "job.succeeded")  # what the log says of them is a promise
SIDECAR = b"[training]\nseed = 7\n"
ROUNDS, CUTS_A_ROUND = 10, 20  # short rounds: the kernel writes by itself what has been dirty for half a minute


@dataclass(frozen=True, kw_only=True)
class Promised:
    """What the daemon had said when the power went."""

    queued: frozenset[str]  # jobs
    succeeded: frozenset[str]
    submitted: frozenset[str]  # names of files whose `submit` had returned
    sealed_step: int  # of the run in progress; 0 between runs
    moment: str  # the last event

    @classmethod
    def by(cls, root: Root, submitted: frozenset[str]) -> Promised:
        """Read the log, up to its last whole line, and the status file."""
        events = [json.loads(line) for line in root.settings.log_path.read_bytes().split(b"\n")[:-1]]
        said = {name: {event["job"] for event in events if event["event"] == name} for name in STATES}
        status = root.status()
        assert status is not None
        shown = {job["id"] for job in status["recent"] if job["state"] == "succeeded"}
        sealed = 0
        for event in events:
            if event["event"] == "checkpoint.sealed":
                sealed = event["step"]
            elif event["event"] in ("job.started", "job.succeeded"):
                sealed = 0
        return cls(
            queued=frozenset(said["job.queued"]),
            succeeded=frozenset(said["job.succeeded"] | shown),
            submitted=submitted,
            sealed_step=sealed,
            moment=events[-1]["event"],
        )


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The disk as the power cut left it, and what had been promised by then."""

    image: Path
    promised: Promised


class Life:
    """A root on the disk, what is dropped there, and the cuts that are taken meanwhile."""

    def __init__(self, disk: Disk, seed: int, *, base_model: Path | None = None) -> None:
        """`base_model`: trained for real; without it the quick trainer works."""
        self.disk = disk
        self.dice = random.Random(seed)
        self.base_model = base_model
        self.dropped: dict[str, bytes] = {}  # by name
        self.submitted: set[str] = set()
        self.cuts: list[Cut] = []

    @contextmanager
    def root(self) -> Iterator[Root]:
        path = self.disk.mount_point / "root"
        if self.base_model is not None:
            root = Root(path, REAL_TABLES, base_model=self.base_model)
        else:
            root = Root(path, TABLES, behaviour={"*": {"step_seconds": 0.02}})
        try:
            yield root
        finally:
            root.close()

    def live(self, jobs: int, cuts: int) -> None:
        """Run at least so many jobs, and cut the power at random moments until there are enough cuts."""
        with self.disk.mounted(), self.root() as root:
            root.start()
            self.disk.sync()
            while len(self.dropped) < jobs or len(self.cuts) < cuts:
                if self.dice.random() < 0.4 and sum(job.state not in FINAL_STATES for job in root.jobs()) < jobs:
                    self.drop(root)
                else:
                    # The random moment is the point, nothing is waited for.
                    time.sleep(self.dice.random() * (0.15 if self.base_model is None else 3.0))
                if len(self.cuts) < cuts and self.dice.random() < 0.5:
                    self.cut(root)
            root.kill()

    def drop(self, root: Root) -> None:
        """A new dataset, by a rename without fsync as most programs do it, or by `dropforge submit` with a sidecar."""
        number = len(self.dropped) + 1
        name = f"set-{number}.jsonl"
        if self.base_model is not None:
            rows = gsm8k_rows(8, start=8 * number)
        else:
            rows = [{"text": f"set {number} row {row}"} for row in range(5 + number * 7 % 20)]
        content = self.dropped[name] = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if self.dice.random() < 0.25:
            (self.disk.folder / name).write_bytes(content)
            (self.disk.folder / name).with_suffix(".job.toml").write_bytes(SIDECAR)
            assert root.run("submit", str(self.disk.folder / name)).returncode == 0
            self.submitted.add(name)
        else:
            root.drop(name, content)

    def cut(self, root: Root) -> None:
        image = self.disk.folder / f"cut-{len(self.cuts)}"
        with stopped(root.start_pid):
            self.disk.cut(image)
            promised = Promised.by(root, frozenset(self.submitted))
        self.cuts.append(Cut(image=image, promised=promised))

    def check_all(self) -> None:
        for number, cut in enumerate(self.cuts):
            try:
                self.check(cut)
            except AssertionError as error:
                raise AssertionError(f"cut {number}, after {cut.promised.moment}: {error}") from error
            cut.image.unlink()

    def check(self, cut: Cut) -> None:
        """Start from what the cut left, let everything come to its end, and compare it with what was promised."""
        promised = cut.promised
        with self.disk.mounted(cut.image), self.root() as root:
            found = guard.scan_checkpoints(root.settings.model_dir)
            assert max((one.step for one in found if one.is_intact), default=0) >= promised.sealed_step
            root.start()
            inbox = root.settings.inbox_dir

            def quiet() -> bool:
                return not list(inbox.glob("*.jsonl")) and all(job.state in FINAL_STATES for job in root.jobs())

            wait_until(quiet, 60 if self.base_model is None else 600, "everything to come to its end")
            assert root.stop() == 0
            assert_sound(root)
            jobs = {job.id: job for job in root.jobs()}
            for job_id in promised.queued:
                job = jobs[job_id]
                assert job.state is JobState.SUCCEEDED, f"{job.name} was queued, and is {job.state}: {job.reason}"
                assert (inbox / "done" / job_id / job.name).read_bytes() == self.dropped[job.name]
            for job in jobs.values():  # what nobody had promised yet may be lost, not in silence
                lost = job.size_bytes and job.state is JobState.REJECTED
                assert not lost or "when it was dropped" in job.reason, job.reason
            for name in promised.submitted:
                (job,) = (job for job in jobs.values() if job.name == name)
                assert (job.state, job.overrides) == (JobState.SUCCEEDED, {"training": {"seed": 7}})
            versions = {version.record["job"]: version for version in list_versions(root.settings.model_dir)}
            assert promised.succeeded <= versions.keys()
            assert [problem for version in versions.values() for problem in damage(version)] == []
            lineage = read_lineage(root.settings.model_dir)
            assert lineage.broken == ()
            assert lineage.recorded().keys() == {version.name for version in versions.values()}


def test_what_was_promised_survives_a_power_cut_at_any_moment(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The short form of the next test."""
    seed: int = request.config.getoption("--seed")
    print(f"seed {seed}")
    life = Life(Disk(tmp_path), seed)
    life.live(jobs=3, cuts=5)
    life.check_all()


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_what_was_promised_survives_two_hundred_power_cuts(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    seed: int = request.config.getoption("--seed")
    moments: Counter[str] = Counter()
    for number in range(ROUNDS):
        print(f"seed {seed + number}")
        life = Life(Disk(tmp_path / f"round-{number}"), seed + number)
        life.live(jobs=3, cuts=CUTS_A_ROUND)
        moments += Counter(cut.promised.moment for cut in life.cuts)
        life.check_all()
    print(f"{moments.total()} cuts, each followed by a start and the end of every job; cut after {dict(moments)}")


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_what_was_promised_survives_power_cuts_of_a_real_training(
    tmp_path: Path, tiny_base: Path, request: pytest.FixtureRequest
) -> None:
    seed: int = request.config.getoption("--seed")
    print(f"seed {seed}")
    life = Life(Disk(tmp_path), seed, base_model=tiny_base)
    life.live(jobs=2, cuts=10)
    life.check_all()


# -- what a command said


def job_of(root: Root, name: str) -> Job:
    job = root.job(name)
    assert job is not None
    return job


def store_of(root: Root) -> JobStore:
    return JobStore(root.settings.store_path)


def submitted(root: Root) -> None:
    inbox = root.settings.inbox_dir
    assert (inbox / "new.jsonl").read_bytes() == b'{"text": "new"}\n'
    assert (inbox / "new.job.toml").read_bytes() == SIDECAR
    assert not list(inbox.glob(".submit-*"))


def paused(root: Root) -> None:
    with closing(store_of(root)) as store:
        assert store.control(PAUSED_KEY)


def resumed(root: Root) -> None:
    with closing(store_of(root)) as store:
        assert store.control(PAUSED_KEY) is None


def cancelled(root: Root) -> None:
    job = job_of(root, "waits.jsonl")
    assert job.state is JobState.CANCELLED
    assert (root.settings.inbox_dir / "failed" / job.id / job.name).read_bytes()


def tried_again(root: Root) -> None:
    job = job_of(root, "waits.jsonl")
    assert job.state is JobState.CLAIMED
    assert (root.settings.inbox_dir / "processing" / job.id / job.name).read_bytes()


def rolled_back(root: Root) -> None:
    version = current_version(root.settings.model_dir)
    assert version is not None
    assert version.name == "0001" == read_lineage(root.settings.model_dir).current


def initialised(root: Root) -> None:
    settings = config.load(root.path.parent / "deep" / "down")
    assert contradiction(read_parts(settings)) == ""
    assert {path.name for path in settings.root.iterdir()} >= {"dropforge.toml", "inbox", "state", "current_model"}


def adopted(root: Root) -> None:
    assert contradiction(read_parts(root.settings)) == ""


def restorable(root: Root) -> None:
    """The backup that was made, into another place, by a command that the next cut is of."""
    again = root.path.with_name("from-the-cut")
    assert dropforge("--root", str(again), "restore", str(saved_by(root))).returncode == 0
    restored(root, again)


def restored(root: Root, again: Path | None = None) -> None:
    settings = config.load(again or root.path.with_name("again"))
    assert read_lineage(settings.model_dir).current == "0001"
    versions = list_versions(settings.model_dir)
    assert [version.name for version in versions] == ["0001", "0002"]
    assert [problem for version in versions for problem in damage(version)] == []
    with closing(JobStore(settings.store_path, check=True)) as store:
        jobs = store.jobs()
        assert {job.name for job in jobs} == {"a.jsonl", "b.jsonl", "waits.jsonl"}
        for job in jobs:
            path = layout.locate(settings, job)
            assert path is not None
            assert path.read_bytes() == content_of(job.name)
    assert "two roots of one id" in contradiction(read_parts(settings))


def saved_by(root: Root) -> Path:
    return root.path.with_name("saved.tar.zst")


def content_of(name: str) -> bytes:
    return json.dumps({"text": name}).encode() + b"\n"


def test_what_a_command_said_survives_a_power_cut(tmp_path: Path) -> None:
    """The power goes right after each of them, while no daemon fsyncs anything of its own."""
    disk = Disk(tmp_path)
    life = Life(disk, 0)
    (tmp_path / "new.jsonl").write_bytes(b'{"text": "new"}\n')
    (tmp_path / "new.job.toml").write_bytes(SIDECAR)
    cuts: list[tuple[Path, Callable[[Root], None]]] = []
    with disk.mounted(), life.root() as root:
        root.start()
        for name in ("a.jsonl", "b.jsonl"):
            root.drop(name, content_of(name))
            assert root.finished(name).state is JobState.SUCCEEDED
        assert root.run("pause").returncode == 0
        root.drop("waits.jsonl", content_of("waits.jsonl"))
        wait_until(lambda: (job := root.job("waits.jsonl")) and job.state is JobState.QUEUED)
        assert root.stop() == 0
        waits = job_of(root, "waits.jsonl").id

        def cut_after(*arguments: str, root_path: Path | None = None, holds: Callable[[Root], None]) -> None:
            disk.sync()  # what was before
            done = dropforge("--root", str(root_path or root.path), *arguments)
            assert done.returncode == 0, done.stderr
            cuts.append((tmp_path / f"cut-{len(cuts)}", holds))
            disk.cut(cuts[-1][0])

        cut_after("resume", holds=resumed)
        cut_after("pause", holds=paused)
        cut_after("cancel", waits, holds=cancelled)
        cut_after("retry", waits, holds=tried_again)
        cut_after("rollback", "1", holds=rolled_back)
        cut_after("backup", str(saved_by(root)), holds=restorable)
        cut_after("restore", str(saved_by(root)), root_path=root.path.with_name("again"), holds=restored)
        cut_after("submit", str(tmp_path / "new.jsonl"), holds=submitted)
        cut_after("init", root_path=disk.mount_point / "deep" / "down", holds=initialised)
        (root.settings.inbox_dir / ".dropforge-root.json").unlink()
        cut_after("adopt", holds=adopted)
    for image, holds in cuts:
        with disk.mounted(image), life.root() as root:
            holds(root)
