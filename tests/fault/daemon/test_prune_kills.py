"""SIGKILL between every two calls that move old versions aside and delete them: none that is kept suffers, the next call finishes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon import versions
from daemon.lineage import read_lineage
from daemon.version_pruning import list_pruned
from tests.fault.daemon import scenarios
from tests.support.killpoints import killed_runs
from tests.support.sound_model import assert_model_dir_sound
from tests.unit.test_version_pruning import make

ALL, KEPT, MOVED = ["0001", "0002", "0003", "0004"], ["0003", "0004"], ["0001", "0002"]
TARGET = "tests.fault.daemon.scenarios:prune"


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """A model directory with four versions."""
    folder = tmp_path / "template"
    make(folder, 4)
    return folder


def copied(template: Path, days: float) -> Callable[[Path], dict[str, Any]]:
    def prepare(root: Path) -> dict[str, Any]:
        shutil.copytree(template, root / "model", symlinks=True)
        return {"model_dir": str(root / "model"), "days": days}

    return prepare


def whole(found: list[versions.Version]) -> list[str]:
    """Names of versions, each of which is undamaged."""
    assert [versions.damage(version) for version in found] == [()] * len(found)
    return [version.name for version in found]


def test_no_version_is_lost_on_its_way_aside(tmp_path: Path, template: Path) -> None:
    for run in killed_runs(TARGET, copied(template, days=14), tmp_path / "runs"):
        folder = run.root / "model"
        listed, aside = whole(versions.list_versions(folder)), whole(list_pruned(folder))
        assert sorted(listed + aside) == ALL, str(run)
        assert set(KEPT) <= set(listed), str(run)
        assert read_lineage(folder).current == "0004", str(run)
        scenarios.prune(str(folder), days=14)
        assert (whole(versions.list_versions(folder)), whole(list_pruned(folder))) == (KEPT, MOVED), str(run)
        assert_model_dir_sound(folder)


def test_a_version_is_deleted_whole_or_by_the_next_call(tmp_path: Path, template: Path) -> None:
    scenarios.prune(str(template), days=14)
    for run in killed_runs(TARGET, copied(template, days=0), tmp_path / "runs", every=2):
        folder = run.root / "model"
        assert whole(versions.list_versions(folder)) == KEPT, str(run)
        assert set(whole(list_pruned(folder))) <= set(MOVED), str(run)
        scenarios.prune(str(folder), days=0)
        assert whole(versions.list_versions(folder)) == KEPT, str(run)
        assert not [*(folder / "versions" / ".pruned").iterdir()], str(run)
        assert read_lineage(folder).newest_number == 4, str(run)
        assert_model_dir_sound(folder)
