"""Back-pressure, passes that end badly, and writers that will not let go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.inbox import claim, layout, validation_pool
from daemon.job import JobState, Priority, RunSpec
from daemon.trainer.attempt import check_unchanged
from daemon.trainer.errors import RunFailure
from tests.support.inbox import ROW, Root, assert_sound
from tests.support.root import wait_until


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    with Root(tmp_path) as opened:
        yield opened
        assert_sound(opened.settings, opened.store)


def test_files_beyond_max_queued_stay_in_the_inbox_until_there_is_room(tmp_path: Path) -> None:
    """They are counted as deferred, and high priority goes first when a place is free."""
    with Root(tmp_path, inbox={"max_queued": 2}) as root:
        for number in range(4):
            root.drop(f"{number}.jsonl", ROW * (number + 1))
        root.drop("urgent.jsonl", ROW * 9, folder="high")
        root.pump(lambda: root.intake.view().deferred == 3 and len(root.jobs(JobState.QUEUED)) == 2)
        assert len(list(root.inbox.glob("*.jsonl"))) + len(list((root.inbox / "high").glob("*.jsonl"))) == 3
        while len(root.jobs()) < 5:
            root.finish(root.store.queue()[0])
            count = len(root.jobs())
            root.pump(lambda count=count: len(root.jobs()) > count)
        order = [job.priority for job in root.jobs()]
        assert Priority.HIGH in order[:3]
        root.pump(lambda: not root.jobs(JobState.CLAIMED))
        assert_sound(root.settings, root.store)


def test_nothing_is_claimed_while_the_service_does_not_accept(root: Root) -> None:
    """Files wait, visibly, and are claimed when it does again."""
    root.drop("x.jsonl")
    root.pump(lambda: root.intake.view().deferred == 1, accept=False)
    for _ in range(3):
        root.tick(accept=False)
    assert not root.jobs()
    root.wait_for(1)


def test_a_deferred_file_that_changes_meanwhile_settles_again(tmp_path: Path) -> None:
    """Being next in line is no promise about its bytes."""
    with Root(tmp_path, inbox={"max_queued": 1}) as root:
        root.drop("a.jsonl")
        (first,) = root.wait_for(1)
        root.drop("b.jsonl")
        root.pump(lambda: root.intake.view().deferred == 1)
        with (root.inbox / "b.jsonl").open("a") as writer:
            writer.write(ROW)
            writer.flush()
            root.finish(first)
            root.pump(lambda: root.intake.view().waiting)
            assert len(root.jobs()) == 1
            writer.write(ROW)
        job = root.wait_for(1)[0]
        assert job.dataset.rows == 3


def test_a_child_that_dies_once_is_replaced_and_the_file_passes(root: Root) -> None:
    """Killed between two files or in the middle of one."""
    (pid,) = root.intake._validator._pool.pids
    os.kill(pid, signal.SIGKILL)
    root.drop("x.jsonl")
    root.wait_for(1)


def test_a_file_that_kills_its_reader_is_refused_and_the_next_one_passes(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typed, reported, and no business of any other file."""
    real = validation_pool._Child.submit

    def submit(self: validation_pool._Child, task: validation_pool._Task) -> None:
        real(self, task)
        if task.request.path.endswith("killer.jsonl"):
            os.kill(self.process.pid, signal.SIGSEGV)

    monkeypatch.setattr(validation_pool._Child, "submit", submit)
    root.drop("killer.jsonl", ROW * 400_000)
    root.drop("fine.jsonl")
    (rejected,) = root.wait_for(1, JobState.REJECTED)
    assert rejected.name == "killer.jsonl"
    assert "SIGSEGV" in rejected.reason
    root.wait_for(1)
    assert "SIGSEGV" in (root.inbox / "failed" / rejected.id / "report.txt").read_text()


