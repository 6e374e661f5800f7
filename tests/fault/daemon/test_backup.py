"""What a backup promises: nothing that was queued or trained is lost, whatever became of the root, and nothing half-done is left."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon import versions
from daemon.backup.restore import JOURNAL
from daemon.job import JobState
from daemon.root_identity import MARK
from tests.support.root import Root, wait_until
from tests.support.sound import assert_sound

MakeRoot = Callable[..., Root]
Destroy = Callable[[Root], None]
KINDS = ("forge.tar", "forge.tar.gz", "forge.tar.zst", "snapshots")


def rows(name: str) -> list[dict[str, str]]:
    return [{"text": f"{name} {number}"} for number in range(8)]


@pytest.fixture
def trained(make_root: MakeRoot) -> Root:
    """A root with two versions and a queued job, whose daemon has stopped."""
    root = make_root(behaviour={})
    root.configure(inbox={"rescan_seconds": 0.2})
    root.start()
    for name in ("a.jsonl", "b.jsonl"):
        root.drop(name, rows(name))
        assert root.finished(name).state is JobState.SUCCEEDED
    assert root.run("pause").returncode == 0
    root.drop("queued.jsonl", rows("queued"))
    wait_until(lambda: (job := root.job("queued.jsonl")) and job.state is JobState.QUEUED, what="the job to be queued")
    assert root.run("resume").returncode == 0 if root.stop() == 0 else False
    return root


def saved(root: Root, target: Path, *options: str, code: int = 0) -> dict[str, Any]:
    done = root.run("backup", str(target), "--json", *options)
    assert done.returncode == code, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def restored(root: Root, source: Path, *options: str) -> dict[str, Any]:
    done = root.run("restore", str(source), "--json", *options)
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def go_on(root: Root, expected: str) -> None:
    """Train what is queued and one dataset more: the versions go on where they were, and everything is sound."""
    root.drop("next.jsonl", rows("next"))
    done = root.run("run", "--once")
    assert done.returncode == 0, done.stderr + root.errors()
    queued, following = root.job("queued.jsonl"), root.job("next.jsonl")
    assert queued is not None
    assert following is not None
    assert (queued.state, following.state) == (JobState.SUCCEEDED, JobState.SUCCEEDED), (queued, following)
    assert sorted((str(queued.version), str(following.version))) == [expected, f"{int(expected) + 1:04d}"]
    assert versions.read_lineage(root.settings.model_dir).broken == ()
    assert_sound(root)


# -- a root that was destroyed comes back


def everything_gone(root: Root) -> None:
    for path in (root.settings.state_dir, root.settings.model_dir, root.settings.inbox_dir):
        shutil.rmtree(path)
    (root.path / "dropforge.toml").unlink()


def model_gone(root: Root) -> None:
    shutil.rmtree(root.settings.model_dir)


def model_emptied(root: Root) -> None:
    shutil.rmtree(root.settings.model_dir)
    root.settings.model_dir.mkdir()


def state_gone(root: Root) -> None:
    shutil.rmtree(root.settings.state_dir)


def inbox_emptied(root: Root) -> None:
    shutil.rmtree(root.settings.inbox_dir)
    root.settings.inbox_dir.mkdir()


def claimed_file_emptied(root: Root) -> None:
    job = root.job("queued.jsonl")
    assert job is not None
    Path(job.path).write_bytes(b"")


def queue_missing(root: Root) -> None:
    root.settings.store_path.unlink()


def queue_empty(root: Root) -> None:
    root.settings.store_path.write_bytes(b"")


def queue_corrupt(root: Root) -> None:
    root.settings.store_path.write_bytes(b"SQLite format 3\0" + os.urandom(5000))


def latest_missing(root: Root) -> None:
    (root.settings.model_dir / "latest").unlink()


def latest_dangling(root: Root) -> None:
    (root.settings.model_dir / "latest").unlink()
    (root.settings.model_dir / "latest").symlink_to("versions/0009")


def version_deleted(root: Root) -> None:
    shutil.rmtree(root.settings.model_dir / "versions" / "0002")


def adapter_bits_flipped(root: Root) -> None:
    path = root.settings.model_dir / "versions" / "0002" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)


def lineage_truncated(root: Root) -> None:
    path = root.settings.model_dir / "lineage.jsonl"
    path.write_bytes(path.read_bytes()[:-40])


def marks_gone(root: Root) -> None:
    for mark in root.path.glob(f"*/{MARK}"):
        mark.unlink()


def settings_lost(root: Root) -> None:
    (root.path / "dropforge.toml").write_text("[model\n")


DESTRUCTIONS: tuple[Destroy, ...] = (
    *(everything_gone, model_gone, model_emptied, state_gone, inbox_emptied, claimed_file_emptied, queue_missing),
    *(queue_empty, queue_corrupt, latest_missing, latest_dangling, version_deleted, adapter_bits_flipped),
    *(lineage_truncated, marks_gone, settings_lost),
)


@pytest.mark.parametrize("destroy", DESTRUCTIONS, ids=lambda destroy: destroy.__name__)
def test_a_root_that_was_destroyed_comes_back_and_goes_on(trained: Root, tmp_path: Path, destroy: Destroy) -> None:
    saved(trained, tmp_path / "forge.tar.zst")
    before = versions.list_versions(trained.settings.model_dir)
    toml = (trained.path / "dropforge.toml").read_bytes()
    destroy(trained)
    found = restored(trained, tmp_path / "forge.tar.zst", "--move-aside")
    assert found["copy_of"] is None
    assert (trained.path / "dropforge.toml").read_bytes() == toml
    after = versions.list_versions(trained.settings.model_dir)
    assert [(version.name, version.digest) for version in after] == [
        ("0001", before[0].digest),
        ("0002", after[1].digest),
    ]
    assert [versions.damage(version) for version in after] == [(), ()]
    go_on(trained, "0003")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_backup_brings_everything_back_as_it_was(trained: Root, tmp_path: Path, kind: str) -> None:
    """Content, modes, times and links; made anew: marks, locks, the queue's own file. Not saved: checkpoints and the log."""

    def everything() -> dict[str, object]:
        found: dict[str, object] = {}
        made_anew = {MARK, ".lock", "status.json", "queue.sqlite3", ".staging", ".dataset_metadata.json"}
        for path in sorted(trained.path.rglob("*")):
            name = str(path.relative_to(trained.path))
            if path.name in made_anew or any(part in name for part in ("checkpoint-", "state/logs", ".cleared")):
                continue
            status = path.lstat()
            if path.is_symlink():
                found[name] = os.readlink(path)
            elif path.is_file():
                found[name] = (stat.S_IMODE(status.st_mode), status.st_mtime_ns, path.read_bytes())
            else:
                found[name] = stat.S_IMODE(status.st_mode)
        return found

    (trained.settings.model_dir / "versions" / "0001").chmod(0o750)
    (trained.settings.model_dir / "versions" / "0001" / "adapter_model.safetensors").chmod(0o640)
    shutil.rmtree(trained.path / "base")
    (trained.path / "base").mkdir()
    before = everything()
    saved(trained, tmp_path / kind)
    for part in (trained.settings.state_dir, trained.settings.model_dir, trained.settings.inbox_dir):
        shutil.rmtree(part)
    restored(trained, tmp_path / kind)
    after = everything()
    after.pop(JOURNAL)
    assert after == before
    assert [job.state for job in trained.jobs()] == [JobState.SUCCEEDED, JobState.SUCCEEDED, JobState.QUEUED]
