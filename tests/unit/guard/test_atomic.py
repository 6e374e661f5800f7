"""Durable writes: whole or absent, in the right order, and never over something that was not meant."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import guard
from guard.atomic import apply_umask, make_folder_durable


def test_a_file_is_replaced_whole_with_the_mode_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    guard.write_atomic(path, "old")
    guard.write_atomic(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_the_umasks_mode_is_given_to_files_and_never_taken_from_them(tmp_path: Path) -> None:
    """A tool that creates its files as 0600 shuts the group out whatever the umask says; links lead elsewhere."""
    outside = tmp_path / "outside"
    outside.touch(mode=0o600)
    (tmp_path / "tree" / "below").mkdir(parents=True)
    (tmp_path / "tree" / "link").symlink_to(outside)
    for name, mode in (("private", 0o600), ("below/run", 0o755), ("open", 0o666)):
        (tmp_path / "tree" / name).touch()
        (tmp_path / "tree" / name).chmod(mode)
    before = os.umask(0o027)
    try:
        apply_umask(tmp_path / "tree")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / "tree" / name).stat().st_mode) for name in ("private", "below/run", "open")}
    assert modes == {"private": 0o640, "below/run": 0o755, "open": 0o666}
    assert stat.S_IMODE(outside.stat().st_mode) == 0o600


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        guard.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127 + "x")
    guard.write_atomic(path, "data")
    assert path.read_text() == "data"


def test_a_leftover_of_a_dead_process_with_our_number_is_not_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guard import atomic

    monkeypatch.setattr(atomic, "_temp_numbers", iter(range(100)))
    (tmp_path / f".file.{os.getpid()}-0.tmp").write_text("torn")
    guard.write_atomic(tmp_path / "file", "data")
    assert (tmp_path / "file").read_text() == "data"


def test_data_is_synced_before_the_name_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        real_fsync(fd)

    def replace(*args: Any) -> None:
        order.append("rename")
        real_replace(*args)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    guard.write_atomic(tmp_path / "file", "data")
    assert order == ["file", "rename", "folder"]


def test_a_folder_is_made_with_its_name_durable_and_left_alone_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())))
    make_folder_durable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert synced == [str(tmp_path), str(tmp_path / "a")]
    make_folder_durable(tmp_path / "a" / "b")
    assert len(synced) == 2
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_folder_durable(tmp_path / "file")


def test_a_tree_is_synced_from_the_leaves_up_and_symlinks_are_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    (tmp_path / "tree" / "file").write_text("x")
    (tmp_path / "tree" / "inner" / "file").write_text("x")
    (tmp_path / "outside").write_text("x")
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "tree" / "folder-link").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "tree" / "pipe")
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())))
    guard.fsync_tree(tmp_path / "tree")
    tree = str(tmp_path / "tree")
    assert synced == [f"{tree}/inner/file", f"{tree}/inner", f"{tree}/file", tree]


def test_a_rename_never_takes_another_s_place_unless_told_to(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    (tmp_path / "dangling").symlink_to("nothing")
    for target in ("b", "dangling"):
        with pytest.raises(FileExistsError):
            guard.rename_durable(tmp_path / "a", tmp_path / target)
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileExistsError):  # rename(2) alone would replace an empty folder
        guard.rename_durable(tmp_path / "folder", tmp_path / "empty")
    guard.rename_durable(tmp_path / "a", tmp_path / "b", replace=True)
    assert (tmp_path / "b").read_text() == "a"


@settings(deadline=None, max_examples=100)
@given(torn=st.binary(max_size=40), count=st.integers(0, 3))
def test_after_any_torn_ending_every_line_parses_and_no_byte_is_lost(
    tmp_path_factory: pytest.TempPathFactory, torn: bytes, count: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "log.jsonl"
    whole = b"".join(b'{"n": %d}\n' % n for n in range(count))
    torn = torn.replace(b"\n", b"")
    path.write_bytes(whole + torn)
    guard.append_line_durable(path, '{"n": 99}')
    lines = path.read_bytes().splitlines()
    values = [json.loads(line) for line in lines]
    assert values[-1] == {"n": 99}
    assert path.read_bytes().startswith(whole)
    aside = path.with_name("log.jsonl.torn")
    kept = aside.read_bytes() if aside.exists() else path.read_bytes()
    assert torn in kept


def test_a_last_line_longer_than_one_block_is_repaired_too(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"n": 1}\n{"text": "' + b"x" * 200_000)
    guard.append_line_durable(path, '{"n": 2}')
    assert path.read_bytes() == b'{"n": 1}\n{"n": 2}\n'
    assert (tmp_path / "log.jsonl.torn").stat().st_size == 200_011
    with pytest.raises(ValueError, match="newline"):
        guard.append_line_durable(path, "a\nb")