def test_children_end_with_the_daemon_even_when_it_is_killed(tmp_path: Path) -> None:
    """The kernel kills them: nothing reads on for nobody."""
    code = (
        "import sys, threading; from pathlib import Path; from tests.support.inbox import Root\n"
        "root = Root(Path(sys.argv[1])); root.open()\n"
        "print(*root.intake._validator._pool.pids, flush=True); threading.Event().wait(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as daemon:
        child = int(daemon.stdout.readline())
        wait_until(lambda: b"daemon.dataset" in command_line(child), timeout=10, what="the child's command")
        daemon.kill()
        daemon.wait()
        wait_until(lambda: not command_line(child), timeout=10, what="the child's end")


def command_line(pid: int) -> bytes:
    """Empty when the process has ended, whether or not it was waited for."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_jobs_whose_pass_was_interrupted_are_passed_at_the_next_start(root: Root) -> None:
    """Claimed is where they stay meanwhile."""
    root.drop("x.jsonl")
    root.pump(lambda: root.jobs(JobState.CLAIMED) or root.jobs(JobState.QUEUED))
    root.close()
    root.open()
    root.wait_for(1)


def test_a_writer_that_kept_its_handle_cannot_change_what_is_trained(root: Root) -> None:
    """Nobody could know of it (its handle was opened after the claim); the digest does."""
    root.drop("x.jsonl", ROW * 3)
    (job,) = root.wait_for(1)
    path = layout.locate(root.settings, job)
    spec = RunSpec(schema_version=1, job_id=job.id, attempt=1, dataset=job.dataset, recipe={}, run_dir="", model_dir="")
    check_unchanged(spec)
    with path.open("r+") as writer:
        writer.write(ROW.replace("row", "cow"))
    with pytest.raises(RunFailure, match="changed after it was checked"):
        check_unchanged(spec)


def test_a_file_that_changes_under_its_pass_is_shown_and_passed_again(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays claimed, and says why."""
    from daemon.inbox import validation

    monkeypatch.setattr(validation, "FIRST_PAUSE_SECONDS", 0.3)
    real = validation.ValidationPool.collect
    first = True

    def collect(self: validation.ValidationPool):
        nonlocal first
        for reply in real(self):
            if first and reply.kind == "passed":
                first = False
                yield validation.Reply(job_id=reply.job_id, kind="changed", message="it is still being written")
            else:
                yield reply

    monkeypatch.setattr(validation.ValidationPool, "collect", collect)
    root.drop("x.jsonl")
    root.pump(lambda: any("still being written" in item.reason for item in root.intake.view().waiting))
    assert root.jobs(JobState.CLAIMED)
    root.wait_for(1)
    assert not root.intake.view().waiting


def test_old_trained_files_are_purged_by_the_time_their_job_finished(tmp_path: Path) -> None:
    """Not by the times of files; unknown folders and failed jobs are never touched."""
    with Root(tmp_path, inbox={"keep_done_days": 1.0}) as root:
        for name in "abc":
            root.drop(f"{name}.jsonl", ROW * (1 + ord(name)))
        old, new, failed = root.wait_for(3)
        root.finish(old, finished_at="2020-01-01T00:00:00.000Z")
        root.finish(new, finished_at="2999-01-01T00:00:00.000Z")
        root.finish(failed, JobState.FAILED, finished_at="2020-01-01T00:00:00.000Z")
        for job in (old, new):
            os.utime(root.inbox / "done" / job.id / job.name, (1, 1))
        (root.inbox / "done" / "somebody's").mkdir()
        root.intake._next_purge = 0.0
        root.pump(lambda: not (root.inbox / "done" / old.id).exists())
        root.pump(lambda: not root.intake._purge.is_busy)
        assert layout.locate(root.settings, new) is not None
        assert layout.locate(root.settings, failed) is not None
        assert (root.inbox / "done" / "somebody's").exists()


def test_a_file_that_cannot_be_moved_waits_with_its_reason(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not tried again at once, nor does it hold up others."""
    real = claim.claim_file

    def claim_file(settings, job, source, sidecar):
        if job.name == "stuck.jsonl":
            raise PermissionError(1, "Operation not permitted")
        return real(settings, job, source, sidecar)

    monkeypatch.setattr(claim, "claim_file", claim_file)
    root.drop("stuck.jsonl")
    root.drop("x.jsonl", ROW * 2)
    root.wait_for(1)
    root.pump(lambda: any("could not be moved" in item.reason for item in root.intake.view().waiting))
    for _ in range(4):
        root.tick()
    assert len(root.jobs(JobState.CANCELLED)) == 1
    assert (root.inbox / "stuck.jsonl").exists()


@pytest.mark.parametrize("swap", ["file", "link"])
def test_what_takes_the_place_of_a_file_in_the_moment_of_its_claim_is_put_back(
    root: Root, monkeypatch: pytest.MonkeyPatch, swap: str
) -> None:
    """Between the last look and the rename anything may happen to a name; the other thing is watched afresh."""
    real = claim.claim_file
    swapped = False

    def claim_file(settings, job, source, sidecar):
        nonlocal swapped
        if not swapped:
            swapped = True
            source.unlink()
            if swap == "link":
                source.symlink_to("/etc/passwd")
            else:
                source.write_text(ROW * 5)
        return real(settings, job, source, sidecar)

    monkeypatch.setattr(claim, "claim_file", claim_file)
    root.drop("x.job.toml", "[lora]\nr = 3\n")
    root.drop("x.jsonl", ROW)
    (cancelled,) = root.wait_for(1, JobState.CANCELLED)
    assert "took its place" in cancelled.reason
    if swap == "link":
        root.pump(lambda: any("symbolic link" in item.reason for item in root.intake.view().left_alone))
        assert (root.inbox / "x.jsonl").is_symlink()
        assert (root.inbox / "x.job.toml").exists()
    else:
        (job,) = root.wait_for(1)
        assert job.dataset.rows == 5
        assert job.recipe["lora"]["r"] == 3
