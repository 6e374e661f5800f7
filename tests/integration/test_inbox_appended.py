"""A file that grows under its name in the inbox is one job, or is told as several; finished files are taken at once."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.inbox import candidates, layout
from daemon.job import JobState
from tests.support.inbox import ROW, Root, assert_sound

SETTLE = {"settle_seconds": 0.4}
PATIENT = {"settle_seconds": 30.0, "rescan_seconds": 30.0}


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    with Root(tmp_path, inbox=SETTLE) as opened:
        yield opened
        assert_sound(opened.settings, opened.store)


def append(path: Path, *, times: int, every: float, rows: int = 1) -> subprocess.Popen[bytes]:
    """`>>` from a shell, again and again."""
    row = "".join(f'{{"text": "row $n.{number}"}}\n' for number in range(rows)).replace('"', '\\"')
    script = f'n=0; while [ $n -lt {times} ]; do n=$((n+1)); printf "{row}" >> "$1"; sleep {every}; done'
    return subprocess.Popen(["sh", "-c", script, "append", str(path)])


@pytest.mark.parametrize("every", [0.2, 0.6], ids=["every_half_settle_time", "every_one_and_a_half"])
def test_a_row_at_a_time_becomes_one_job(root: Root, every: float) -> None:
    """Also where the pause is longer than settle_seconds: a file of one line, and one that paused, get more time."""
    writer = append(root.inbox / "a.jsonl", times=5, every=every)
    (job,) = root.wait_for(1, timeout=20)
    assert writer.wait(10) == 0
    assert job.dataset is not None
    assert job.dataset.rows == 5
    assert job.continues is None
    assert not root.intake.view().warnings


def test_what_is_written_after_the_claim_is_told_in_status_report_and_log(root: Root) -> None:
    """As several jobs, each of which names the one before it."""
    with (root.inbox / "a.jsonl").open("w") as writer:
        writer.write(ROW * 2)
    (first,) = root.wait_for(1)
    with (root.inbox / "a.jsonl").open("a") as writer:
        writer.write(ROW.replace("row", "third"))
    root.pump(lambda: any(first.id in item.reason for item in root.intake.view().waiting))
    first, second = root.wait_for(2)
    assert second.continues == first.id
    (warning,) = root.intake.view().warnings
    assert f"a.jsonl was written to after it had been taken, and came as 2 jobs ({first.id}, {second.id})" in warning
    assert [event["continues"] for event in root.log.events("file.came_back")] == [first.id]
    done = root.finish(second)
    folder = layout.final_dir(root.settings, done)
    assert f"continues job {first.id}" in (folder / "report.txt").read_text()
    assert json.loads((folder / "report.json").read_text())["continues"] == first.id


@pytest.mark.parametrize("how", ["copy", "rename_one_line", "link_one_line", "copy_one_line_with_its_time"])
def test_finished_files_are_taken_at_once(tmp_path: Path, how: str) -> None:
    """A copy of several rows at its close, anything that is renamed or linked in: long before settle_seconds.

    Also one line that was copied with its time, as `cp -p` does and nobody who appends.
    """
    with Root(tmp_path, inbox=PATIENT) as root:
        root.tick()
        if how == "copy":
            (root.inbox / "x.jsonl").write_text(ROW * 2)
        elif how == "rename_one_line":
            root.drop("x.jsonl")
        elif how == "copy_one_line_with_its_time":
            (tmp_path / "staged").write_text(ROW)
            os.utime(tmp_path / "staged", (1_700_000_000, 1_700_000_000))
            subprocess.run(["cp", "-p", tmp_path / "staged", root.inbox / "x.jsonl"], check=True)
        else:
            (tmp_path / "staged").write_text(ROW)
            os.link(tmp_path / "staged", root.inbox / "x.jsonl")
        root.wait_for(1, timeout=10)


def test_the_same_name_copied_again_later_is_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said of pieces, and it is taken at once."""
    with Root(tmp_path, inbox={**PATIENT, "settle_seconds": 0.001}) as root:
        root.tick()
        for number in (1, 2):
            (root.inbox / "x.jsonl").write_text(ROW.replace("row", f"row {number}") * 2)
            root.wait_for(number)
        assert [job.continues for job in root.jobs()] == [None, None]


# -- what a person has to help


def test_a_file_that_cannot_be_read_is_told_in_status_and_log_and_taken_when_it_can(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before files that only settle."""
    real = candidates.open_regular

    def refuse(path: str) -> int:
        if str(path).endswith("secret.jsonl"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(candidates, "open_regular", refuse)
    (root.inbox / "a.jsonl").write_text("")
    root.drop("secret.jsonl")
    root.pump(lambda: root.log.events("file.unreadable"))
    assert root.intake.view().waiting[0].name == "secret.jsonl"
    assert root.log.events("file.unreadable") == [
        {"file": "secret.jsonl", "reason": "cannot be read: Permission denied"}
    ]
    monkeypatch.setattr(candidates, "open_regular", real)
    root.wait_for(1)


@pytest.mark.parametrize("folder", layout.JOB_FOLDERS)
def test_what_is_put_into_the_folders_of_jobs_is_told(root: Root, folder: str) -> None:
    """Also what is no dataset, after those that are; the folders of jobs are not."""
    root.finish((root.drop("done.jsonl"), *root.wait_for(1))[1])
    for name in ("z.jsonl", "notes.txt"):
        (root.inbox / folder / name).write_text(ROW)
    root.pump(lambda: len(root.intake.view().left_alone) == 2)
    data, notes = root.intake.view().left_alone
    assert (data.name, notes.name) == (f"{folder}/z.jsonl", f"{folder}/notes.txt")
    assert "move it into the inbox itself" in data.reason
    assert {event["file"] for event in root.log.events("file.left_alone")} == {data.name, notes.name}
    for name in ("z.jsonl", "notes.txt"):
        (root.inbox / folder / name).unlink()
    root.pump(lambda: not root.intake.view().left_alone)


def test_an_unfinished_name_that_lies_for_long_is_told_until_it_changes(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Downloads and copies whose writer is gone; hidden files of other kinds are nobody's business."""
    monkeypatch.setattr(candidates, "UNFINISHED_SECONDS", 1.0)
    monkeypatch.setattr(candidates, "FULL_SCAN_SECONDS", 0.2)
    for name in ("x.jsonl.part", ".y.jsonl.Ab12", ".gitignore", "notes~", ".submit-1-2.part"):
        (root.inbox / name).write_text(ROW)
    assert not root.intake.view().left_alone
    root.pump(lambda: len(root.intake.view().left_alone) == 3)
    told = {item.name: item.reason for item in root.intake.view().left_alone}
    assert set(told) == {"x.jsonl.part", ".y.jsonl.Ab12", ".submit-1-2.part"}
    assert all("rename it" in reason for reason in told.values())
    (root.inbox / "x.jsonl.part").rename(root.inbox / "x.jsonl")
    root.wait_for(1, JobState.QUEUED)
    assert "x.jsonl.part" not in {item.name for item in root.intake.view().left_alone}
