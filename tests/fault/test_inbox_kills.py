"""SIGKILL before, or half way through, every call of claim, pass and settling that changes the disk.

After each kill a new daemon starts on what is left. It must bring every drop to the same end, exactly once.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from daemon import control
from daemon.config import Settings
from daemon.inbox import archive, layout
from daemon.job import Job, JobState
from daemon.store import JobStore
from tests.support.inbox import ROW, Root, assert_sound
from tests.support.killpoints import killed_runs

HERE = "tests.fault.test_inbox_kills"
SIDECAR = "[lora]\nr = 3\n"
NEWER = ROW * 2
BAD_SIDECAR = "colour = 'red'\n"
QUICK = {"settle_seconds": 0.03}
ENDS = (JobState.QUEUED, JobState.REJECTED)


def settings_of(root: Path) -> Settings:
    return Settings(root=root, inbox=QUICK)


def take(root: str) -> None:
    """The daemon's part: start, claim, pass, and settle what is refused."""
    opened = Root(Path(root), inbox=QUICK)
    opened.wakeup = threading.Event()
    opened.open()
    opened.pump(lambda: len(opened.jobs(*ENDS)) == 1)
    opened.close()


def settle(root: str, job_id: str) -> None:
    """The end of a job: its state, then its files."""
    settings = settings_of(Path(root))
    store = JobStore(settings.store_path)
    job = store.get(job_id)
    if job.state is JobState.RUNNING:
        job = store.transition(job_id, JobState.RUNNING, JobState.SUCCEEDED, "done", version="0001")
    archive.archive_files(settings, job)
    store.close()


def retry(root: str, job_id: str) -> None:
    """A failed job's file returns, then its state changes."""
    settings = settings_of(Path(root))
    store = JobStore(settings.store_path)
    job = store.get(job_id)
    archive.reopen_files(settings, job)
    if job.state is JobState.FAILED:
        store.transition(job_id, JobState.FAILED, JobState.CLAIMED, "retry")
    store.close()


def hand_back(root: str, job_id: str) -> None:
    """A queued job is cancelled, and its file goes back to the inbox."""
    settings = settings_of(Path(root))
    store = JobStore(settings.store_path)
    job = store.get(job_id)
    if job.state is JobState.QUEUED:
        control.cancel(settings, store, job, hand_back=True)
    store.close()


def prepare_drop(text: str, sidecar: str | None) -> Any:
    def prepare(root: Path) -> Mapping[str, str]:
        settings_of(root).inbox_dir.mkdir(parents=True, exist_ok=True)
        layout.create_folders(settings_of(root))
        JobStore(settings_of(root).store_path).close()
        (root / "inbox" / "x.jsonl").write_text(text)
        if sidecar is not None:
            (root / "inbox" / "x.job.toml").write_text(sidecar)
        return {"root": str(root)}

    return prepare


def prepare_job(state: JobState, **tables: Any) -> Any:
    """A job that has been running, whose file lies where it belongs."""

    def prepare(root: Path) -> Mapping[str, str]:
        settings = settings_of(root)
        settings.inbox_dir.mkdir(parents=True, exist_ok=True)
        layout.create_folders(settings)
        store = JobStore(settings.store_path)
        job = Job(id="20260101-000000-0000", name="x.jsonl", state=JobState.CLAIMED, source=str(root / "inbox/x.jsonl"))
        store.add(job)
        folder = layout.processing_dir(settings, job.id)
        folder.mkdir()
        (folder / "x.jsonl").write_text(ROW)
        store.transition(job.id, JobState.CLAIMED, JobState.QUEUED, "")
        if state is JobState.QUEUED:
            (folder / "x.job.toml").write_text(SIDECAR)
            (root / "inbox" / "x.jsonl").write_text(NEWER)
            store.close()
            return {"root": str(root), "job_id": job.id}
        job = store.transition(job.id, JobState.QUEUED, JobState.RUNNING, "")
        if state is JobState.FAILED:
            job = store.transition(job.id, JobState.RUNNING, JobState.FAILED, "failed")
            archive.archive_files(settings, job)
        store.close()
        return {"root": str(root), "job_id": job.id}

    return prepare


def content_of(folder: Path) -> list[Path]:
    """Every data file under the inbox, wherever it lies."""
    return sorted(path for path in folder.rglob("*.jsonl") if path.is_file())


