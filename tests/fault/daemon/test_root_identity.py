"""The parts of a root know one another: what is lost, emptied, foreign or older holds the queue, and nothing takes its place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon import recovery, versions
from daemon.job import JobState
from daemon.lineage import read_lineage
from daemon.root_identity import MARK
from tests.support.root import Prepared, Root, wait_until
from tests.support.sound import assert_sound

MakeRoot = Callable[..., Root]
Break = Callable[[Root], None]
ROWS = [{"text": f"row {number}"} for number in range(8)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    root = Root(tmp_path_factory.mktemp("prepared") / "root", behaviour={})
    root.configure(inbox={"rescan_seconds": 0.2})
    root.start()
    root.drop("a.jsonl", ROWS)
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED
    assert root.stop() == 0
    return Prepared(root)


@pytest.fixture
def trained(prepared: Prepared) -> Iterator[Root]:
    """A root with one version, whose daemon has stopped."""
    root = prepared.again()
    yield root
    root.close()


def other_rows(root: Root, name: str) -> None:
    root.drop(name, [{"text": f"{name} {number}"} for number in range(8)])


def held(root: Root) -> str:
    """Wait until status tells of something that does not fit; returns all that it says."""

    def told() -> str:
        status = root.status() or {}
        text = json.dumps([status.get("reason"), status.get("warnings")])
        return text if "dropforge adopt" in text or "dropforge rollback" in text else ""

    return wait_until(told, what="the queue to be held")


def move_model_away(root: Root) -> None:
    root.settings.model_dir.rename(root.path / "elsewhere")


def empty_model(root: Root) -> None:
    shutil.rmtree(root.settings.model_dir)
    root.settings.model_dir.mkdir()


def another_roots_model(root: Root) -> None:
    mark = json.loads((root.settings.model_dir / MARK).read_text())
    (root.settings.model_dir / MARK).write_text(json.dumps({**mark, "root": "0" * 32}))


def older_model(root: Root) -> None:
    """A copy of before the version was made."""
    keep = (root.settings.model_dir / MARK).read_text()
    empty_model(root)
    (root.settings.model_dir / MARK).write_text(keep)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (move_model_away, "is missing, and was there before"),
        (empty_model, "carries no mark of this root"),
        (another_roots_model, "belongs to another root"),
        (older_model, "is older than the queue"),
    ],
)
def test_a_model_directory_that_is_not_ours_holds_the_queue_and_nothing_is_made_in_its_place(
    trained: Root, damage: Break, says: str
) -> None:
    damage(trained)
    before = sorted(trained.path.rglob("*")) if not trained.settings.model_dir.exists() else None
    trained.start()
    trained.drop("b.jsonl", [{"text": "another row"}] * 8)
    assert says in held(trained)
    assert before is None or not trained.settings.model_dir.exists()
    assert trained.events("job.started") == [event for event in trained.events("job.started") if event["attempt"] == 1]
    assert len(trained.events("job.started")) == 1, "only the first job of all has run"
    adopted = trained.run("adopt")
    assert adopted.returncode == 0, adopted.stderr
    job = trained.finished("b.jsonl")
    assert job.state is JobState.SUCCEEDED
    assert trained.stop() == 0


def test_a_model_directory_that_comes_back_is_gone_on_with(trained: Root) -> None:
    move_model_away(trained)
    trained.start()
    trained.drop("b.jsonl", [{"text": "another row"}] * 8)
    held(trained)
    (trained.path / "elsewhere").rename(trained.settings.model_dir)
    job = trained.finished("b.jsonl")
    assert (job.state, job.version) == (JobState.SUCCEEDED, "0002")
    assert trained.stop() == 0
    assert_sound(trained)


def test_a_lost_inbox_loses_no_job(make_root: MakeRoot) -> None:
    """Claimed and queued files are not said to be gone while the folder that held them is."""
    root = make_root(behaviour={})
    root.configure(inbox={"rescan_seconds": 0.2})
    root.start()
    assert root.run("pause").returncode == 0
    root.drop("a.jsonl", ROWS)
    wait_until(lambda: (job := root.job("a.jsonl")) is not None and job.state is JobState.QUEUED, what="the job")
    assert root.stop() == 0
    away = root.path / "elsewhere"
    root.settings.inbox_dir.rename(away)
    assert root.run("resume").returncode == 0
    root.start()
    assert "is missing" in held(root)
    assert not root.settings.inbox_dir.exists()
    away.rename(root.settings.inbox_dir)
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED
    assert root.stop() == 0
    assert_sound(root)


def test_a_lost_state_is_told_and_not_replaced(trained: Root) -> None:
    away = trained.path / "elsewhere"
    trained.settings.state_dir.rename(away)
    ran = trained.run("run", "--once")
    assert ran.returncode == 1
    assert "is missing, and was there before" in ran.stderr
    assert not trained.settings.state_dir.exists()
    away.rename(trained.settings.state_dir)
    assert trained.run("run", "--once").returncode == 0
    assert_sound(trained)


def test_a_state_that_is_deleted_ends_the_daemon_with_a_sentence(trained: Root) -> None:
    """It would go on over a database that nobody sees, and a second daemon could start beside it."""
    daemon = trained.start()
    shutil.rmtree(trained.settings.state_dir)
    assert daemon.wait(30) == 1
    assert "was deleted or replaced while the daemon ran" in trained.errors()


@pytest.mark.parametrize("lost", ["missing", "empty"])
def test_a_lost_queue_is_rebuilt_and_nothing_is_trained_again(trained: Root, lost: str) -> None:
    for suffix in ("", "-wal", "-shm"):
        trained.settings.store_path.with_name(trained.settings.store_path.name + suffix).unlink(missing_ok=True)
    if lost == "empty":
        trained.settings.store_path.touch()
    trained.start()
    trained.drop("again.jsonl", ROWS)
    assert trained.finished("again.jsonl").duplicate_of is not None
    assert trained.stop() == 0
    assert [version.name for version in versions.list_versions(trained.settings.model_dir)] == ["0001"]
    assert trained.events("store.rebuilt")


def test_a_command_that_meets_an_emptied_queue_leaves_its_loss_to_be_noticed(trained: Root) -> None:
    """Opened, it would become a sound queue without jobs, and what was trained would be trained again."""
    trained.settings.store_path.write_bytes(b"")
    for command in (("jobs",), ("pause",), ("rollback", "1"), ("check", str(trained.settings.root / "dropforge.toml"))):
        trained.run(*command)
        assert trained.settings.store_path.stat().st_size == 0, command
    assert "it is empty: what it held is lost" in trained.run("jobs").stderr
    trained.drop("again.jsonl", ROWS)
    assert trained.run("run", "--once").returncode == 0
    assert trained.finished("again.jsonl").duplicate_of is not None
    assert trained.events("store.rebuilt")


def test_an_older_queue_is_brought_forward_from_the_lineage(make_root: MakeRoot) -> None:
    """A database of before two jobs ended: neither is trained or promoted again, and `latest` stays where it was."""
    root = make_root(behaviour={})
    root.start()
    assert root.run("pause").returncode == 0
    for name in ("a.jsonl", "b.jsonl"):
        other_rows(root, name)
        wait_until(lambda name=name: (job := root.job(name)) is not None and job.state is JobState.QUEUED, what=name)
    assert root.stop() == 0
    old = root.settings.store_path.read_bytes()
    assert root.run("resume").returncode == 0
    assert root.run("run", "--once").returncode == 0
    lineage = (root.settings.model_dir / "lineage.jsonl").read_bytes()
    for suffix in ("-wal", "-shm"):
        root.settings.store_path.with_name(root.settings.store_path.name + suffix).unlink(missing_ok=True)
    root.settings.store_path.write_bytes(old)
    assert root.run("resume").returncode == 0
    assert root.run("run", "--once").returncode == 0
    assert [job.version for job in root.jobs()] == ["0001", "0002"]
    assert (root.settings.model_dir / "lineage.jsonl").read_bytes() == lineage
    assert os.readlink(root.settings.model_dir / "latest") == "versions/0002"
    assert len(root.events("job.brought_forward")) == 2
    assert_sound(root)


def test_latest_is_brought_back_from_the_lineage(trained: Root) -> None:
    (trained.settings.model_dir / "latest").unlink()
    trained.drop("b.jsonl", [{"text": "another row"}] * 8)
    assert trained.run("run", "--once").returncode == 0
    assert [version.record["parent"] for version in versions.list_versions(trained.settings.model_dir)] == [
        None,
        "0001",
    ]
    assert trained.events("version.latest_repaired")
    assert_sound(trained)


def test_a_current_version_that_is_gone_holds_the_queue_and_keeps_its_number(trained: Root) -> None:
    trained.drop("b.jsonl", [{"text": "another row"}] * 8)
    assert trained.run("run", "--once").returncode == 0
    gone = trained.settings.model_dir / "versions" / "0002"
    shutil.rmtree(gone)
    trained.start()
    other_rows(trained, "c.jsonl")
    assert "which is no version" in held(trained)
    assert trained.run("rollback", "1").returncode == 0
    job = trained.finished("c.jsonl")
    assert (job.state, job.version) == (JobState.SUCCEEDED, "0003"), "a number is used once"
    assert trained.stop() == 0


def test_a_store_is_set_aside_whole_whatever_comes_in_between(trained: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between the renames must not leave a database without its log, which would look sound and be older."""
    path = trained.settings.store_path
    path.with_name(path.name + "-wal").write_bytes(b"what only the log knows")
    real = Path.rename

    def crash(self: Path, target: Path) -> Path:
        real(self, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        recovery.set_aside(path)
    monkeypatch.undo()
    assert trained.run("run", "--once").returncode == 0
    aside = {entry.name for entry in path.parent.glob("queue.sqlite3.unreadable-*")}
    assert len(aside) == 2
    assert {name.removesuffix("-wal") for name in aside} == {min(aside)}
    assert trained.events("store.rebuilt")


def test_a_lineage_that_was_edited_is_found(trained: Root) -> None:
    model_dir = trained.settings.model_dir
    trained.drop("b.jsonl", [{"text": "another row"}] * 8)
    assert trained.run("run", "--once").returncode == 0
    assert read_lineage(model_dir).broken == ()
    path = model_dir / "lineage.jsonl"
    path.write_text(path.read_text().replace('"a.jsonl"', '"z.jsonl"'))
    assert read_lineage(model_dir).broken == ("line 2 of lineage.jsonl does not follow from the line before it",)
