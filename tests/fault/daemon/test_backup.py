"""What a backup promises: nothing that was queued or trained is lost, whatever became of the root, and nothing half-done is left."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

import guard
from daemon import versions
from daemon.backup import create, plan
from daemon.backup.manifest import MANIFEST_NAME, Manifest, SavedFile, render_manifest
from daemon.backup.plan import ASIDE_PREFIX
from daemon.backup.restore import JOURNAL, execute, plan_restore
from daemon.errors import DropforgeError
from daemon.job import JobState
from daemon.lineage import read_lineage
from daemon.root_identity import MARK
from daemon.version_pruning import execute_prune, list_pruned, plan_prune
from tests.support.root import DROPFORGE, Prepared, Root, environment, wait_until
from tests.support.sound import assert_sound
from tests.support.sound_model import assert_model_dir_sound
from tests.unit.test_versions import candidate

MakeRoot = Callable[..., Root]
Destroy = Callable[[Root], None]
KINDS = ("forge.tar", "forge.tar.gz", "forge.tar.zst", "snapshots")


def rows(name: str) -> list[dict[str, str]]:
    return [{"text": f"{name} {number}"} for number in range(8)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    root = Root(tmp_path_factory.mktemp("prepared") / "root", behaviour={})
    root.configure(inbox={"rescan_seconds": 0.2})
    root.start()
    for name in ("a.jsonl", "b.jsonl"):
        root.drop(name, rows(name))
        assert root.finished(name).state is JobState.SUCCEEDED
    assert root.run("pause").returncode == 0
    root.drop("queued.jsonl", rows("queued"))
    wait_until(lambda: (job := root.job("queued.jsonl")) and job.state is JobState.QUEUED, what="the job to be queued")
    assert root.stop() == 0
    assert root.run("resume").returncode == 0
    return Prepared(root)


@pytest.fixture
def trained(prepared: Prepared) -> Iterator[Root]:
    """A root with two versions and a queued job, whose daemon has stopped."""
    root = prepared.again()
    yield root
    root.close()


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
    assert read_lineage(root.settings.model_dir).broken == ()
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
        made_anew = {MARK, ".lock", "status.json", "in_hand", "queue.sqlite3", ".staging", ".dataset_metadata.json"}
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
    (trained.settings.model_dir / "closed").mkdir(mode=0)
    trained.drop("for_the_group_alone.jsonl", rows("group")).chmod(0o040)
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


# -- while it works


def test_a_backup_during_training_and_dropping_loses_no_file(make_root: MakeRoot, tmp_path: Path) -> None:
    """Each of several backups, taken at any moment: what was dropped whole before is trained, or lies where its job says."""
    root = make_root(behaviour={"*": {"step_seconds": 0.02}})
    root.configure(inbox={"rescan_seconds": 0.2, "on_success": "delete"}, training={"save_steps": 1})
    root.start()
    stop = threading.Event()
    dropped: list[str] = []

    def drop() -> None:
        for number in range(30):
            if stop.wait(0.1):
                return
            name = f"d{number}.jsonl"
            root.drop(name, rows(name), folder=("", "high", "low")[number % 3])
            dropped.append(name)

    dropper = threading.Thread(target=drop)
    dropper.start()
    taken: list[tuple[Path, set[str]]] = []
    try:
        for number in range(5):
            wait_until(lambda number=number: len(dropped) > 4 * number, what="files to be dropped")  # type: ignore[misc]
            before = set(dropped)
            target = tmp_path / ("snapshots" if number % 2 else f"{number}.tar")
            taken.append(
                (Path(saved(root, target, "--base", *(["--checkpoints"] if number % 2 else []))["path"]), before)
            )
    finally:
        stop.set()
        dropper.join()
    assert root.stop() == 0
    for number, (path, before) in enumerate(taken):
        other = make_root(f"restored-{number}")
        shutil.rmtree(other.path)
        restored(other, path)
        assert_nothing_lost(other, before)
    assert other.run("adopt").returncode == 0
    assert other.run("run", "--once").returncode == 0
    trained_names = {job.name for job in other.jobs() if job.state is JobState.SUCCEEDED}
    assert before <= trained_names, f"lost {before - trained_names}"
    assert_nothing_lost(other, before)


def assert_nothing_lost(root: Root, names: set[str]) -> None:
    """Each name is trained, or its file is whole where its job or the inbox has it; versions are one line."""
    waiting = {
        path.name for folder in (".", "high", "low") for path in (root.settings.inbox_dir / folder).glob("*.jsonl")
    }
    for name in names - waiting:
        job = root.job(name)
        assert job is not None, f"{name} is lost"
        if job.state is not JobState.SUCCEEDED:
            assert Path(job.path).read_text().count("\n") == len(rows(name)), f"{job} has no file"
    found = versions.list_versions(root.settings.model_dir)
    assert [version.name for version in found] == [f"{number + 1:04d}" for number in range(len(found))]
    assert [version.record["parent"] for version in found] == [None, *(version.name for version in found)][: len(found)]
    assert len({version.record["dataset"] for version in found}) == len(found), "something was trained twice"
    lineage = read_lineage(root.settings.model_dir)
    assert lineage.broken == ()
    assert lineage.current == (found[-1].name if found else None)
    assert_model_dir_sound(root.settings.model_dir)


@pytest.mark.parametrize("moment", ["_open", "_scan"])
def test_a_version_that_is_pruned_during_a_backup_does_not_fail_it(
    trained: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """While it is copied, or while it is listed: what is saved is the root as it is after that."""
    model_dir = trained.settings.model_dir
    whole = (model_dir / "latest" / "adapter_model.safetensors").read_bytes()
    versions.promote(model_dir, candidate(model_dir, "third", whole), job_id="third", record={"dataset": "c.jsonl"})
    where = create if moment == "_open" else plan._Planner
    real = getattr(where, moment)

    def pruned_at(*arguments: Any) -> Any:
        if any("0001" in str(argument) for argument in arguments) and (model_dir / "versions" / "0001").exists():
            with guard.ModelLock(model_dir, owner="test"):
                execute_prune(model_dir, plan_prune(model_dir, keep=1))
        return real(*arguments)

    monkeypatch.setattr(where, moment, pruned_at)
    made = create.back_up(trained.settings, tmp_path / "forge.tar", options=plan.Options())
    assert [version.name for version in list_pruned(model_dir)] == ["0001"]
    assert made.manifest.versions == ("0002", "0003")
    assert ("version 0001", "it was moved aside by `dropforge versions prune`") in [
        (left.name, left.reason) for left in made.manifest.left_out
    ]


def test_a_version_that_a_person_removed_during_a_backup_fails_it(
    trained: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = create._open

    def removed_at(path: Path, opened: Any) -> int:
        shutil.rmtree(trained.settings.model_dir / "versions" / "0001", ignore_errors=True)
        return real(path, opened)

    monkeypatch.setattr(create, "_open", removed_at)
    with pytest.raises(DropforgeError, match="no such file"):
        create.back_up(trained.settings, tmp_path / "forge.tar", options=plan.Options())
    assert not [*tmp_path.glob("*forge.tar*")]


def test_a_job_whose_checkpoints_were_saved_goes_on_from_them(make_root: MakeRoot, tmp_path: Path) -> None:
    root = make_root(behaviour={"*": {"step_seconds": 0.1}})
    root.configure(training={"save_steps": 1, "max_steps": 40})
    root.start()
    root.drop("a.jsonl", rows("a"))
    root.running("a.jsonl", step=3)
    with_checkpoints = saved(root, tmp_path / "with.tar", "--checkpoints")
    without = saved(root, tmp_path / "without.tar")
    assert with_checkpoints["checkpoints"]
    assert not without["checkpoints"]
    root.kill()
    root.close()
    shutil.move(root.path, tmp_path / "away")
    for name, resumed in (("with.tar", True), ("without.tar", False)):
        found = restored(root, tmp_path / name)
        assert len(found["requeued"]) == 1
        shutil.copytree(tmp_path / "away" / "base", root.path / "base")
        root.behave({})
        done = root.run("run", "--once")
        assert done.returncode == 0, done.stderr
        job = root.job("a.jsonl")
        assert job is not None
        assert job.result is not None
        assert (job.state, bool(job.result.start_step)) == (JobState.SUCCEEDED, resumed)
        assert_sound(root)
        shutil.rmtree(root.path)


def test_a_file_that_is_still_being_written_is_named_and_not_saved_by_half(trained: Root, tmp_path: Path) -> None:
    path = trained.settings.inbox_dir / "slow.jsonl"
    (trained.settings.inbox_dir / "upload.jsonl.part").write_text("{}")
    trained.drop("whole.jsonl", rows("whole"))
    with path.open("w") as writer:
        writer.write('{"text": "the first of ma')
        writer.flush()
        found = saved(trained, tmp_path / "forge.tar")
    left = {item["name"]: item["reason"] for item in found["left_out"]}
    assert left["inbox/slow.jsonl"] == "it is still being written"
    assert "still being written" in left["inbox/upload.jsonl.part"]
    everything_gone(trained)
    restored(trained, tmp_path / "forge.tar")
    assert {entry.name for entry in trained.settings.inbox_dir.glob("*.*") if entry.name != MARK} == {"whole.jsonl"}
    assert trained.run("run", "--once").returncode == 0
    assert trained.finished("whole.jsonl").state is JobState.SUCCEEDED


# -- what a restore meets


def test_an_older_backup_over_newer_versions_uses_no_number_twice(trained: Root, tmp_path: Path) -> None:
    saved(trained, tmp_path / "forge.tar")
    assert trained.run("run", "--once").returncode == 0, "the queued job becomes 0003"
    trained.drop("waits.jsonl", rows("waits"))
    refused = trained.run("restore", str(tmp_path / "forge.tar"))
    assert refused.returncode == 1
    assert "is not empty" in refused.stderr
    assert "has 3 versions, up to 0003" in refused.stderr
    assert "--move-aside" in refused.stderr
    looked = json.loads(trained.run("restore", str(tmp_path / "forge.tar"), "--dry-run", "--json").stdout)
    assert not looked["restored"]
    assert len(versions.list_versions(trained.settings.model_dir)) == 3, "nothing was changed"
    found = restored(trained, tmp_path / "forge.tar", "--move-aside")
    assert found["newer"]["versions"] == looked["newer"]["versions"] == ["0003"]
    assert [job["name"] for job in found["newer"]["jobs"]] == ["queued.jsonl"]
    assert found["newer"]["dropped"] == ["inbox/waits.jsonl"]
    moved = [Path(item["moved_to"]) for item in found["in_the_way"]]
    assert all(path.name.startswith(ASIDE_PREFIX) and path.is_dir() for path in moved)
    assert next(trained.settings.inbox_dir.glob(f"{ASIDE_PREFIX}*/waits.jsonl")).exists()
    journal = [json.loads(line) for line in (trained.path / JOURNAL).read_text().splitlines()]
    assert [line["event"] for line in journal] == ["begun", "finished"]
    assert set(journal[0]["moved_aside"].values()) == {str(path) for path in moved}
    assert [version.name for version in versions.list_versions(trained.settings.model_dir)] == ["0001", "0002"]
    go_on(trained, "0004")


def test_an_older_backup_of_before_the_first_version_uses_no_number_twice(make_root: MakeRoot, tmp_path: Path) -> None:
    root = make_root(behaviour={})
    assert root.run("run", "--once").returncode == 0
    saved(root, tmp_path / "forge.tar")
    root.drop("a.jsonl", rows("a"))
    assert root.run("run", "--once").returncode == 0
    restored(root, tmp_path / "forge.tar", "--move-aside")
    root.drop("queued.jsonl", rows("queued"))
    go_on(root, "0002")


def test_where_a_daemon_lives_nothing_is_restored(trained: Root, tmp_path: Path) -> None:
    trained.start()
    saved(trained, tmp_path / "forge.tar")
    for options in ((), ("--move-aside",), ("--dry-run",)):
        refused = trained.run("restore", str(tmp_path / "forge.tar"), *options)
        assert refused.returncode == 5, refused.stderr
        assert "a daemon lives there" in refused.stderr
    assert trained.stop() == 0
    go_on(trained, "0003") if trained.job("queued.jsonl").state is JobState.QUEUED else assert_sound(trained)  # type: ignore[union-attr]


def test_a_root_beside_the_one_that_was_saved_trains_nothing_until_it_is_adopted(
    trained: Root, make_root: MakeRoot, tmp_path: Path
) -> None:
    saved(trained, tmp_path / "forge.tar", "--base")
    other = make_root("other")
    shutil.rmtree(other.path)
    done = trained.run("restore", str(tmp_path / "forge.tar"), "--root", str(other.path))
    assert done.returncode == 0, done.stderr
    assert "two roots have one id" in done.stdout
    assert "adopt" in done.stdout
    other.start()
    told = wait_until(
        lambda: reason if "adopt" in (reason := str((other.status() or {}).get("reason"))) else "", what="the hold"
    )
    assert "two roots of one id" in told
    assert other.job("queued.jsonl").state is JobState.QUEUED  # type: ignore[union-attr]
    assert other.run("adopt").returncode == 0
    assert other.finished("queued.jsonl").version == "0003"
    assert other.stop() == 0
    ids = {json.loads((root.path / "state" / MARK).read_text())["root"] for root in (trained, other)}
    assert len(ids) == 2
    assert_sound(other)
    go_on(trained, "0003")


def test_a_root_whose_origin_is_gone_keeps_its_id(trained: Root, make_root: MakeRoot, tmp_path: Path) -> None:
    saved(trained, tmp_path / "forge.tar", "--base")
    root_id = json.loads((trained.path / "state" / MARK).read_text())["root"]
    trained.path.rename(tmp_path / "retired")
    other = make_root("other")
    shutil.rmtree(other.path)
    assert restored(other, tmp_path / "forge.tar")["copy_of"] is None
    assert json.loads((other.path / "state" / MARK).read_text())["root"] == root_id
    shutil.copy(tmp_path / "retired" / "behaviour.json", trained.path.parent / "behaviour.json")
    trained.path.mkdir()
    shutil.move(trained.path.parent / "behaviour.json", trained.path / "behaviour.json")  # which the settings name
    go_on(other, "0003")


def test_a_root_that_was_renamed_trains_what_was_queued_before(trained: Root, tmp_path: Path) -> None:
    """The queue, the recipe and the source name places of the old root: they follow it, as does the base model in it."""
    other = tmp_path / "renamed"
    trained.path.rename(other)
    trained.path.mkdir()
    shutil.copy(other / "behaviour.json", trained.path / "behaviour.json")  # which the settings name in full
    trained.path = other
    go_on(trained, "0003")
    job = trained.job("queued.jsonl")
    assert job is not None
    assert job.recipe is not None
    assert job.recipe["model"]["model_name_or_path"] == str(other / "base")
    assert job.source == str(other / "inbox" / "queued.jsonl")


def test_what_is_no_whole_root_is_not_backed_up_over_a_good_backup(trained: Root, tmp_path: Path) -> None:
    saved(trained, tmp_path / "forge.tar")
    good = (tmp_path / "forge.tar").read_bytes()
    content = trained.settings.store_path.read_bytes()
    for destroy, word in (
        (latest_dangling, "which is no version"),
        (queue_empty, "the queue is lost or empty"),
        (queue_missing, "the queue is lost or empty"),
        (model_emptied, "carries no mark of this root"),
        (state_gone, "is missing, and was there before"),
    ):
        destroy(trained)
        refused = trained.run("backup", str(tmp_path / "forge.tar"))
        assert refused.returncode == 1
        assert word in refused.stderr
        assert (tmp_path / "forge.tar").read_bytes() == good
        if destroy is latest_dangling:
            (trained.settings.model_dir / "latest").unlink()
            (trained.settings.model_dir / "latest").symlink_to("versions/0002")
        elif destroy is queue_missing:
            trained.settings.store_path.write_bytes(content)
    assert [path.name for path in tmp_path.iterdir() if "forge" in path.name] == ["forge.tar"]


def test_a_version_that_is_damaged_already_is_told_at_the_backup(trained: Root, tmp_path: Path) -> None:
    adapter_bits_flipped(trained)
    found = saved(trained, tmp_path / "forge.tar", code=1)
    assert found["warnings"] == ["version 0002: adapter_model.safetensors is not the file that was promoted"]
    assert (tmp_path / "forge.tar").exists()


@pytest.mark.parametrize("where", ["inbox", "current_model", "state", "inbox/high"])
def test_a_backup_into_a_part_of_the_root_is_refused(trained: Root, where: str) -> None:
    for name in ("forge.tar", "snapshots"):
        refused = trained.run("backup", str(trained.path / where / name))
        assert refused.returncode == 2
        assert "lies inside" in refused.stderr
        assert not (trained.path / where / name).exists()


@pytest.mark.parametrize("name", ["forge.zip", "forge.tar.xz", "forge.gz", "forge.tar.bz2"])
def test_a_name_of_another_kind_of_archive_is_refused(trained: Root, tmp_path: Path, name: str) -> None:
    refused = trained.run("backup", str(tmp_path / name))
    assert refused.returncode == 2
    assert ".tar.zst" in refused.stderr
    assert not (tmp_path / name).exists()


def test_what_cannot_be_read_is_named_and_nothing_is_written(trained: Root, tmp_path: Path) -> None:
    through = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    if through and subprocess.run([*through, "true"], check=False, capture_output=True).returncode:
        pytest.skip("a command whom modes bind cannot be started here")
    path = trained.settings.model_dir / "versions" / "0001" / "adapter_config.json"
    path.chmod(0)
    command = [*through, *DROPFORGE, "--root", str(trained.path), "backup", str(tmp_path / "forge.tar")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 1
    assert f"cannot back up {path}: permission denied" in done.stderr
    assert not list(tmp_path.glob("*forge*"))


# -- snapshots


def test_a_snapshot_keeps_once_what_an_earlier_one_has(trained: Root, tmp_path: Path) -> None:
    first = Path(saved(trained, tmp_path / "snapshots")["path"])
    assert trained.run("run", "--once").returncode == 0
    second = Path(saved(trained, tmp_path / "snapshots")["path"])
    weights = "current_model/versions/0001/adapter_model.safetensors"
    assert (first / weights).samefile(second / weights)
    live = trained.settings.model_dir / "versions" / "0001" / "adapter_model.safetensors"
    assert not live.samefile(first / weights), "damage in the root would be damage in the backup"
    job = trained.job("queued.jsonl")
    assert job is not None
    moved = (f"inbox/processing/{job.id}/queued.jsonl", f"inbox/done/{job.id}/queued.jsonl")
    assert (first / moved[0]).samefile(second / moved[1])
    shutil.rmtree(first)
    everything_gone(trained)
    restored(trained, tmp_path / "snapshots")
    assert trained.job("queued.jsonl").version == "0003"  # type: ignore[union-attr]


def test_a_damaged_file_of_an_earlier_snapshot_is_not_used_again(trained: Root, tmp_path: Path) -> None:
    first = Path(saved(trained, tmp_path / "snapshots")["path"])
    weights = "current_model/versions/0001/adapter_model.safetensors"
    (first / weights).write_bytes(b"x" * (first / weights).stat().st_size)
    second = Path(saved(trained, tmp_path / "snapshots")["path"])
    assert not (first / weights).samefile(second / weights)
    everything_gone(trained)
    assert "is not as it was saved" in trained.run("restore", str(first)).stderr
    restored(trained, second)
    go_on(trained, "0003")


# -- a backup that is not what it says


@pytest.fixture(scope="module")
def good_tar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("good")
    root = Root(folder / "root", behaviour={})
    root.drop("a.jsonl", rows("a"))
    assert root.run("run", "--once").returncode == 0
    saved(root, folder / "forge.tar")
    yield folder / "forge.tar"
    root.close()


def refused(source: Path, into: Path) -> str:
    """What a restore says that refuses, having made nothing."""
    with pytest.raises(DropforgeError) as told:
        execute(plan_restore(into, source), move_aside=True)
    assert not into.exists()
    return str(told.value)


def test_a_backup_that_was_cut_short_or_changed_anywhere_is_refused(good_tar: Path, tmp_path: Path) -> None:
    whole = good_tar.read_bytes()
    step = max(1, len(whole) // 60)
    unseen = 0
    for at in range(0, len(whole), step):
        (tmp_path / "cut.tar").write_bytes(whole[:at])
        if whole[at:].strip(b"\0"):  # else only the tar file's padding is missing
            assert refused(tmp_path / "cut.tar", tmp_path / "root")
        flipped = bytearray(whole)
        flipped[at] ^= 1
        (tmp_path / "flipped.tar").write_bytes(flipped)
        try:
            plan_restore(tmp_path / "root", tmp_path / "flipped.tar")
        except DropforgeError:
            continue
        unseen += 1  # padding, or a tar header's field that a restore does not use
    assert unseen < 20
    assert not (tmp_path / "root").exists()


Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", link: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, link, len(content), 0o644
    return info, content


def hostile(
    path: Path, *extra: Member, files: dict[str, bytes] | None = None, links: dict[str, str] | None = None
) -> Path:
    """A tar file with a sound manifest of its own over what it is told to hold, and further members."""
    contents = files or {}
    found = {
        name: SavedFile(size_bytes=len(content), blake3=blake3(content).hexdigest(), mode=0o644, mtime_ns=0)
        for name, content in contents.items()
    }
    folders = dict.fromkeys(("state", "current_model", "inbox"), 0o755)
    for name in (*contents, *(links or {})):
        for parent in list(Path(name).parents)[:-1]:
            folders.setdefault(str(parent), 0o755)
    manifest = Manifest(
        root_id="0" * 32,
        root="/somewhere",
        created_at="2026-01-01T00:00:00.000Z",
        program="?",
        current_version=None,
        newest_version=0,
        jobs={},
        with_checkpoints=False,
        files=found,
        folders=folders,
        links=links or {},
    )
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        members = [member(name, tarfile.DIRTYPE) for name in folders]
        members += [member(name, content=content) for name, content in contents.items()]
        members += [member(name, tarfile.SYMTYPE, link=target) for name, target in (links or {}).items()]
        for info, content in (*members, *extra, member(MANIFEST_NAME, content=render_manifest(manifest))):
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    "make",
    [
        lambda path: hostile(path, files={"inbox/../../evil": b"x"}),
        lambda path: hostile(path, files={"/tmp/evil": b"x"}),
        lambda path: hostile(path, files={"inbox//evil": b"x"}),
        lambda path: hostile(path, files={"etc/evil": b"x"}),
        lambda path: hostile(path, links={"inbox/evil": "/etc"}),
        lambda path: hostile(path, links={"inbox/evil": "../../etc"}),
        lambda path: hostile(path, links={"inbox/down": "high", "inbox/evil": "down/../../etc"}),
        lambda path: hostile(path, links={"inbox/evil": "high"}, files={"inbox/evil/x": b"x"}),
        lambda path: hostile(path, links={"state": "inbox"}),
        lambda path: hostile(path, member("inbox/evil", tarfile.LNKTYPE, link="/etc/passwd")),
        lambda path: hostile(path, member("inbox/evil", tarfile.CHRTYPE)),
        lambda path: hostile(path, member("inbox/evil", tarfile.FIFOTYPE)),
        lambda path: hostile(path, member("inbox/unnamed", content=b"x")),
        lambda path: hostile(path, member("../evil", content=b"x")),
        lambda path: hostile(path, member("inbox/evil", tarfile.SYMTYPE, link="/etc")),
        lambda path: hostile(path, member("inbox/a", content=b"y"), files={"inbox/a": b"x"}),
    ],
)
def test_a_hostile_backup_is_refused_before_anything_is_written(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    told = refused(make(tmp_path / "hostile.tar"), tmp_path / "root")
    assert "hostile.tar" in told
    assert "Traceback" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.tar"]


def test_the_hostile_backups_are_refused_for_what_is_hostile_in_them(tmp_path: Path) -> None:
    """The same without it is taken."""
    path = hostile(tmp_path / "sound.tar", files={"inbox/a.jsonl": b"x"}, links={"current_model/a": "latest/a"})
    execute(plan_restore(tmp_path / "root", path), move_aside=False)
    assert (tmp_path / "root" / "inbox" / "a.jsonl").read_bytes() == b"x"
    assert os.readlink(tmp_path / "root" / "current_model" / "a") == "latest/a"


@pytest.mark.parametrize(
    "content", [b"", b"no tar", b"\x1f\x8b\x08\x00garbage", b"\x28\xb5\x2f\xfdgarbage", bytes(10240)]
)
def test_what_is_no_backup_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    assert "x.tar" in refused(tmp_path / "x.tar", tmp_path / "root")
    (tmp_path / "folder").mkdir()
    assert "there is no backup in this folder" in refused(tmp_path / "folder", tmp_path / "root")
    assert "there is no such file" in refused(tmp_path / "missing.tar", tmp_path / "root")


def test_links_out_of_the_root_are_named_and_not_followed(trained: Root, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a secret")
    (trained.settings.model_dir / "notes").symlink_to(tmp_path / "secret")
    (trained.settings.inbox_dir / "elsewhere").symlink_to(tmp_path)
    found = saved(trained, tmp_path / "forge.tar")
    left = {item["name"] for item in found["left_out"]}
    assert {"current_model/notes", "inbox/elsewhere"} <= left
    assert b"a secret" not in (tmp_path / "forge.tar").read_bytes()


def test_names_of_any_bytes_come_back(trained: Root, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xe2\x98\x95\n'\".jsonl")
    (trained.settings.inbox_dir / "low").mkdir(exist_ok=True)
    (trained.settings.inbox_dir / "low" / name).write_text('{"text": "x"}\n')
    for target in ("forge.tar", "snapshots"):
        saved(trained, tmp_path / target)
        restored(trained, tmp_path / target, "--move-aside")
        assert (trained.settings.inbox_dir / "low" / name).read_text() == '{"text": "x"}\n'


def test_a_memory_is_saved_with_what_describes_it_first(trained: Root, tmp_path: Path) -> None:
    """Its files only grow: what meta.json says of them is true of copies that were made after it."""
    folder = trained.settings.state_dir / "memory" / ("0" * 32)
    folder.mkdir(parents=True)
    for name in ("held_out.idx", "meta.json", "rows.jsonl"):
        (folder / name).write_text(name)
    (folder.parent / "key").write_text("a key")
    saved(trained, tmp_path / "forge.tar")
    with tarfile.open(tmp_path / "forge.tar") as tar:
        names = [Path(name).name for name in tar.getnames() if f"memory/{folder.name}/" in name]
    assert names == ["meta.json", "held_out.idx", "rows.jsonl"]
    state_gone(trained)
    restored(trained, tmp_path / "forge.tar", "--move-aside")
    assert (folder / "rows.jsonl").read_text() == "rows.jsonl"
    assert (folder.parent / "key").read_text() == "a key"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_root_restores_belongs_to_the_owner_of_the_root(trained: Root, tmp_path: Path) -> None:
    saved(trained, tmp_path / "forge.tar")
    everything_gone(trained)
    os.chown(trained.path, 65534, 65534)
    restored(trained, tmp_path / "forge.tar")
    made = [
        trained.path / "dropforge.toml",
        *(path for top in ("state", "current_model", "inbox") for path in (trained.path / top).rglob("*")),
    ]
    assert len(made) > 20
    assert {path.lstat().st_uid for path in made} == {65534}
