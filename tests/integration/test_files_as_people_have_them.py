"""Files as people have them, through the real daemon: each is told once, in words, with what to do."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Callable

import pytest

from daemon.job import JobState
from tests.support.root import Root, wait_until

MakeRoot = Callable[..., Root]
ROW = '{"text": "a row"}\n'


@pytest.fixture
def root(make_root: MakeRoot) -> Root:
    made = make_root(behaviour={})
    made.start()
    return made


@pytest.mark.parametrize(
    ("name", "content", "what", "hint"),
    [
        ("array.jsonl", b'[{"text": "a"},\n{"text": "b"}]\n', "it is one JSON array", "jq -c '.[]'"),
        ("utf16.jsonl", ROW.encode("utf-16"), "it is UTF-16 text", "iconv -f UTF-16"),
        ("packed.jsonl", gzip.compress(ROW.encode()), "it is gzip data", "ends in .jsonl.gz"),
        ("cut.jsonl.gz", gzip.compress(ROW.encode() * 99)[:-9], "the gzip data is cut short", "copy it again"),
        ("page.ndjson", b"<!DOCTYPE html><html></html>", "it is an HTML page", "download the file again"),
    ],
    ids=["array", "utf16", "gzip", "cut", "page"],
)
def test_another_kind_of_file_goes_to_failed_with_a_report_that_says_what_it_is(
    root: Root, name: str, content: bytes, what: str, hint: str
) -> None:
    """One sentence and what to do; the same as the job's reason."""
    root.drop(name, content)
    job = root.finished(name)
    assert job.state is JobState.REJECTED
    assert what in job.reason
    report = (root.settings.inbox_dir / "failed" / job.id / "report.txt").read_text()
    assert what in report
    assert hint in report
    assert "Expecting" not in report


def test_status_shows_each_name_once_and_datasets_first(root: Root) -> None:
    """A link among the things that every file manager leaves."""
    inbox = root.settings.inbox_dir
    for number in range(20):
        (inbox / f"Thumbs-{number}.db").touch()
    (inbox / "table.csv").write_text("text\na\n")
    (inbox / "link.jsonl").symlink_to(inbox / "table.csv")
    wait_until(lambda: len((root.status() or {})["left_alone"]) == 22, what="all of them in status")
    shown = root.run("status").stdout
    assert (shown.count("link.jsonl"), shown.count("table.csv"), shown.count("Thumbs-0.db")) == (1, 1, 1)
    assert max(shown.index("link.jsonl"), shown.index("table.csv")) < shown.index("Thumbs-0.db")
    assert "dropforge submit" in " ".join(shown.split())
    assert not (root.status() or {})["warnings"]


def test_rows_appended_one_at_a_time_are_trained_as_one_file(make_root: MakeRoot) -> None:
    """`>>` once a while, with pauses longer than settle_seconds."""
    root = make_root(behaviour={}, tables={"inbox": {"settle_seconds": 0.5}})
    root.start()
    script = 'for n in 1 2 3 4 5; do echo \'{"text": "row \'$n\'"}\' >> "$1"; sleep 0.7; done'
    subprocess.run(["sh", "-c", script, "append", str(root.settings.inbox_dir / "a.jsonl")], check=True)
    job = root.finished("a.jsonl")
    assert job.dataset is not None
    assert job.dataset.rows == 5
    assert [other.name for other in root.jobs()] == ["a.jsonl"]


def test_a_dataset_in_the_folder_of_finished_jobs_is_told_by_status_log_and_doctor(root: Root) -> None:
    """Where it would lie for ever."""
    (root.settings.inbox_dir / "done" / "lost.jsonl").write_text(ROW)
    wait_until(lambda: (root.status() or {})["left_alone"], what="it in status")
    assert "done/lost.jsonl" in root.run("status").stdout
    assert [event["file"] for event in root.events("file.left_alone")] == ["done/lost.jsonl"]
    found = json.loads(root.run("doctor", "--json").stdout)["findings"]
    assert any("done/lost.jsonl" in finding["told"] for finding in found)
