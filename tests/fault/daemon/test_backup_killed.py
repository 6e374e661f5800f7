"""SIGKILL, and a full disk, at every call of a backup and of a restore that changes the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from daemon import config, root_identity, versions
from daemon.backup.plan import ASIDE_PREFIX
from daemon.backup.sources import open_source, verify
from daemon.job import JobState
from daemon.store import JobStore
from tests.fault.daemon import scenarios
from tests.support.killpoints import full_disk_runs, killed_runs
from tests.support.root import Root, wait_until
from tests.support.sound_model import assert_model_dir_sound

TARGETS = ("forge.tar", "snapshots")
# Each call that changes the disk is one on some file; a few of them stand for the rest, all of them are for `make chaos`.
SOME = [7, pytest.param(1, marks=pytest.mark.chaos)]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root with a version and a queued job, without a daemon; beside it a tar file and a snapshot of it."""
    folder = tmp_path_factory.mktemp("template")
    root = Root(folder / "root", behaviour={})
    root.start()
    root.drop("a.jsonl", [{"text": f"a {number}"} for number in range(8)])
    root.finished("a.jsonl")
    assert root.run("pause").returncode == 0
    root.drop("b.jsonl", [{"text": f"b {number}"} for number in range(8)])
    wait_until(lambda: (job := root.job("b.jsonl")) and job.state is JobState.QUEUED, what="the job to be queued")
    assert root.stop() == 0
    shutil.rmtree(root.settings.state_dir / "logs")
    files = folder / "files"
    for target in TARGETS:
        assert "error" not in scenarios.back_up_root(str(root.path), str(files / target))
    shutil.move(root.path, files / "root")  # or each copy of it would be told to be one
    yield files
    root.close()


def prepare_in(root: Path, template: Path, *targets: str) -> None:
    for name in ("root", *targets):
        source = template / name
        if source.is_dir():
            shutil.copytree(source, root / name, symlinks=True)
        else:
            shutil.copyfile(source, root / name)


def hidden(root: Path) -> set[str]:
    """Names that a killed backup may leave behind, beside or in its target."""
    return {path.name for path in (*root.glob(".*"), *root.glob("snapshots/.*"))} - {".lock"}


def unexpected(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if not path.name.startswith(".")} - {"root", *TARGETS}


def is_whole(path: Path) -> bool:
    with open_source(path) as source:
        return set(verify(source).manifest.jobs.values()) == {1}


@pytest.mark.parametrize("every", SOME)
@pytest.mark.parametrize("target", TARGETS)
def test_a_backup_that_is_killed_leaves_the_one_before_and_nothing_half(
    template: Path, tmp_path: Path, target: str, every: int
) -> None:
    """At every call; the next one finishes, and removes what the killed one may have left under a hidden name."""

    def prepare(root: Path) -> Mapping[str, Any]:
        prepare_in(root, template, target)
        return {"root": str(root / "root"), "target": str(root / target)}

    for run in killed_runs(
        "tests.fault.daemon.scenarios:back_up_root", prepare, tmp_path / "runs", whens=("before",), every=every
    ):
        assert is_whole(run.root / target), str(run)
        assert not unexpected(run.root), str(run)
        if hidden(run.root) or run.at in (0, 1):
            assert "error" not in scenarios.back_up_root(str(run.root / "root"), str(run.root / target)), str(run)
            assert not hidden(run.root), str(run)


@pytest.mark.parametrize("every", SOME)
@pytest.mark.parametrize("target", TARGETS)
def test_a_backup_that_meets_a_full_disk_says_so_and_leaves_the_one_before(
    template: Path, tmp_path: Path, target: str, every: int
) -> None:
    def prepare(root: Path) -> Mapping[str, Any]:
        prepare_in(root, template, target)
        return {"root": str(root / "root"), "target": str(root / target)}

    for run in full_disk_runs("tests.fault.daemon.scenarios:back_up_root", prepare, tmp_path / "runs", every=every):
        assert is_whole(run.root / target), str(run)
        answer = str(run.outcome.result)
        assert "no space left" in answer or "disk is full" in answer or "error" not in answer, (str(run), answer)
        assert not unexpected(run.root), str(run)
        assert hidden(run.root) <= {f".{target}.queue"}, str(run)  # where its removal was the call that failed


def everything(root: Path) -> set[bytes]:
    """The contents of all files that a restore may neither lose nor change."""
    names = ("a.jsonl", "b.jsonl", "adapter_model.safetensors", "lineage.jsonl", "canary")
    return {path.read_bytes() for path in root.rglob("*") if path.name in names and not path.is_symlink()}


@pytest.mark.parametrize("every", SOME)
def test_a_restore_that_is_killed_is_not_taken_for_a_root_and_can_be_done_again(
    template: Path, tmp_path: Path, every: int
) -> None:
    """At every call: what was in place is there still, and the next restore makes it whole."""

    def prepare(root: Path) -> Mapping[str, Any]:
        prepare_in(root, template, "forge.tar")
        shutil.rmtree(root / "root" / "current_model" / "versions")
        (root / "root" / "state" / "canary").write_text("a canary")
        (root / "root" / "inbox" / "canary").write_text("another canary")
        return {"root": str(root / "root"), "source": str(root / "forge.tar")}

    at_first: set[bytes] = set()
    for run in killed_runs(
        "tests.fault.daemon.scenarios:restore_root", prepare, tmp_path / "runs", whens=("before",), every=every
    ):
        root = run.root / "root"
        at_first = at_first or everything(root)
        assert at_first <= everything(root) | everything(template / "root"), str(run)
        assert {b"a canary", b"another canary"} <= everything(root), str(run)
        settings = config.load(root)
        readings = root_identity.read_parts(settings)
        is_finished = (root / "restores.jsonl").exists() and not readings[0].restoring and readings[0].root_id
        if any(reading.path.glob(f"{ASIDE_PREFIX}*") for reading in readings) and run.at and not is_finished:
            moved = [path for reading in readings for path in reading.path.glob(f"{ASIDE_PREFIX}*/*")]
            assert not moved or root_identity.contradiction(readings), str(run)
        assert "error" not in scenarios.restore_root(str(root), str(run.root / "forge.tar")), str(run)
        assert root_identity.contradiction(root_identity.read_parts(settings)) == "", str(run)
        assert {b"a canary", b"another canary"} <= everything(root), str(run)
        assert [versions.damage(found) for found in versions.list_versions(settings.model_dir)] == [()], str(run)
        assert_model_dir_sound(settings.model_dir)
        store = JobStore(settings.store_path, check=True)
        assert [job.state for job in store.jobs()] == [JobState.SUCCEEDED, JobState.QUEUED], str(run)
        assert all(Path(job.path).exists() for job in store.jobs({JobState.QUEUED})), str(run)
        store.close()
        for line in (root / "restores.jsonl").read_text().splitlines():
            json.loads(line)
