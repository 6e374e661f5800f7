"""Only regular files are taken; names of any bytes survive; what is left alone is said once and touched never."""

from __future__ import annotations

import gzip
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.inbox import layout
from daemon.job import JobState
from tests.support.inbox import ROW, Root, assert_sound


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    with Root(tmp_path) as opened:
        yield opened
        assert_sound(opened.settings, opened.store)


def make(kind: str, path: Path) -> None:
    if kind == "a symbolic link":
        target = path.parent.parent / "target.jsonl"
        target.write_text(ROW)
        path.symlink_to(target)
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
        (path / "inner.jsonl").write_text(ROW)
    elif kind == "a socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif os.geteuid() == 0:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
    else:
        pytest.skip("only root makes devices")


@pytest.mark.parametrize("kind", ["a symbolic link", "a FIFO", "a directory", "a socket", "a character device"])
def test_what_is_not_a_regular_file_is_refused_where_it_lies(root: Root, kind: str) -> None:
    """Never opened, never moved; shown with its reason, told once, and no job comes of it."""
    make(kind, root.inbox / "x.jsonl")
    root.pump(lambda: root.log.events("file.left_alone"))
    for _ in range(5):
        root.tick()
    view = root.intake.view()
    assert [(item.name, item.reason) for item in view.left_alone] == [
        ("x.jsonl", f"refused: it is {kind}, only regular files are trained")
    ]
    assert not view.warnings  # each name is told once
    assert not view.waiting
    assert len(root.log.events("file.left_alone")) == 1
    assert os.path.lexists(root.inbox / "x.jsonl")
    assert not root.jobs()


def test_a_regular_file_that_takes_the_place_of_a_refused_one_is_taken(root: Root) -> None:
    """Refusal is of the thing, not of the name."""
    (root.inbox / "x.jsonl").symlink_to("nowhere")
    root.pump(lambda: root.intake.view().left_alone)
    root.drop("x.jsonl")
    root.wait_for(1)
    root.pump(lambda: not root.intake.view().left_alone)


def test_other_folders_and_other_files_are_left_alone_and_reported_once(root: Root) -> None:
    """Their contents are not looked at."""
    (root.inbox / "archive").mkdir()
    (root.inbox / "archive" / "x.jsonl").write_text(ROW)
    (root.inbox / "notes.txt").write_text("hello")
    root.pump(lambda: len(root.log.events("file.left_alone")) == 2)
    for _ in range(5):
        root.tick()
    assert {item.name: item.reason for item in root.intake.view().left_alone} == {
        "archive": "left alone: it is a directory",
        "notes.txt": "not a .jsonl or .ndjson file",
    }
    assert len(root.log.events("file.left_alone")) == 2
    assert (root.inbox / "archive" / "x.jsonl").exists()


NAMES = [
    b"\xff\xfe not utf-8.jsonl",
    b"new\nline.jsonl",
    b"\x1b[31mred\x07.jsonl",
    "\u202egnp.jsonl".encode(),
    b"-rf $(touch pwned) ;'\".jsonl",
    b" leading and trailing .jsonl",
    b"n" * 249 + b".jsonl",
    "\U0001f600.JSONL".encode(),
    b"%s{0}[red].jsonl",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_any_bytes_survives_and_is_escaped_where_people_read_it(root: Root, name: bytes) -> None:
    """From the drop to done/; in the store as it is, in logs, status and reports without a byte that acts."""
    path = root.drop(os.fsdecode(name))
    assert os.fsencode(path.name) == name
    (job,) = root.wait_for(1)
    assert os.fsencode(job.name) == name
    assert os.fsencode(root.store.get(job.id).name) == name
    done = root.finish(job)
    found = layout.locate(root.settings, done)
    assert os.fsencode(found.name) == name
    assert found.read_text() == ROW
    for _, _, data in root.log.lines:
        assert str(data.get("file", "")).isprintable()
    report = (found.parent / "report.txt").read_text(encoding="utf-8")
    assert all(line.isprintable() for line in report.splitlines())
    assert root.inbox.joinpath("pwned").exists() is False


def test_names_of_255_bytes_do_not_collide_in_any_folder(root: Root) -> None:
    """Twice the longest name there is: two jobs, two files, through done/ and failed/."""
    name = "n" * 249 + ".jsonl"
    root.drop(name, ROW)
    root.wait_for(1)
    root.drop(name, ROW * 2)
    first, second = root.wait_for(2)
    for state in (JobState.SUCCEEDED, JobState.FAILED):
        job = first if state is JobState.SUCCEEDED else second
        assert layout.locate(root.settings, root.finish(job, state)).name == name


def test_a_waiting_name_is_escaped_in_the_view(root: Root) -> None:
    """Status is read on terminals."""
    name = os.fsdecode(b"\x1b]0;x\xff.jsonl")
    with (root.inbox / name).open("w") as writer:
        writer.write("{")
        writer.flush()
        root.pump(lambda: root.intake.view().waiting)
        assert root.intake.view().waiting[0].name == "\\x1b]0;x\\xff.jsonl"
    (root.inbox / name).unlink()
    root.pump(lambda: not root.intake.view().waiting)


def test_a_file_that_is_removed_while_it_settles_is_forgotten(root: Root) -> None:
    """No job, no trace, no error."""
    with (root.inbox / "x.jsonl").open("w") as writer:
        writer.write("{")
        writer.flush()
        root.pump(lambda: root.intake.view().waiting)
    (root.inbox / "x.jsonl").unlink()
    root.pump(lambda: not root.intake.view().waiting)
    assert not root.jobs()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x.json", "`dropforge submit FILE` converts"),
        ("X.CSV", "`dropforge submit FILE` converts"),
        ("x.tsv.gz", "`dropforge submit FILE` converts"),
        ("x.parquet", "`dropforge submit FILE` converts"),
        ("x.jsonl (1)", "rename it so that it ends in .jsonl"),
        ("x.jsonl.1", "rename it so that it ends in .jsonl"),
        ("x.jsonl.txt", "rename it so that it ends in .jsonl"),
        ("x.jsonlines", "rename it so that it ends in .jsonl"),
        ("x.jsonl.bz2", "use gzip or zstd"),
        ("x.tar.gz", "unpack it"),
        ("x.xlsx", "save it as CSV"),
    ],
)
def test_a_dataset_under_another_name_is_told_what_to_do_before_anything_else(
    root: Root, name: str, reason: str
) -> None:
    """By its name alone; it lies where it was dropped, and what is no dataset comes after it."""
    for number in range(20):
        (root.inbox / f"Thumbs-{number}.db").touch()
    (root.inbox / name).write_bytes(b"")
    root.pump(lambda: len(root.intake.view().left_alone) == 21)
    first, *others = root.intake.view().left_alone
    assert first.name == name
    assert reason in first.reason
    assert {item.reason for item in others} == {"not a .jsonl or .ndjson file"}
    assert (root.inbox / name).exists()


@pytest.mark.parametrize("name", ["x.ndjson", "X.NDJSON", "x.ndjson.gz", "X.JSONL", "x (1).jsonl"])
def test_json_lines_are_taken_under_all_their_names(root: Root, name: str) -> None:
    """With the sidecar of their stem, and at once when they are renamed in plain."""
    content = ROW.encode()
    root.drop(f"{name.partition('.')[0]}.job.toml", "[training]\nlearning_rate = 1e-5\n")
    root.drop(name, gzip.compress(content) if name.endswith(".gz") else content)
    (job,) = root.wait_for(1)
    assert job.name == name
    assert job.overrides == {"training": {"learning_rate": 1e-5}}