@pytest.mark.parametrize(
    ("text", "sidecar", "end", "every"),
    [
        pytest.param(ROW, SIDECAR, JobState.QUEUED, 4, id="good"),  # some of the calls stand for the rest
        pytest.param(ROW, SIDECAR, JobState.QUEUED, 1, id="good, every call", marks=pytest.mark.chaos),
        pytest.param('{"text": 1}\n' + ROW, None, JobState.REJECTED, 1, id="bad_rows", marks=pytest.mark.chaos),
        pytest.param(ROW, BAD_SIDECAR, JobState.REJECTED, 1, id="bad_sidecar", marks=pytest.mark.chaos),
    ],
)
def test_a_drop_comes_to_its_one_end_wherever_the_daemon_is_killed(
    tmp_path: Path, text: str, sidecar: str | None, end: JobState, every: int
) -> None:
    """One job, one file, the sidecar honoured; nothing left in the inbox; also when killed a second time later."""
    kills = 0
    for run in killed_runs(f"{HERE}:take", prepare_drop(text, sidecar), tmp_path, every=every):
        with Root(run.root, inbox=QUICK) as root:
            (job,) = root.wait_for(1, *ENDS)
            assert job.state is end, run
            assert len(root.jobs()) == 1, run
            assert_sound(root.settings, root.store)
            found = content_of(root.inbox)
            assert found == [layout.locate(root.settings, job)], run
            assert found[0].read_text() == text, run
            if sidecar is not None:
                assert (found[0].parent / "x.job.toml").read_text() == sidecar, run
            if sidecar == SIDECAR:
                assert job.recipe["lora"]["r"] == 3, run
            assert not list(root.inbox.glob("x.*")), run
        kills += 1
    assert kills > 10


@pytest.mark.parametrize(
    ("target", "state", "place"),
    [("settle", JobState.RUNNING, "done"), ("retry", JobState.FAILED, "processing")],
)
def test_a_jobs_files_end_up_where_its_state_says(tmp_path: Path, target: str, state: JobState, place: str) -> None:
    """A new daemon's repair, then the same command once more: both must find nothing in their way."""
    for run in killed_runs(f"{HERE}:{target}", prepare_job(state), tmp_path):
        with Root(run.root, inbox=QUICK) as root:
            (job,) = root.jobs()
            if job.state is not JobState.RUNNING:
                assert_sound(root.settings, root.store)
            assert [path.read_text() for path in content_of(root.inbox)] == [ROW], run
        {"settle": settle, "retry": retry}[target](str(run.root), job.id)
        found = content_of(run.root / "inbox")
        assert [path.parent.parent.name for path in found] == [place], run
        store = JobStore(settings_of(run.root).store_path)
        assert_sound(settings_of(run.root), store)
        store.close()


def test_a_pair_that_is_handed_back_stays_a_pair_wherever_the_command_is_killed(tmp_path: Path) -> None:
    """After the next start the file lies in processing/ or in the inbox, once, and its sidecar with no other file."""
    places = set()
    for run in killed_runs(f"{HERE}:hand_back", prepare_job(JobState.QUEUED), tmp_path):
        with Root(run.root, inbox=QUICK) as root:
            (job,) = root.jobs()
            assert_sound(root.settings, root.store)
            found = {path.read_text(): path for path in content_of(root.inbox)}
            assert len(content_of(root.inbox)) == len(found) == 2, run
            assert found[NEWER] == root.inbox / "x.jsonl", run
            assert not (root.inbox / "x.job.toml").exists(), run
            pair = found[ROW]
            assert pair.with_name(layout.sidecar_name(pair.name)).read_text() == SIDECAR, run
            assert len(list(root.inbox.glob("*.job.toml"))) == (pair.parent == root.inbox), run
            assert (job.state is JobState.CANCELLED) == (pair.parent == root.inbox), run
            places.add(pair.parent == root.inbox)
    assert places == {False, True}


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.chaos)])
def test_a_removed_drop_leaves_a_cancelled_row_and_returns_its_sidecar(tmp_path: Path, every: int) -> None:
    """Killed between row and rename, then the file is removed by hand before the next start."""
    seen = set()
    for run in killed_runs(f"{HERE}:take", prepare_drop(ROW, SIDECAR), tmp_path, whens=("before",), every=every):
        dropped = run.root / "inbox" / "x.jsonl"
        was_there = dropped.exists()
        dropped.unlink(missing_ok=True)
        with Root(run.root, inbox=QUICK) as root:
            assert_sound(root.settings, root.store)
            if was_there:
                assert [job.state for job in root.jobs()] in ([], [JobState.CANCELLED]), run
                assert (root.inbox / "x.job.toml").read_text() == SIDECAR, run
                seen.add(len(root.jobs()))
    assert seen == {0, 1}


def test_a_folder_whose_row_was_lost_becomes_a_job_again(tmp_path: Path) -> None:
    """The store was set aside: what lies in processing/ is passed again under its id; what is unclear is named."""
    with Root(tmp_path) as root:
        root.drop("x.job.toml", SIDECAR)
        root.drop("x.jsonl", ROW)
        (job,) = root.wait_for(1)
    for path in tmp_path.glob("state/queue.sqlite3*"):
        path.unlink()
    (tmp_path / "inbox/processing/20260101-000000-0000").mkdir()
    odd = tmp_path / "inbox/processing/mine"
    odd.mkdir()
    (odd / "y.jsonl").write_text(ROW)
    with Root(tmp_path) as root:
        (again,) = root.wait_for(1)
        assert again.id == job.id
        assert again.recipe["lora"]["r"] == 3
        root.pump(lambda: any("mine" in item.name for item in root.intake.view().left_alone))
        assert (odd / "y.jsonl").exists()
        assert not (tmp_path / "inbox/processing/20260101-000000-0000").exists()
