"""Pruning: never what is current, held or continued; moved, not deleted; the line behind a version stays known."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import guard
from daemon import version_pruning, versions
from daemon.config import Settings
from daemon.errors import DropforgeError, NotFound
from daemon.lineage import Lineage, read_lineage
from daemon.version_pruning import choose_kept, execute_prune, list_pruned, plan_prune, purge_pruned
from tests.support.root import dropforge
from tests.support.sound_model import assert_model_dir_sound
from tests.unit.test_versions import candidate

NAMES = [f"{number:04d}" for number in range(1, 8)]


def promoted(name: str, parent: str | None, event: str = "promoted") -> dict[str, Any]:
    return {"event": event, "version": name, "parent": parent}


def make(model_dir: Path, count: int) -> None:
    for number in range(1, count + 1):
        record = {"dataset": f"{number}.jsonl", "dataset_digest": f"d{number}"}
        folder = candidate(model_dir, f"job{number}", _safetensors())
        versions.promote(model_dir, folder, job_id=f"job{number}", record=record)


def _safetensors() -> bytes:
    return (2).to_bytes(8, "little") + b"{}"


def prune(model_dir: Path, keep: int) -> list[str]:
    with guard.ModelLock(model_dir, owner="test"):
        return [version.name for version in execute_prune(model_dir, plan_prune(model_dir, keep=keep))]


def names(model_dir: Path) -> list[str]:
    return [version.name for version in versions.list_versions(model_dir)]


# -- what stays


@given(
    keep=st.integers(0, 9),
    current=st.sampled_from(NAMES),
    parents=st.lists(st.sampled_from([None, *NAMES]), min_size=7, max_size=7),
    held=st.sets(st.sampled_from(NAMES)),
)
def test_what_is_needed_always_stays(keep: int, current: str, parents: list[str | None], held: set[str]) -> None:
    events = [promoted(name, parent, "held" if name in held else "promoted")
              for name, parent in zip(NAMES, parents, strict=True)]  # fmt: skip
    kept = choose_kept(NAMES, Lineage(events=tuple(events)), current=current, keep=keep)
    parent_of = dict(zip(NAMES, parents, strict=True))
    needed = {current, parent_of[current], *held, *(parent_of[name] for name in held)} - {None}
    assert needed <= set(kept)
    assert set(NAMES[-keep:] if keep else NAMES) <= set(kept)
    assert list(kept) == sorted(kept)
    assert all(kept.values())
    assert kept[current] == "the current version"


def test_nothing_goes_where_the_current_version_cannot_be_told(tmp_path: Path) -> None:
    make(tmp_path, 3)
    (tmp_path / "latest").unlink()
    with pytest.raises(DropforgeError, match="the link is missing"):
        plan_prune(tmp_path, keep=1)


# -- moving aside and back


def test_old_versions_move_aside_and_what_they_learned_stays_known(tmp_path: Path) -> None:
    make(tmp_path, 5)
    assert prune(tmp_path, 1) == ["0001", "0002", "0003"]
    assert names(tmp_path) == ["0004", "0005"]  # the current one, and what a rollback leads to
    assert [version.name for version in list_pruned(tmp_path)] == ["0001", "0002", "0003"]
    line, gap = versions.line_of(versions.current_version(tmp_path))
    assert ([record["dataset"] for record in line], gap) == ([f"{number}.jsonl" for number in (5, 4, 3, 2, 1)], "")
    assert versions.learned_by(tmp_path, "d2") == ["0002", "0003", "0004", "0005"]
    assert read_lineage(tmp_path).current == "0005"
    assert not read_lineage(tmp_path).broken
    assert_model_dir_sound(tmp_path)
    assert prune(tmp_path, 1) == []
    folder = candidate(tmp_path, "job6", _safetensors())
    assert versions.promote(tmp_path, folder, job_id="job6", record={}).name == "0006"


def test_a_rollback_brings_a_version_back_from_aside(tmp_path: Path) -> None:
    make(tmp_path, 4)
    prune(tmp_path, 1)
    with guard.ModelLock(tmp_path, owner="test"):
        version_pruning.bring_back(tmp_path, "1")
        version = versions.rollback(tmp_path, "1", after_job=True)
    assert version.name == "0001"
    assert version_pruning.find_any_version(tmp_path, "2").path.parent.name == ".pruned"
    with pytest.raises(NotFound):
        version_pruning.find_any_version(tmp_path, "9")
    last = read_lineage(tmp_path).events[-1]
    assert (last["event"], last["version"], last["replaced"], last["after_job"]) == (
        "rolled_back", "0001", "0004", "job4",
    )  # fmt: skip
    assert_model_dir_sound(tmp_path)


def test_what_became_current_since_the_plan_was_shown_stays(tmp_path: Path) -> None:
    make(tmp_path, 4)
    plan = plan_prune(tmp_path, keep=1)
    assert [version.name for version in plan.moved] == ["0001", "0002"]
    with guard.ModelLock(tmp_path, owner="test"):
        versions.rollback(tmp_path, "1")
        assert [version.name for version in execute_prune(tmp_path, plan)] == ["0002"]
    assert names(tmp_path) == ["0001", "0003", "0004"]


def test_a_prune_that_was_cut_off_behind_the_lineage_is_done_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, 5)
    real = version_pruning.rename_durable

    def cut(source: Path, target: Path) -> None:
        if source.name == "0002":
            raise OSError(5, "Input/output error")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(version_pruning, "rename_durable", cut)
        with pytest.raises(OSError, match="Input/output"):
            prune(tmp_path, 1)
    assert names(tmp_path) == ["0002", "0003", "0004", "0005"]
    assert_model_dir_sound(tmp_path)
    assert prune(tmp_path, 1) == ["0002", "0003"]
    assert_model_dir_sound(tmp_path)


# -- deleting


def test_what_was_moved_aside_is_deleted_after_its_days_and_not_before(tmp_path: Path) -> None:
    make(tmp_path, 4)
    prune(tmp_path, 1)
    (tmp_path / "versions" / ".pruned" / "0003").mkdir()  # by hand: nothing tells since when
    now = datetime.now(UTC)
    with guard.ModelLock(tmp_path, owner="test"):
        assert purge_pruned(tmp_path, days=14, now=now + timedelta(days=13)) == []
        gone = purge_pruned(tmp_path, days=14, now=now + timedelta(days=15))
    assert [version.name for version in gone] == ["0001", "0002"]
    assert [path.name for path in (tmp_path / "versions" / ".pruned").iterdir()] == ["0003"]
    assert versions.learned_by(tmp_path, "d1")[0] == "0001"


def test_the_policy_of_the_settings_is_applied_and_a_failure_told(tmp_path: Path) -> None:
    settings = Settings(root=tmp_path, versions={"keep": 2})
    said: list[tuple[str, dict[str, Any]]] = []

    class Log:
        def info(self, event: str, **data: Any) -> None:
            said.append((event, data))

        error = info

    make(settings.model_dir, 5)
    version_pruning.apply_policy(settings, Log())
    assert said[0][0] == "version.pruned"
    assert said[0][1]["versions"] == ["0001", "0002", "0003"]
    (settings.model_dir / "latest").unlink()
    version_pruning.apply_policy(settings, Log())
    assert said[-1][0] == "version.not_pruned"
    version_pruning.apply_policy(Settings(root=tmp_path), Log())  # 0: all stay, and nothing has to be told
    assert len(said) == 2


# -- the command


def test_prune_shows_its_plan_and_does_it_only_when_told(tmp_path: Path) -> None:
    (tmp_path / "dropforge.toml").write_text("")
    make(tmp_path / "current_model", 4)
    command = ("--root", str(tmp_path), "versions", "prune")
    unsaid = dropforge(*command)
    assert (unsaid.returncode, "[versions] keep is not set" in unsaid.stderr) == (2, True)
    shown = dropforge(*command, "--keep", "1", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "move 2 versions aside" in shown.stdout
    assert "0003 stays: the current version continues it" in shown.stdout
    asked = dropforge(*command, "--keep", "1")
    assert (asked.returncode, "--yes" in asked.stderr) == (2, True)
    assert names(tmp_path / "current_model") == NAMES[:4]
    done = dropforge(*command, "--keep", "1", "--yes", "--json")
    assert [one["version"] for one in json.loads(done.stdout)["moved"]] == ["0001", "0002"]
    assert names(tmp_path / "current_model") == ["0003", "0004"]
    listed = dropforge("--root", str(tmp_path), "versions", "--json")
    assert [one["version"] for one in json.loads(listed.stdout)["versions"]] == ["0003", "0004"]
    back = dropforge("--root", str(tmp_path), "rollback", "1")
    assert (back.returncode, "version 0001 is current now" in back.stdout) == (0, True), back.stderr
    assert "`dropforge rollback 4` returns" in back.stdout
    history = dropforge("--root", str(tmp_path), "versions").stdout
    assert "rolled back at" in history
    assert "from 0004; `dropforge rollback 4` returns" in history
    assert "version 0002 is moved aside" in history
    forward = dropforge("--root", str(tmp_path), "rollback", "4")
    assert forward.returncode == 0, forward.stderr
