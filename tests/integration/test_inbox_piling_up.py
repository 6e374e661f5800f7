"""What must not pile up: hooks of a hundred jobs that end at once, and the passes of files that were cancelled."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from daemon.config import HookSettings
from daemon.inbox import candidates, slices
from daemon.job import Job, JobState
from daemon.notifications import MAX_PENDING, MAX_RUNNING, Hooks
from tests.support.inbox import ROW, Record, Root


def test_a_cancelled_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    """Its child ends, and the next large file gets its turn at once."""
    with Root(tmp_path, data={"on_bad_rows": "skip"}) as root:
        root.drop("long.jsonl", ROW.encode() * 6_000_000)
        root.drop("next.jsonl", b'{"text": "%s"}\n' % (b"a" * 2**20) * 33)
        root.pump(lambda: any(done for job, done, _ in root.intake.view().scanning if job))
        long = next(job for job in root.jobs() if job.name == "long.jsonl")
        root.archive.finish(long, JobState.CANCELLED, "by a person")
        root.wait_for(1)
        assert not root.intake.view().scanning
        assert {job.name: job.state for job in root.jobs()} == {
            "long.jsonl": JobState.CANCELLED,
            "next.jsonl": JobState.QUEUED,
        }


def test_hundreds_of_ends_run_few_hooks_at_once_and_lose_none_in_silence(tmp_path: Path) -> None:
    """As many as MAX_RUNNING at once, in order; what was left out is told in the log and to the next hook."""
    log = Record()
    out = tmp_path / "told"
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    command = ("sh", "-c", f'read -r _ < {gate}; told=$(cat); echo "$told" >> {out}')
    hooks = Hooks(HookSettings(on_job_finished=command, timeout=60.0), log)
    for number in range(300):
        hooks.fire("on_job_finished", {"job": number})
        assert len(hooks._running) <= MAX_RUNNING
    left_out = 300 - MAX_RUNNING - MAX_PENDING
    assert len(log.events("hook.left_out")) == left_out
    keeper = os.open(gate, os.O_RDWR)
    os.write(keeper, b"go\n" * 300)
    deadline = time.monotonic() + 60
    while hooks._running and time.monotonic() < deadline:
        hooks.collect()
    os.close(keeper)
    told = [json.loads(line) for line in out.read_text().splitlines() if line]
    assert len(told) == MAX_RUNNING + MAX_PENDING
    assert sum(hook["left_out"] for hook in told) == left_out
    assert max(hook["age_seconds"] for hook in told) > 0
    assert not log.events("hook.failed")


def test_of_holds_only_the_newest_waits(tmp_path: Path) -> None:
    """A hook that is slow is told of the state of now, not of every state before."""
    hooks = Hooks(HookSettings(on_hold=("sleep", "60"), timeout=60.0), Record())
    for number in range(20):
        hooks.fire("on_hold", {"reason": str(number)})
    assert [hook.facts["reason"] for hook in hooks._pending] == ["19"]
    hooks.close(patience=0.0)


@pytest.mark.parametrize("name", ["f{}.txt", "f{}.job.toml"], ids=["foreign", "orphaned"])
def test_thousands_of_names_that_are_not_taken_hold_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """They are worked through in slices, status shows the first, and the log has a line for few and one for the rest."""
    monkeypatch.setattr(candidates, "ORPHAN_SECONDS", 0.5)
    count, told = 20_000, 0
    with Root(tmp_path) as root:
        for number in range(count):
            (root.inbox / name.format(number)).touch()
        slowest, end = 0.0, time.monotonic() + 60
        while told < count and time.monotonic() < end:
            began = time.process_time()
            root.tick(wait=0.02)
            root.intake.view()
            slowest = max(slowest, time.process_time() - began)
            rest = sum(event["more"] for event in root.log.events("inbox.many_left_alone"))
            told = len(root.log.events("file.left_alone")) + rest
        assert told == count
        assert len(root.log.lines) < count / 10
        assert len(root.intake.view().left_alone) == candidates.SHOWN
        assert slowest < 1.0  # of this process's own time, which a loaded machine does not stretch
        root.drop("good.jsonl", ROW)
        root.wait_for(1)


def test_many_jobs_are_purged_and_looked_through_a_slice_at_a_tick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main loop never stands for them, and what a person put among them is found all the same."""
    monkeypatch.setattr(slices, "SLICE_SECONDS", -1.0)  # a tick takes one step
    with Root(tmp_path, inbox={"keep_done_days": 1.0}) as root:
        done = root.inbox / "done"
        for number in range(20):
            old = Job(
                id=f"20200101-000000-{number:04x}",
                name="a.jsonl",
                state=JobState.SUCCEEDED,
                finished_at="2020-01-01T00:00:00.000Z",
            )
            root.store.add(old)
            (done / old.id).mkdir()
        (done / "lost.jsonl").touch()
        root.intake._next_purge = 0.0
        root.tick()
        assert len(list(done.iterdir())) > 15
        assert root.intake.next_due_seconds() == 0.0  # more is to be done at once
        root.pump(lambda: [path.name for path in done.iterdir()] == ["lost.jsonl"])
        root.pump(lambda: [item.name for item in root.intake.view().left_alone] == ["done/lost.jsonl"])
        root.pump(lambda: root.log.events("file.left_alone"))
        assert [event["file"] for event in root.log.events("file.left_alone")] == ["done/lost.jsonl"]
        assert len(root.log.events("file.purged")) == 20
