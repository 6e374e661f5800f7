"""The way of one file, from the drop to done/ or failed/, with real files, a real store and real child processes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from daemon.cli import render
from daemon.cli.check import check_files
from daemon.inbox import archive, layout
from daemon.job import JobState, Outcome, Priority, RunResult
from daemon.observability.status import FinishedJob, finished_job
from tests.support.inbox import ROW, Root, assert_sound


@pytest.fixture
def root(tmp_path: Path):
    with Root(tmp_path) as opened:
        yield opened
        assert_sound(opened.settings, opened.store)


def test_a_good_file_is_claimed_checked_and_queued_with_its_recipe_frozen(root: Root) -> None:
    """The job knows rows, bytes, digest and format; the file lies in processing/; nothing is left in the inbox."""
    dropped = root.drop("x.jsonl", ROW * 3)
    inode = dropped.stat().st_ino
    (job,) = root.wait_for(1)
    assert (job.dataset.rows, job.dataset.format, job.dataset.size_bytes) == (3, "text", 3 * len(ROW))
    assert job.recipe == root.settings.recipe.model_dump(mode="json")
    assert layout.locate(root.settings, job) == root.inbox / "processing" / job.id / "x.jsonl"
    assert job.source_inode == inode
    assert not dropped.exists()


def test_a_bad_file_goes_to_failed_with_a_report_that_names_line_column_and_reason(root: Root) -> None:
    """One bad line refuses the file; the rest of the story is in report.txt and report.json beside it."""
    root.drop("bad.jsonl", ROW * 2 + '{"text": NaN}\n' + ROW)
    (job,) = root.wait_for(1, JobState.REJECTED)
    folder = root.inbox / "failed" / job.id
    assert (folder / "bad.jsonl").is_file()
    report = json.loads((folder / "report.json").read_text())
    assert report["rows"]["problems"][0]["line"] == 3
    assert report["rows"]["problems"][0]["column"] == 10
    text = (folder / "report.txt").read_text()
    assert "line 3, column 10: NaN" in text
    assert f"dropforge retry {job.id}" in text


def test_what_is_not_used_and_what_is_warned_of_travels_with_the_job(root: Root) -> None:
    """From the pass through the store into the reports of a file that was trained."""
    answer = '{"messages": [{"role": "assistant", "content": "%s"}], "id": 7}\n'
    root.drop("x.jsonl", answer % "a" + answer % " " + "\n" + answer % "b")
    (job,) = root.wait_for(1)
    assert job.dataset.unused_keys == {"id": 3}
    root.finish(job)
    folder = root.inbox / "done" / job.id
    report = json.loads((folder / "report.json").read_text())["dataset"]
    assert report["unused_keys"] == {"id": 3}
    assert [(warning["code"], warning["lines"]) for warning in report["warnings"]] == [("empty_answer", [2])]
    text = (folder / "report.txt").read_text()
    assert "not used  id (3 rows)" in text
    assert "1 blank line was skipped" in text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"messages": [{"role": "user", "content": "q"}]}', "nothing would be learned"),
        ('{"prompt": "q", "completion": "a", "label": false}', '"label"'),
        ('{"prompt": "q", "chosen": "a", "rejected": "b"}', "preference data"),
    ],
)
def test_a_file_that_would_be_trained_into_something_else_is_refused(root: Root, row: str, reason: str) -> None:
    """Why, and what to do, is the same sentence in `check`, the reports, `show`, `jobs` and the status."""
    path = root.drop("x.jsonl", f"{row}\n" * 2)
    root.wait_for(1, JobState.REJECTED)
    (job,) = root.jobs()
    folder = root.inbox / "failed" / job.id
    (checked,) = check_files([folder / "x.jsonl"], root.settings, None)
    assert reason in job.reason
    assert job.hint
    assert (checked.reason, checked.hint) == (job.reason, job.hint)
    report = json.loads((folder / "report.json").read_text())
    entry = finished_job(job)
    assert (report["reason"], report["hint"]) == (entry["reason"], entry["hint"]) == (job.reason, job.hint)
    shown = Console(width=1000, record=True, file=io.StringIO())
    told = [(folder / "report.txt").read_text()]
    for view in (render.job(job, [], root.settings), render.job_list([job]), render.status_view(snapshot_of(entry))):
        shown.print(view)
        told.append(shown.export_text())
    assert path.name in told[-1]
    assert all(job.reason in text and job.hint in text for text in told)


def snapshot_of(entry: FinishedJob) -> dict[str, Any]:
    """What `read_status` makes of a status file with this job."""
    return {"status": "idle", "liveness": "stopped", "timestamp": "2026-01-01T00:00:00.000Z", "recent": [entry]}


def test_equal_names_are_two_jobs_and_neither_file_is_overwritten(root: Root) -> None:
    """The second drop of a name never meets the first one's file."""
    root.drop("x.jsonl", ROW)
    root.wait_for(1)
    root.drop("x.jsonl", ROW * 2)
    first, second = root.wait_for(2)
    assert [layout.locate(root.settings, job).read_text() for job in (first, second)] == [ROW, ROW * 2]


def test_trained_content_is_a_duplicate_and_goes_to_done_with_a_note(root: Root) -> None:
    """Under whatever name it comes again."""
    root.drop("x.jsonl", ROW * 2)
    (first,) = root.wait_for(1)
    root.finish(first, version="0001")
    root.drop("y.jsonl", ROW * 2)
    (job,) = root.wait_for(1, JobState.CANCELLED)
    assert job.reason == f"duplicate of job {first.id}, version 0001"
    assert job.duplicate_of == first.id
    assert "duplicate of job" in (root.inbox / "done" / job.id / "report.txt").read_text()


