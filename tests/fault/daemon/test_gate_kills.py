"""SIGKILL between every two calls that hold, promote or discard a version: the next call finishes, and no reader meets a mixture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import guard
from daemon import versions
from daemon.lineage import read_lineage
from daemon.memory.store import DatasetMeta, dataset_dir, memory_dir_of, write_memory
from tests.fault.daemon import scenarios
from tests.fault.daemon.test_promotion import candidate, whole
from tests.support.killpoints import killed_runs
from tests.support.sound_model import assert_model_dir_sound

MakeRoot = Callable[[Path], dict[str, Any]]


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """A model directory with a current version, and a candidate that will be held."""
    folder = tmp_path / "template"
    model_dir = folder / "model"
    model_dir.mkdir(parents=True)
    with guard.ModelLock(model_dir, owner="test"):
        record = {"rows": 1, "dataset_digest": "a" * 64}
        versions.promote(model_dir, candidate(model_dir, "candidate-a", b"old"), job_id="a", record=record)
    candidate(model_dir, "candidate-b", b"new")
    meta = DatasetMeta(
        name="b.jsonl", digest="b" * 64, job="b", trained_rows=2, trained_tokens=9, train_on="auto", created_at="2026"
    )
    write_memory(dataset_dir(memory_dir_of(folder / "state"), meta.digest), meta)
    return folder


def copied(template: Path) -> MakeRoot:
    def prepare(root: Path) -> dict[str, Any]:
        shutil.copytree(template, root, dirs_exist_ok=True, symlinks=True)
        return {"model_dir": str(root / "model")}

    return prepare


def weights(model_dir: Path) -> bytes:
    """What a reader loads, which is never of two versions."""
    found = (model_dir / "adapter_model.safetensors").read_bytes()
    assert found == whole(json.loads((model_dir / "adapter_config.json").read_text())["weights"].encode())
    return found


def test_a_version_that_is_held_never_becomes_current(tmp_path: Path, template: Path) -> None:
    for run in killed_runs("tests.fault.daemon.scenarios:hold", copied(template), tmp_path / "runs"):
        folder = run.root / "model"
        assert weights(folder) == whole(b"old"), str(run)
        assert read_lineage(folder).current == "0001", str(run)
        scenarios.hold(str(folder))
        assert weights(folder) == whole(b"old"), str(run)
        assert read_lineage(folder).held() == ["0002"], str(run)
        assert [version.name for version in versions.list_versions(folder)] == ["0001", "0002"], str(run)
        assert_model_dir_sound(folder)


def test_a_promotion_by_hand_is_finished_by_the_next_call(tmp_path: Path, template: Path) -> None:
    scenarios.hold(str(template / "model"))
    seen = set()
    for run in killed_runs("tests.fault.daemon.scenarios:promote_held", copied(template), tmp_path / "runs"):
        folder = run.root / "model"
        seen.add(weights(folder))
        scenarios.promote_held(str(folder))
        assert weights(folder) == whole(b"new"), str(run)
        assert read_lineage(folder).held() == [], str(run)
        assert len(read_lineage(folder).events) == 3, str(run)
        assert versions.damage(versions.find_version(folder, "2")) == (), str(run)
        assert_model_dir_sound(folder)
    assert seen == {whole(b"old"), whole(b"new")}


def test_a_discarded_version_is_gone_with_its_memory_and_its_number_stays_used(tmp_path: Path, template: Path) -> None:
    scenarios.hold(str(template / "model"))
    for run in killed_runs("tests.fault.daemon.scenarios:discard_held", copied(template), tmp_path / "runs"):
        folder = run.root / "model"
        assert weights(folder) == whole(b"old"), str(run)
        scenarios.discard_held(str(folder))
        assert [version.name for version in versions.list_versions(folder)] == ["0001"], str(run)
        assert {path.name for path in (folder / "versions").iterdir()} == {"0001"}, str(run)
        assert versions.newest_number(folder) == 2, str(run)
        assert read_lineage(folder).current == "0001", str(run)
        assert not dataset_dir(memory_dir_of(run.root / "state"), "b" * 64).exists(), str(run)
        assert_model_dir_sound(folder)
