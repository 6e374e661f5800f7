"""The metadata: whatever stands in its place is told apart, and nothing that cannot be read is overwritten."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import guard
from guard import MetadataKind
from guard.metadata import RunMetadata, load_raw_metadata, parse_metadata
from tests.unit.guard.conftest import as_user, make_checkpoint, make_fingerprint

NAME = ".dataset_metadata.json"
OLD_FORM = {
    "dataset_name": "rows.jsonl",
    "dataset_hash": "0" * 32,
    "dataset_path": "/data/rows.jsonl",
    "lora_config": {"r": 8, "alpha": 16, "dropout": 0.0},
}


def make_metadata() -> RunMetadata:
    return RunMetadata(
        dataset_name="rows.jsonl",
        dataset_hash="0" * 32,
        dataset_path="/data/rows.jsonl",
        lora_config={"r": 8},
        fingerprint=make_fingerprint(),
    )


def put(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def put_json(**changes: object) -> Callable[[Path], None]:
    current = {**make_metadata().to_json(), **changes}
    return put(json.dumps({name: value for name, value in current.items() if value != "absent"}).encode())


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(100_000_000)


UNREADABLE: dict[str, Callable[[Path], None]] = {
    "empty": put(b""),
    "white space": put(b" \n"),
    "{}": put(b"{}"),
    "[]": put(b"[]"),
    "null": put(b"null"),
    "a string": put(b'"rows.jsonl"'),
    "cut short": put(json.dumps(make_metadata().to_json()).encode()[:-9]),
    "not UTF-8": put(b'{"dataset_name": "\xff"}'),
    "UTF-16": put(json.dumps(OLD_FORM).encode("utf-16")),
    "BOM": put(b"\xef\xbb\xbf" + json.dumps(OLD_FORM).encode()),
    "zeros": put(bytes(4096)),
    "nested": put(b"[" * 200_000),
    "a huge number": put(b'{"schema_version": ' + b"9" * 10_000 + b"}"),
    "100 MB": sparse,
    "a directory": lambda path: path.mkdir(),
    "a symlink": lambda path: path.symlink_to("elsewhere.json"),
    "a pipe": os.mkfifo,
    "version 0": put_json(schema_version=0),
    "version true": put_json(schema_version=True),
    "version '2'": put_json(schema_version="2"),
    "no components": put_json(components="absent"),
    "components []": put_json(components=[]),
    "components NaN": put(json.dumps({**OLD_FORM, "schema_version": 2, "components": {"a": float("nan")}}).encode()),
    "no dataset": put_json(dataset_name="absent"),
    "a hash that is a number": put_json(dataset_hash=5),
    "lora_config []": put_json(lora_config=[]),
    "finished 3": put_json(finished=3),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_stale_and_set_aside_whole(tmp_path: Path, dataset: Path, name: str) -> None:
    folder = tmp_path / "model"
    make_checkpoint(folder / "checkpoint-10", 10)
    UNREADABLE[name](folder / NAME)
    before = (folder / NAME).lstat()

    reading = guard.read_metadata(folder)
    assert reading.kind is MetadataKind.UNREADABLE
    assert reading.reason.startswith("it")
    assert {"BOM": "byte order mark", "100 MB": "100,000,000 bytes"}.get(name, "") in reading.reason
    with guard.ModelLock(folder, owner="test"):
        prepared = guard.prepare_run(folder, fingerprint=make_fingerprint(), dataset_path=dataset, lora_config={"r": 8})
    assert prepared.verdict.kind is guard.VerdictKind.STALE
    assert reading.reason in prepared.verdict.reasons[0]
    (aside,) = folder.glob(NAME + ".unreadable-*")
    after = aside.lstat()
    assert (after.st_ino, after.st_size, after.st_mode) == (before.st_ino, before.st_size, before.st_mode)
    assert guard.read_metadata(folder).kind is MetadataKind.CURRENT


def test_a_directory_without_metadata_is_missing_one(tmp_path: Path) -> None:
    assert guard.read_metadata(tmp_path).kind is MetadataKind.MISSING
    assert guard.read_metadata(tmp_path / "nothing").kind is MetadataKind.MISSING


def test_metadata_that_may_not_be_read_is_unreadable_not_missing(open_tmp_path: Path) -> None:
    path = open_tmp_path / NAME
    path.write_text(json.dumps(OLD_FORM))
    path.chmod(0o000)
    reading = as_user(65_534, lambda: guard.read_metadata(open_tmp_path)) if os.geteuid() == 0 else None
    reading = reading or guard.read_metadata(open_tmp_path)
    assert reading.kind is MetadataKind.UNREADABLE
    assert "permission denied" in reading.reason


@pytest.mark.parametrize("keep", [{}, {"dataset_path"}, {"lora_config"}])
def test_the_old_form_is_recognised_and_never_resumed_from(tmp_path: Path, dataset: Path, keep: set[str]) -> None:
    """It says nothing about the content; also when one of its lesser keys is missing."""
    folder = tmp_path / "model"
    make_checkpoint(folder / "checkpoint-10", 10)
    (folder / NAME).write_text(json.dumps({k: v for k, v in OLD_FORM.items() if k not in keep}))
    reading = guard.read_metadata(folder)
    assert reading.kind is MetadataKind.LEGACY
    assert reading.run is not None
    assert reading.run.dataset_hash == "0" * 32
    verdict = guard.assess(folder, fingerprint=make_fingerprint())
    assert verdict.kind is guard.VerdictKind.STALE
    assert "old form" in verdict.reasons[0]


@pytest.mark.parametrize("version", [3, 99, 10**30])
def test_a_later_form_is_refused_everywhere_and_left_as_it_is(tmp_path: Path, dataset: Path, version: int) -> None:
    folder = tmp_path / "model"
    make_checkpoint(folder / "checkpoint-10", 10)
    text = json.dumps({"schema_version": version, "what": "we cannot know"})
    (folder / NAME).write_text(text)
    assert guard.read_metadata(folder).kind is MetadataKind.NEWER
    with guard.ModelLock(folder, owner="test"):
        for attempt in (
            lambda: guard.prepare_run(folder, fingerprint=make_fingerprint(), dataset_path=dataset, lora_config={}),
            lambda: guard.write_metadata(folder, make_metadata()),
            lambda: guard.mark_finished(folder, "0001"),
            lambda: guard.plan_clear(folder),
            lambda: guard.assess(folder, fingerprint=make_fingerprint()),
        ):
            with pytest.raises(guard.MetadataTooNew, match=f"schema_version is {version}"):
                attempt()
    assert (folder / NAME).read_text() == text
    assert (folder / "checkpoint-10").is_dir()
    assert not (folder / ".cleared").exists()


def test_metadata_reads_back_as_it_was_written(tmp_path: Path) -> None:
    guard.write_metadata(tmp_path, make_metadata())
    assert guard.read_metadata(tmp_path).run == make_metadata()
    written = json.loads((tmp_path / NAME).read_text())
    # The four keys of the old form keep their names and places, for readers of old.
    assert {name: written[name] for name in OLD_FORM} == {**OLD_FORM, "lora_config": {"r": 8}}


def test_finishing_keeps_everything_else(tmp_path: Path) -> None:
    guard.write_metadata(tmp_path, make_metadata())
    guard.mark_finished(tmp_path, "0007")
    metadata = guard.read_metadata(tmp_path).run
    assert metadata is not None
    assert metadata.finished == "0007"
    assert metadata.fingerprint == make_fingerprint()
    (tmp_path / NAME).unlink()
    with pytest.raises(guard.MetadataUnusable, match="cannot mark as finished"):
        guard.mark_finished(tmp_path, "0008")


def test_what_is_read_raw_is_an_object_as_it_stands_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / NAME
    assert load_raw_metadata(tmp_path) is None
    for text, raw in (("{", None), ("[1]", None), ('{"schema_version": 9, "x": 1}', {"schema_version": 9, "x": 1})):
        path.write_text(text)
        assert load_raw_metadata(tmp_path) == raw
    path.write_bytes(b'{"x": "\xff"}')
    assert load_raw_metadata(tmp_path) is None


def test_metadata_of_up_to_16_mib_is_read_and_nothing_stays_open(tmp_path: Path) -> None:
    path = tmp_path / NAME
    text = json.dumps(make_metadata().to_json())
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    path.write_text(text.ljust(16 * 2**20))
    assert guard.read_metadata(tmp_path).run == make_metadata()
    path.write_text(text.ljust(16 * 2**20 + 1))
    assert "16,777,217 bytes" in guard.read_metadata(tmp_path).reason
    path.unlink()
    path.mkdir()
    assert guard.read_metadata(tmp_path).reason == "it is not a regular file"
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before


@pytest.mark.parametrize("version", [1, 2])
def test_each_form_is_told_by_its_number(tmp_path: Path, version: int) -> None:
    value = {**make_metadata().to_json(), "schema_version": version}
    reading = parse_metadata(value)
    assert reading.kind is (MetadataKind.LEGACY if version == 1 else MetadataKind.CURRENT)
    assert reading.run is not None
    assert reading.run.schema_version == version
    assert reading.run.finished is None
    assert (reading.run.fingerprint is None) == (version == 1)
    assert reading.run.to_json()["components"] == ({} if version == 1 else make_fingerprint().to_json())


def test_what_is_written_leaves_nothing_beside_and_keeps_each_thing_that_it_replaces(tmp_path: Path) -> None:
    """Two unreadable ones within a second have a name each; what can be read is replaced."""
    for text in ("one", "two"):
        (tmp_path / NAME).write_text(text)
        guard.write_metadata(tmp_path, make_metadata())
    aside = sorted(path.read_text() for path in tmp_path.glob(NAME + ".unreadable-*"))
    assert aside == ["one", "two"]
    guard.write_metadata(tmp_path, make_metadata())
    assert len(list(tmp_path.glob(NAME + "*"))) == 3
    assert list((tmp_path / ".staging").iterdir()) == []