PAIRS = '{"prompt": "Q", "completion": "A"}\n' * 2


@pytest.mark.parametrize(
    ("content", "sidecar", "told"),
    [
        (PAIRS, '[data]\nprompt_completion = "chat"\n', 'prompt_completion = "as_is", now "chat"'),
        (PAIRS, '[data]\ntrain_on = "all"\n', 'train_on = "assistant", now "all"'),
        (
            '{"text": "a", "b": "b"}\n',
            '[data.columns]\ntext = "b"\n',
            'columns = {}, now {"text": "b"}; format = "text", now "columns"',
        ),
    ],
)
def test_a_file_of_which_other_words_would_be_learned_is_no_duplicate(
    root: Root, content: str, sidecar: str, told: str
) -> None:
    """The settings of the data decide them; that it was trained before, and how, is told."""
    root.drop("x.jsonl", content)
    (first,) = root.wait_for(1)
    root.finish(first, version="0001")
    (root.inbox / "y.job.toml").write_text(sidecar)
    root.drop("y.jsonl", content)
    (job,) = root.wait_for(1)
    assert job.dataset is not None
    assert job.dataset.notes[-1] == f"job {first.id} trained the same file as version 0001, with other settings: {told}"
    root.finish(job, version="0002")
    assert told in (root.inbox / "done" / job.id / "report.txt").read_text()
    root.drop("z.jsonl", content)  # as the first one
    (again,) = root.wait_for(1, JobState.CANCELLED)
    assert again.duplicate_of == first.id


@pytest.mark.parametrize(
    ("content", "sidecar"),
    [
        ('{"messages": [{"role": "assistant", "content": "A"}]}\n', '[data]\nprompt_completion = "chat"\ntrain_on = "assistant"'),
        (PAIRS, '[data]\nmax_length = 64\non_bad_rows = "skip"\n[training]\nlearning_rate = 1e-5\n'),
    ],
)  # fmt: skip
def test_settings_that_leave_the_learned_words_as_they_were_make_no_new_data(
    root: Root, content: str, sidecar: str
) -> None:
    """Nor do those of the training: who wants it again says `force`."""
    root.drop("x.jsonl", content)
    (first,) = root.wait_for(1)
    root.finish(first)
    (root.inbox / "y.job.toml").write_text(sidecar)
    root.drop("y.jsonl", content)
    (job,) = root.wait_for(1, JobState.CANCELLED)
    assert job.duplicate_of == first.id


def test_rows_that_were_cut_are_new_under_another_max_length(root: Root) -> None:
    """What was cut off then would be learned now."""
    root.drop("x.jsonl", PAIRS)
    (first,) = root.wait_for(1)
    root.finish(first, result=RunResult(outcome=Outcome.SUCCEEDED, truncated_rows=1))
    (root.inbox / "y.job.toml").write_text("[data]\nmax_length = 4096\n")
    root.drop("y.jsonl", PAIRS)
    (job,) = root.wait_for(1)
    assert job.dataset is not None
    assert "max_length = 2048, now 4096" in job.dataset.notes[-1]


def test_a_forced_duplicate_is_queued(root: Root) -> None:
    """`force = true` in its sidecar."""
    root.drop("x.jsonl", ROW)
    (first,) = root.wait_for(1)
    root.finish(first)
    (root.inbox / "x.job.toml").write_text("force = true\n")
    root.drop("x.jsonl", ROW)
    (job,) = root.wait_for(1)
    assert job.force
    assert (root.inbox / "processing" / job.id / "x.job.toml").is_file()


def test_the_priority_folders_set_the_order(root: Root) -> None:
    """high/ before the inbox itself before low/."""
    for folder in ("low", "", "high"):
        root.drop(f"{folder or 'normal'}.jsonl", ROW * (1 + len(folder)), folder=folder)
    root.wait_for(3)
    assert [job.priority for job in root.store.queue()] == [Priority.HIGH, Priority.NORMAL, Priority.LOW]


def test_on_success_delete_removes_the_trained_file_and_keeps_its_report(tmp_path: Path) -> None:
    """Only a success deletes: a failure under the same setting keeps its file."""
    with Root(tmp_path, inbox={"on_success": "delete"}) as root:
        root.drop("x.jsonl", ROW)
        root.drop("y.jsonl", ROW * 2)
        first, second = root.wait_for(2)
        root.finish(first)
        root.finish(second, JobState.FAILED)
        assert not (root.inbox / "done" / first.id / first.name).exists()
        assert "deleted after training" in (root.inbox / "done" / first.id / "report.txt").read_text()
        assert layout.locate(root.settings, second) == root.inbox / "failed" / second.id / second.name


def test_a_file_returned_for_retry_lies_in_processing_again_and_settles_again(root: Root) -> None:
    """`reopen_files` and `archive_files` are inverse, and each can be repeated."""
    root.drop("x.jsonl", ROW)
    (job,) = root.wait_for(1)
    failed = root.finish(job, JobState.FAILED)
    for _ in range(2):
        path = archive.reopen_files(root.settings, failed)
    assert path == root.inbox / "processing" / job.id / "x.jsonl"
    assert path.read_text() == ROW
    for _ in range(2):
        archive.archive_files(root.settings, failed)
    assert layout.locate(root.settings, failed) == root.inbox / "failed" / job.id / "x.jsonl"
