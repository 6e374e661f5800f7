"""The seal: durable before it is written, of one form, and read without leaving anything open."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import guard
from guard import CheckpointState
from guard.seal import list_tree, load_key, read_seal, render_seal
from tests.unit.guard.conftest import make_checkpoint, make_fingerprint


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A whole checkpoint with nested folders, not sealed yet."""
    path = make_checkpoint(tmp_path / "checkpoint-10", 10)
    (path / "deep" / "er").mkdir(parents=True)
    (path / "deep" / "er" / "file").write_bytes(b"x")
    return path


def seal(path: Path, key: bytes | None = None) -> None:
    guard.seal_checkpoint(path, step=10, fingerprint=make_fingerprint(), key=key)


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_everything_is_durable_before_the_seal_is_there_leaves_first(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synced = os.fsync, []

    def fsync(fd: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{fd}")), (path / "seal.json").exists()))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    content = set(path.rglob("*"))
    seal(path)
    before = [item for item, is_sealed in synced if not is_sealed]
    assert content <= set(before)
    assert (
        before.index(path / "deep" / "er" / "file") < before.index(path / "deep" / "er") < before.index(path / "deep")
    )
    assert synced[-1] == (path, True)


@pytest.mark.parametrize("name", ["optimizer.pt", "deep/er"])
def test_what_the_disk_does_not_take_is_not_sealed(path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}") == str(path / name):
            raise OSError(5, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(guard.StorageError, match="input/output error"):
        seal(path)
    assert not (path / "seal.json").exists()


def test_a_seal_of_another_form_or_without_a_part_is_no_seal(path: Path) -> None:
    seal(path)
    document = json.loads((path / "seal.json").read_text())
    assert document["schema_version"] == 1
    assert document["folders"] == ["deep", "deep/er"]
    for changes in ({"schema_version": 2}, {"step": None}, {"files": []}, {"fingerprint": []}, {"folders": 3}):
        (path / "seal.json").write_text(json.dumps({**document, **changes}))
        found = guard.verify_checkpoint(path)
        assert (found.state, found.reason) == (CheckpointState.ALTERED, "seal.json cannot be read as a seal"), changes


def test_a_seal_spelt_otherwise_is_told(path: Path) -> None:
    seal(path)
    document = json.loads((path / "seal.json").read_text())
    (path / "seal.json").write_text(json.dumps(document))
    assert guard.verify_checkpoint(path).reason == "seal.json is spelt otherwise than the guard spells it"
    (path / "seal.json").write_text(json.dumps({**document, "seal": "0" * 64}))
    assert guard.verify_checkpoint(path).reason == "seal.json does not verify"


def test_a_seal_larger_than_any_is_not_read(path: Path) -> None:
    with (path / "seal.json").open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    assert guard.verify_checkpoint(path).reason == "seal.json is not a file of a seal's size"


def test_what_is_read_back_is_what_was_written(path: Path) -> None:
    for key in (None, b"k" * 32):
        seal(path, key)
        found = read_seal(path, key=key)
        assert render_seal(found, key) == (path / "seal.json").read_bytes()
        tree = list_tree(path)
        assert found.size_bytes == tree.size_bytes - (path / "seal.json").stat().st_size
        assert (found.step, found.folders, tree.folders) == (10, ("deep", "deep/er"), ("deep", "deep/er"))


def test_a_link_to_a_folder_is_not_sealed_in(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-10", 10)
    (tmp_path / "checkpoint-11").symlink_to(folder)
    with pytest.raises(guard.NotFound, match="no such folder"):
        guard.seal_checkpoint(tmp_path / "checkpoint-11", step=10, fingerprint=make_fingerprint())
    assert not (folder / "seal.json").exists()


def test_nothing_stays_open_whatever_is_found(path: Path, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_bytes(b"k" * 32)
    key_file.chmod(0o600)
    seal(path)
    before = descriptors()
    read_seal(path)
    load_key(key_file)
    with pytest.raises(guard.UsageError, match="it is not a regular file"):
        load_key(tmp_path)
    (path / "seal.json").unlink()
    (path / "seal.json").mkdir()
    with pytest.raises(guard.SealBroken):
        read_seal(path)
    assert descriptors() == before


@pytest.mark.parametrize(("size", "accepted"), [(15, False), (16, True), (4096, True), (4097, False)])
def test_a_key_has_16_to_4096_bytes_its_newline_not_counted(tmp_path: Path, size: int, accepted: bool) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"k" * size + b"\n")
    path.chmod(0o600)
    if accepted:
        assert load_key(path) == b"k" * size
        return
    with pytest.raises(guard.UsageError, match=f"holds {size} bytes; a key has 16 to 4096"):
        load_key(path)
