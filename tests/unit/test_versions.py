"""Promotion: whole or not at all, once a job, and readable through the same paths at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from daemon import versions
from daemon.errors import DropforgeError, NotFound
from tests.unit.guard.conftest import as_user


def candidate(model_dir: Path, name: str, weights: bytes, *extra: str) -> Path:
    folder = model_dir / ".staging" / name
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    for file in extra:
        (folder / file).write_text("extra")
    return folder


def promote(model_dir: Path, job: str, weights: bytes, *extra: str) -> versions.Version:
    return versions.promote(model_dir, candidate(model_dir, job, weights, *extra), job_id=job, record={"rows": 3})


def test_the_model_directory_always_shows_the_newest_version(tmp_path: Path) -> None:
    assert versions.current_version(tmp_path) is None
    for number, weights in enumerate((b"one", b"two"), start=1):
        version = promote(tmp_path, f"job{number}", weights)
        assert version.name == f"000{number}"
        assert (tmp_path / "adapter_model.safetensors").read_bytes() == weights
        assert versions.current_version(tmp_path) == version
    assert [v.record["parent"] for v in versions.list_versions(tmp_path)] == [None, "0001"]
    lineage = [json.loads(line) for line in (tmp_path / "lineage.jsonl").read_text().splitlines()]
    assert [(line["event"], line["version"], line["job"]) for line in lineage] == [
        ("promoted", "0001", "job1"),
        ("promoted", "0002", "job2"),
    ]


def test_promoting_a_job_twice_is_promoting_it_once(tmp_path: Path) -> None:
    first = promote(tmp_path, "job", b"weights")
    again = versions.promote(tmp_path, tmp_path / ".staging" / "gone", job_id="job", record={})
    assert again == first
    assert len(versions.list_versions(tmp_path)) == 1
    assert len((tmp_path / "lineage.jsonl").read_text().splitlines()) == 1


def test_links_of_files_that_a_version_lacks_go_away(tmp_path: Path) -> None:
    promote(tmp_path, "one", b"1", "vocab.txt")
    assert (tmp_path / "vocab.txt").read_text() == "extra"
    promote(tmp_path, "two", b"2")
    assert not (tmp_path / "vocab.txt").is_symlink()


def test_an_incomplete_candidate_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    promote(tmp_path, "one", b"1")
    broken = candidate(tmp_path, "two", b"2")
    (broken / "adapter_model.safetensors").unlink()
    with pytest.raises(DropforgeError, match=r"adapter_model\.safetensors is missing"):
        versions.promote(tmp_path, broken, job_id="two", record={})
    assert versions.current_version(tmp_path).name == "0001"  # type: ignore[union-attr]


def test_a_file_of_the_users_own_is_not_replaced_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("mine")
    with pytest.raises(DropforgeError, match="not a link"):
        promote(tmp_path, "one", b"1")
    assert (tmp_path / "adapter_config.json").read_text() == "mine"


@pytest.mark.parametrize("target", ["versions/0007", "/etc", "versions/../..", "versions"])
def test_a_link_that_leads_astray_is_an_error(tmp_path: Path, target: str) -> None:
    promote(tmp_path, "one", b"1")
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to(target)
    with pytest.raises(DropforgeError, match="no version"):
        versions.current_version(tmp_path)


def test_versions_sort_by_number(tmp_path: Path) -> None:
    for name in ("0002", "10000", "9999"):
        (tmp_path / "versions" / name).mkdir(parents=True)
    assert [v.name for v in versions.list_versions(tmp_path)] == ["0002", "9999", "10000"]
    assert versions.find_version(tmp_path, "2").name == "0002"
    with pytest.raises(NotFound):
        versions.find_version(tmp_path, "3")


def test_a_folder_of_versions_that_may_not_be_entered_is_told_in_words(open_tmp_path: Path) -> None:
    """The daemon's status reads the current version in every round: an error of the system would end it."""
    promote(open_tmp_path, "a", b"one")
    folder = open_tmp_path / versions.VERSIONS
    folder.chmod(0)

    def read() -> str:
        with pytest.raises(DropforgeError) as caught:
            versions.current_version(open_tmp_path)
        return str(caught.value)

    told = as_user(65534, read) if os.geteuid() == 0 else read()
    folder.chmod(0o755)
    assert "Permission denied" in told
    assert str(folder) in told
