"""The archive: a file and its sidecar stay a pair on every way, and a folder that cannot be moved is a warning."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon import control
from daemon.errors import DropforgeError
from daemon.in_hand import InHand
from daemon.inbox import archive, claim, layout
from daemon.job import Job, JobState
from daemon.left_alone import LeftAlone
from daemon.recovery import repair_inbox
from daemon.root_identity import adopt
from daemon.store import JobStore, TransitionRefused
from tests.support.disks import on_another_disk
from tests.support.inbox import ROW, Root, assert_sound

OLD, NEW = ROW, ROW * 2
SIDECAR = "[training]\nlearning_rate = 1e-5\n"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    with Root(tmp_path) as opened:
        yield opened


@pytest.fixture
def other_file_system(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than the root."""
    folder = Path(tempfile.mkdtemp(dir=on_another_disk(tmp_path)))
    yield folder
    shutil.rmtree(folder)


def texts(folder: Path) -> dict[str, str]:
    """Names and contents of the files that are not hidden."""
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def queued_pair(root: Root, name: str = "x.jsonl") -> Job:
    root.drop(layout.sidecar_name(name), SIDECAR)
    root.drop(name, OLD)
    (job,) = root.wait_for(1)
    return job


@pytest.mark.parametrize(
    "waiting",
    [
        pytest.param({"x.jsonl": NEW}, id="file"),
        pytest.param({"x.jsonl.gz": NEW}, id="file_of_another_suffix"),
        pytest.param({"x.job.toml": ""}, id="sidecar"),
        pytest.param({"x.jsonl": NEW, "x-2.job.toml": ""}, id="file_and_the_next_sidecar"),
    ],
)
def test_a_returned_pair_never_meets_another_file_or_sidecar(root: Root, waiting: dict[str, str]) -> None:
    """The returned sidecar belongs to the returned file alone, and what lies there keeps what it has."""
    job = queued_pair(root)
    for name, text in waiting.items():
        (root.inbox / name).write_text(text)
    control.cancel(root.settings, root.store, job, hand_back=True)
    found = texts(root.inbox)
    number = 3 if "x-2.job.toml" in waiting else 2
    assert found == {**waiting, f"x-{number}.jsonl": OLD, f"x-{number}.job.toml": SIDECAR}
    assert_sound(root.settings, root.store)


def test_a_returned_file_without_a_sidecar_takes_none(root: Root) -> None:
    """A sidecar that waits for another file would change how this one is trained."""
    root.drop("x.jsonl", OLD)
    (job,) = root.wait_for(1)
    (root.inbox / "x.job.toml").write_text(SIDECAR)
    control.cancel(root.settings, root.store, job, hand_back=True)
    assert texts(root.inbox) == {"x.job.toml": SIDECAR, "x-2.jsonl": OLD}


def test_a_returned_pair_has_its_own_name_where_that_is_free(root: Root) -> None:
    """And in the folder into which it was dropped."""
    (root.inbox / "high" / "x.job.toml").write_text(SIDECAR)
    root.drop("x.jsonl", OLD, folder="high")
    (job,) = root.wait_for(1)
    (root.inbox / "x.jsonl.part").write_text("another's")
    control.cancel(root.settings, root.store, job, hand_back=True)
    assert texts(root.inbox / "high") == {"x.jsonl": OLD, "x.job.toml": SIDECAR}


