"""Which version is current: rollback, what it refuses, and the way back from a `latest` that is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import guard
from daemon import versions
from daemon.config import Settings
from daemon.errors import DropforgeError, NotFound
from daemon.lineage import read_lineage
from tests.support.inbox import Record
from tests.unit.test_versions import candidate, promote


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """Three versions, of jobs one, two and three; only the second has a vocabulary."""
    promote(tmp_path, "one", b"1")
    promote(tmp_path, "two", b"2", "vocab.txt")
    promote(tmp_path, "three", b"3")
    return tmp_path


def rollback(model_dir: Path, name: str, **options: Any) -> versions.Version:
    with guard.ModelLock(model_dir, owner="test"):
        return versions.rollback(model_dir, name, **options)


def repair(model_dir: Path) -> versions.Version | None:
    with guard.ModelLock(model_dir, owner="test"):
        return versions.repair_latest(model_dir)


def shown(model_dir: Path) -> tuple[str, bytes]:
    """The current version and the weights that a reader meets."""
    version = versions.current_version(model_dir)
    assert version is not None
    return version.name, (model_dir / "adapter_model.safetensors").read_bytes()


def test_a_rollback_makes_a_version_current_and_is_noted(model_dir: Path) -> None:
    assert rollback(model_dir, "2").name == "0002"
    assert shown(model_dir) == ("0002", b"2")
    assert (model_dir / "vocab.txt").read_text() == "extra"
    lineage = read_lineage(model_dir)
    assert lineage.current == "0002"
    event = {name: value for name, value in lineage.events[-1].items() if name not in ("at", "previous")}
    assert event == {"event": "rolled_back", "version": "0002", "replaced": "0003"}
    assert rollback(model_dir, "3", after_job=True).name == "0003"
    assert read_lineage(model_dir).events[-1]["after_job"] == "two"
    assert not (model_dir / "vocab.txt").is_symlink()


def test_a_rollback_to_the_current_version_changes_and_notes_nothing(model_dir: Path) -> None:
    before = (model_dir / "lineage.jsonl").read_bytes()
    assert rollback(model_dir, "0003").name == "0003"
    assert shown(model_dir) == ("0003", b"3")
    assert (model_dir / "lineage.jsonl").read_bytes() == before


def test_a_rollback_that_cannot_be_made_changes_nothing(model_dir: Path) -> None:
    """No lock, no such version, one that the gate holds, one that is not as it was promoted."""
    versions.promote(model_dir, candidate(model_dir, "four", b"4"), job_id="four", record={"held": ["it lost"]})
    (model_dir / "versions" / "0001" / "adapter_config.json").write_text("[]")
    before = (model_dir / "lineage.jsonl").read_bytes()
    with pytest.raises(guard.NotLocked):
        versions.rollback(model_dir, "2")
    with pytest.raises(NotFound, match="9"):
        rollback(model_dir, "9")
    with pytest.raises(DropforgeError, match="the gate holds it"):
        rollback(model_dir, "4")
    with pytest.raises(DropforgeError, match=r"version 0001: adapter_config\.json is not the file that was promoted"):
        rollback(model_dir, "1")
    assert (model_dir / "lineage.jsonl").read_bytes() == before
    assert shown(model_dir) == ("0003", b"3")


def test_the_lineage_comes_first_so_that_a_rollback_cut_off_is_finished_by_the_next(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model_dir: Path, version: versions.Version) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(versions, "point_latest", fail)
        with pytest.raises(OSError, match="output error"):
            rollback(model_dir, "1")
    assert read_lineage(model_dir).current == "0001"
    assert shown(model_dir)[0] == "0003"
    rollback(model_dir, "1")
    assert shown(model_dir) == ("0001", b"1")


def test_a_latest_that_is_lost_comes_back_by_the_lineage_or_by_a_rollback(model_dir: Path) -> None:
    assert repair(model_dir) is None
    rollback(model_dir, "2")
    (model_dir / "latest").unlink()
    with pytest.raises(DropforgeError, match="the link is missing"):
        versions.current_version(model_dir)
    mended = repair(model_dir)
    assert mended is not None
    assert shown(model_dir) == (mended.name, b"2") == ("0002", b"2")
    (model_dir / "latest").unlink()
    rollback(model_dir, "1")
    assert read_lineage(model_dir).events[-1]["replaced"] is None
    assert shown(model_dir) == ("0001", b"1")
    with pytest.raises(guard.NotLocked):
        versions.repair_latest(model_dir)


def test_only_a_lost_link_is_mended_and_only_to_what_is_there(model_dir: Path) -> None:
    """A folder in its place may be anybody's; a version whose folder is gone is nothing to point to."""
    (model_dir / "latest").unlink()
    (model_dir / "latest").mkdir()
    with pytest.raises(DropforgeError, match="it is not a link"):
        repair(model_dir)
    (model_dir / "latest").rmdir()
    (model_dir / "versions" / "0003").rename(model_dir / "elsewhere")
    with pytest.raises(DropforgeError, match="the link is missing"):
        repair(model_dir)
    (model_dir / "latest").symlink_to("versions/0003")  # leads nowhere
    with pytest.raises(DropforgeError, match="which is no version"):
        repair(model_dir)
    (model_dir / "elsewhere").rename(model_dir / "versions" / "0003")
    (model_dir / "latest").unlink()
    (model_dir / "latest").symlink_to("versions/9999")
    assert repair(model_dir) is not None
    assert shown(model_dir) == ("0003", b"3")