@pytest.mark.parametrize("links", [True, False])
def test_a_return_that_is_cut_short_is_begun_anew(root: Root, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Killed when the sidecar lies in the inbox already and its file does not; also of an owner who forbids links."""
    job = queued_pair(root)
    (root.inbox / "x.jsonl").write_text(NEW)

    class Killed(BaseException):
        pass

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    real = archive.rename_durable

    def rename(source: Path, target: Path) -> None:
        if source.name == "x.jsonl":
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(archive, "rename_durable", rename)
        if not links:
            patch.setattr(os, "link", refuse)
        with pytest.raises(Killed):
            control.cancel(root.settings, root.store, job, hand_back=True)
    assert texts(root.inbox) == {"x.jsonl": NEW, "x-2.job.toml": SIDECAR}
    (root.inbox / "x.jsonl").unlink()
    repair_inbox(root.settings, root.store, root.archive, root.log, in_hand=InHand(), left_alone=LeftAlone())
    assert texts(root.inbox) == {"x.jsonl": OLD, "x.job.toml": SIDECAR}


def test_names_as_long_as_a_file_system_allows_are_returned_too(root: Root) -> None:
    """A number makes a name longer: its stem gives way, by bytes."""
    name = "é" * 122 + ".jsonl"
    job = queued_pair(root, name)
    (root.inbox / name).write_text(NEW)
    control.cancel(root.settings, root.store, job, hand_back=True)
    others = {found: text for found, text in texts(root.inbox).items() if found != name}
    assert sorted(others.values()) == sorted([OLD, SIDECAR])
    (data,) = (found for found in others if found.endswith("-2.jsonl"))
    assert layout.sidecar_name(data) in others


def test_a_pair_whose_file_was_replaced_in_its_claim_goes_back_as_a_pair(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when another file of that name came in the same moment."""
    real = claim.claim_file

    def claim_file(settings, job, source, sidecar):
        if not (root.path / "swapped").exists():
            (root.path / "swapped").touch()
            source.write_text(ROW * 5)
            target = real(settings, job, source, sidecar)
            (root.inbox / "x.jsonl").write_text(NEW)
            return target
        return real(settings, job, source, sidecar)

    monkeypatch.setattr(claim, "claim_file", claim_file)
    (root.inbox / "x.job.toml").write_text(SIDECAR)
    root.drop("x.jsonl", OLD)
    jobs = {job.name: job for job in root.wait_for(2)}
    assert {name: job.dataset.rows for name, job in jobs.items()} == {"x.jsonl": 2, "x-2.jsonl": 5}
    assert {name: job.recipe["training"]["learning_rate"] == 1e-5 for name, job in jobs.items()} == {
        "x.jsonl": False,
        "x-2.jsonl": True,
    }


def test_a_sidecar_whose_file_could_not_be_taken_goes_back_under_its_own_name_or_not_at_all(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under another name it would become another file's."""

    def claim_file(settings, job, source, sidecar):
        folder = layout.processing_dir(settings, job.id)
        folder.mkdir()
        sidecar.rename(folder / sidecar.name)
        sidecar.write_text("newer = 1\n")
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(claim, "claim_file", claim_file)
    (root.inbox / "x.job.toml").write_text(SIDECAR)
    root.drop("x.jsonl", OLD)
    (job,) = root.wait_for(1, JobState.CANCELLED)
    assert texts(root.inbox) == {"x.jsonl": OLD, "x.job.toml": "newer = 1\n"}
    assert texts(root.inbox / "failed" / job.id)["x.job.toml"] == SIDECAR


def test_a_finished_folder_that_cannot_be_moved_is_a_warning_at_a_start_as_at_run_time(
    tmp_path: Path, other_file_system: Path
) -> None:
    """`inbox/failed` on another file system: the daemon starts, works, and says what to do until it is mended."""
    with Root(tmp_path) as root:
        shutil.rmtree(root.inbox / "failed")
        (root.inbox / "failed").symlink_to(other_file_system)
        root.drop("bad.jsonl", "no row\n")
        (job,) = root.wait_for(1, JobState.REJECTED)

        def warned() -> bool:
            return any("on another file system" in line for line in root.intake.view().warnings)

        root.pump(warned)
        root.close()
        root.open()
        assert warned()
        root.drop("good.jsonl", OLD)
        root.wait_for(1)
        assert len(root.log.events("file.not_moved")) == 2  # once in each life
        assert layout.locate(root.settings, job) == root.inbox / "processing" / job.id / "bad.jsonl"
        (root.inbox / "failed").unlink()
        (root.inbox / "failed").mkdir()
        root.pump(lambda: not root.archive.problem(job.id))
        assert not warned()
        assert root.log.events("file.moved")
        assert_sound(root.settings, root.store)


def test_a_retry_of_a_file_on_another_file_system_says_what_to_do(root: Root, other_file_system: Path) -> None:
    """In a sentence; the job stays as it is."""
    root.drop("bad.jsonl", "no row\n")
    (job,) = root.wait_for(1, JobState.REJECTED)
    (root.inbox / "failed" / job.id).rename(root.path / "away")
    (root.inbox / "failed").rmdir()
    shutil.copytree(root.path / "away", other_file_system / job.id)
    (root.inbox / "failed").symlink_to(other_file_system)
    with pytest.raises(DropforgeError, match="on another file system"):
        control.retry(root.settings, root.store, job)
    assert root.store.get(job.id).state is JobState.REJECTED


def test_what_a_command_could_not_move_is_moved_by_the_daemon(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a restart."""
    monkeypatch.setattr(archive, "COMMAND_SECONDS", 0.0)
    root.drop("x.jsonl", OLD)
    (job,) = root.wait_for(1)
    (root.inbox / "failed").rmdir()
    (root.inbox / "failed").write_text("in the way")
    told = control.cancel(root.settings, root.store, job, hand_back=False)
    assert "moved later" in told
    (root.inbox / "failed").unlink()
    root.pump((root.inbox / "failed" / job.id / "x.jsonl").exists)
    assert_sound(root.settings, root.store)


def test_jobs_are_not_given_up_because_their_folder_may_not_be_entered(root: Root) -> None:
    """A start that cannot see processing/ stops with a sentence; it does not take the files for lost."""
    root.drop("x.jsonl", OLD)
    (job,) = root.wait_for(1)
    root.close()
    (root.inbox / "processing").rename(root.path / "away")
    (root.inbox / "processing").symlink_to("processing")  # a loop: whoever we are, it cannot be entered
    with pytest.raises((DropforgeError, OSError)):
        root.open()
    (root.inbox / "processing").unlink()
    (root.path / "away").rename(root.inbox / "processing")
    root.open()
    assert root.store.get(job.id).state is JobState.QUEUED


class Racing(JobStore):
    """A store whose daemon launches the first job whenever the queue is asked for."""

    def queue(self, *, limit: int = -1) -> list[Job]:
        self.claim_next(0.0)
        return super().queue(limit=limit)


def test_moving_a_job_that_is_launched_at_that_moment_says_so(root: Root) -> None:
    root.drop("x.jsonl", OLD)
    (job,) = root.wait_for(1)
    racing = Racing(root.settings.store_path)
    assert "left the queue" in control.move(racing, job, first=True, priority=None)
    with pytest.raises(TransitionRefused, match="running"):
        control.move(racing, job, first=True, priority=None)
    racing.close()


def test_a_job_that_is_cancelled_while_its_report_is_applied_harms_nobody(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command may come between any look at a job and its transition."""
    real = archive.Archive.finish_duplicate

    def cancel_first(self, job, dataset, data):
        control.cancel(root.settings, root.store, job, hand_back=False)
        return real(self, job, dataset, data)

    monkeypatch.setattr(archive.Archive, "finish_duplicate", cancel_first)
    root.drop("x.jsonl", OLD)
    (job,) = root.wait_for(1, JobState.CANCELLED)
    root.pump((root.inbox / "failed" / job.id / "x.jsonl").exists)
    assert not any((root.inbox / "processing").iterdir())
    assert_sound(root.settings, root.store)


def test_a_folder_that_cannot_be_listed_ends_no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`done/` under `keep_done_days`: reported, and tried again."""
    real = os.listdir

    def listdir(path: Path) -> list[str]:
        if Path(path).name == "done":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    with Root(tmp_path, inbox={"keep_done_days": 1.0}) as root:
        monkeypatch.setattr(os, "listdir", listdir)
        root.pump(lambda: root.log.events("file.not_purged"))
        root.drop("x.jsonl", OLD)
        root.wait_for(1)


def test_an_inbox_that_cannot_be_completed_is_named_and_used_when_it_can(root: Root) -> None:
    """Another folder in its place, in which `processing` is a file: nothing is taken, nobody falls over."""
    root.inbox.rename(root.path / "old")
    root.inbox.mkdir()
    adopt(root.settings)
    (root.inbox / "processing").write_text("a file")
    dropped = root.drop("x.jsonl", OLD)
    root.pump(lambda: any("processing cannot be used" in line for line in root.intake.view().warnings))
    assert dropped.exists()
    assert not root.jobs()
    (root.inbox / "processing").unlink()
    root.wait_for(1)
    assert not any("cannot be used" in line for line in root.intake.view().warnings)