def test_the_links_are_durable_before_latest_moves_and_after(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = versions.fsync_dir, []

    def fsync(path: Path) -> None:
        seen.append(((path / "latest").readlink().name, (path / "vocab.txt").is_symlink()))
        real(path)

    rollback(model_dir, "2")
    monkeypatch.setattr(versions, "fsync_dir", fsync)
    rollback(model_dir, "3")
    assert seen == [("0002", True), ("0003", True), ("0003", False)]


def test_a_lost_latest_is_mended_at_the_start_and_told(model_dir: Path) -> None:
    settings = Settings(root=model_dir.parent, paths={"current_model": model_dir.name})
    log = Record()
    versions.mend_latest(settings, log)
    assert log.lines == []
    (model_dir / "latest").unlink()
    versions.mend_latest(settings, log)
    assert log.events("version.latest_repaired") == [{"version": "0003"}]
    assert shown(model_dir) == ("0003", b"3")


def test_links_that_are_not_ours_stay(model_dir: Path) -> None:
    (model_dir / "mine").symlink_to("versions/0001/adapter_config.json")
    (model_dir / "other").symlink_to("latest/adapter_config.json")
    (model_dir / "notes.txt").write_text("mine")
    rollback(model_dir, "1")
    assert (model_dir / "mine").is_symlink()
    assert (model_dir / "other").is_symlink()
    assert (model_dir / "notes.txt").read_text() == "mine"


# -- what a version is


def test_a_version_knows_its_files_its_parent_and_its_job(model_dir: Path) -> None:
    first, second, third = versions.list_versions(model_dir)
    assert [version.record["parent"] for version in (first, second, third)] == [None, "0001", "0002"]
    assert [version.record["parent_digest"] for version in (first, second, third)] == [
        None, first.digest, second.digest,
    ]  # fmt: skip
    assert third.record["rows"] == 3
    for version in (first, second, third):
        files = {path.name for path in version.path.iterdir()} - {versions.RECORD}
        assert version.record["files"] == {
            name: guard.digest_file(version.path / name).blake3_hex for name in sorted(files)
        }


def test_no_number_is_used_twice_also_when_its_folder_is_gone(model_dir: Path) -> None:
    (model_dir / "versions" / "0003").rename(model_dir / "elsewhere")
    rollback(model_dir, "1")
    assert promote(model_dir, "four", b"4").name == "0004"
    versions.record_restore(model_dir, current="0004", used=41, created_at="then")
    assert promote(model_dir, "five", b"5").name == "0042"


def test_a_version_whose_promotion_failed_half_way_is_part_of_the_line(model_dir: Path) -> None:
    version_of(model_dir, "0004", job="lost")
    assert promote(model_dir, "five", b"5").name == "0005"
    assert [event["version"] for event in read_lineage(model_dir).events][-2:] == ["0004", "0005"]


def test_a_candidate_that_is_not_what_the_run_wrote_is_lost(model_dir: Path) -> None:
    folder = candidate(model_dir, "four", b"4")
    digest = guard.digest_file(folder / "adapter_model.safetensors").blake3_hex
    with pytest.raises(versions.CandidateLost, match="not the file that the run wrote"):
        versions.promote(model_dir, folder, job_id="four", record={"adapter_digest": "0" * 64})
    with pytest.raises(versions.CandidateLost, match=r"adapter_config\.json, adapter_model\.safetensors is missing"):
        versions.promote(model_dir, model_dir / "nowhere", job_id="none", record={})
    assert shown(model_dir) == ("0003", b"3")
    (folder / ".training_record.json.1-0.tmp").write_text("left by a crash")
    version = versions.promote(model_dir, folder, job_id="four", record={"adapter_digest": digest})
    assert sorted(version.record["files"]) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not list(version.path.glob(".*"))


def test_promoting_again_after_a_later_version_moves_nothing_back(model_dir: Path) -> None:
    again = versions.promote(model_dir, model_dir / "gone", job_id="two", record={})
    assert again.name == "0002"
    assert shown(model_dir) == ("0003", b"3")


def test_a_held_version_is_not_current_and_the_next_goes_on_from_the_one_before(model_dir: Path) -> None:
    held = versions.promote(model_dir, candidate(model_dir, "four", b"4"), job_id="four", record={"held": ["worse"]})
    assert held.name == "0004"
    assert shown(model_dir) == ("0003", b"3")
    assert read_lineage(model_dir).held() == ["0004"]
    assert promote(model_dir, "five", b"5").record["parent"] == "0003"


def test_an_adapter_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files and its record; else a power cut could leave a version with holes."""
    durable: list[set[str]] = []
    real = versions.fsync_tree
    monkeypatch.setattr(
        versions, "fsync_tree", lambda path: (durable.append({item.name for item in path.iterdir()}), real(path))
    )
    promote(tmp_path, "one", b"1")
    assert durable == [{"adapter_config.json", "adapter_model.safetensors", versions.RECORD}]


def damaged(version: versions.Version) -> tuple[str, ...]:
    return versions.damage(versions.read_version(version.path))


def test_damage_is_told_file_by_file_and_the_card_is_free(tmp_path: Path) -> None:
    version = promote(tmp_path, "one", b"1", "README.md", "vocab.txt")
    (version.path / "README.md").write_text("edited by a person")
    assert damaged(version) == ()
    (version.path / "adapter_model.safetensors").write_bytes(b"other")
    (version.path / "vocab.txt").unlink()
    assert damaged(version) == (
        "version 0001: adapter_model.safetensors is not the file that was promoted",
        "version 0001 lacks vocab.txt",
    )
    recorded = version.record["files"]
    assert versions.damage(version, recorded.get) == ()
    assert len(versions.damage(version, lambda name: None)) == 3
    (version.path / versions.RECORD).write_text("[1]")
    assert damaged(version) == ("version 0001 has no training_record.json that can be read",)


def test_a_version_of_before_its_files_were_recorded_is_judged_by_its_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "versions" / "0001"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"1")
    digest = guard.digest_file(folder / "adapter_model.safetensors").blake3_hex
    found = []
    for record in ({"job": "a"}, {"adapter_digest": digest}, {"adapter_digest": "0" * 64}, {"files": [1]}):
        (folder / versions.RECORD).write_text(json.dumps(record))
        found.append(len(versions.damage(versions.read_version(folder))))
    assert found == [0, 0, 1, 0]


# -- the line behind a version


def version_of(model_dir: Path, name: str, **record: Any) -> versions.Version:
    folder = model_dir / "versions" / name
    folder.mkdir(parents=True)
    (folder / versions.RECORD).write_text(json.dumps({"name": name, **record}))
    return versions.read_version(folder)


def test_the_line_of_a_version_is_followed_to_its_beginning_or_says_where_it_is_lost(tmp_path: Path) -> None:
    assert versions.line_of(None) == ([], "")
    version_of(tmp_path, "0001", parent=None)
    second = version_of(tmp_path, "0002", parent="0001")
    line, lost = versions.line_of(second)
    assert ([record["name"] for record in line], lost) == (["0002", "0001"], "")
    line, lost = versions.line_of(version_of(tmp_path, "0004", parent="0003"))
    assert ([record["name"] for record in line], "version 0003 is not known here" in lost) == (["0004"], True)
    version_of(tmp_path, "0005", parent="0006")
    line, lost = versions.line_of(version_of(tmp_path, "0006", parent="0005"))
    assert ([record["name"] for record in line], "version 0006" in lost) == (["0006", "0005"], True)


def test_a_dataset_is_learned_by_its_version_and_all_that_go_back_to_it(tmp_path: Path) -> None:
    version_of(tmp_path, "0001", dataset_digest="a")
    version_of(tmp_path, "0002", dataset_digest="b", parent="0001")
    version_of(tmp_path, "0003", dataset_digest="c")
    assert versions.learned_by(tmp_path, "a") == ["0001", "0002"]
    assert versions.learned_by(tmp_path, "b") == ["0002"]
    assert versions.learned_by(tmp_path, "d") == []


def test_the_base_is_what_the_adapter_s_configuration_names(tmp_path: Path) -> None:
    version = version_of(tmp_path, "0001")
    assert versions.named_base(version) == ("", "")
    for text, named in (
        ('{"base_model_name_or_path": "org/base", "revision": "abc"}', ("org/base", "abc")),
        ('{"base_model_name_or_path": null}', ("", "")),
        ("[]", ("", "")),
        ("{", ("", "")),
    ):
        (version.path / "adapter_config.json").write_text(text)
        assert versions.named_base(version) == named
