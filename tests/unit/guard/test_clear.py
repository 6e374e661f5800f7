"""Clearing, restoring, purging: planned first, all or nothing, never outside, never what a run still
needs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import guard
from guard import Verdict, VerdictCause
from tests.support.sound_model import assert_model_dir_sound
from tests.unit.guard.conftest import as_user, make_checkpoint, make_fingerprint

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
EVERYTHING = Verdict(cause=VerdictCause.REQUESTED, reasons=("dataset.digest: a -> b",))


def lock(folder: Path) -> guard.ModelLock:
    return guard.ModelLock(folder, owner="test")


def clear_all(folder: Path, reason: str = "test", now: datetime | None = None) -> guard.ClearResult:
    with lock(folder):
        return guard.plan_clear(folder, verdict=EVERYTHING, reason=reason, now=now).execute()


def content(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below the folder, but for the lock."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if (path.is_symlink() or path.is_file()) and path.name != ".lock"
    }


def test_a_plan_prints_what_why_bytes_and_where_and_changes_nothing(model_dir: Path) -> None:
    before = content(model_dir)
    (model_dir / "checkpoint-77").symlink_to("checkpoint-10")
    plan = guard.plan_clear(model_dir, verdict=EVERYTHING, reason="Dataset changed!", now=NOW)
    text = str(plan)
    assert "checkpoint-10" in text
    assert f"{plan.size_bytes:,} bytes" in text
    assert "because dataset.digest: a -> b" in text
    assert str(model_dir / ".cleared" / "20261123T120000Z-dataset-changed") in text
    assert "left alone: checkpoint-77: it is a symbolic link" in text
    assert plan.size_bytes == sum(move.size_bytes for move in plan.moves)
    assert [move.source for move in plan.moves] == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]
    assert json.loads(json.dumps(plan.to_json()))["set"] == "20261123T120000Z-dataset-changed"
    (model_dir / "checkpoint-77").unlink()
    assert content(model_dir) == before


def test_it_is_executed_once_under_the_lock(model_dir: Path) -> None:
    plan = guard.plan_clear(model_dir, verdict=EVERYTHING)
    with pytest.raises(guard.NotLocked):
        plan.execute()
    told: list[str] = []

    class Log:
        def info(self, event: str, /) -> None:
            told.append(event)

    with lock(model_dir):
        result = plan.execute(Log())
        assert result.cleared == 3
        assert result.size_bytes == plan.size_bytes
        assert result.set_path == plan.set_path
        with pytest.raises(guard.ClearRefused, match="executed already"):
            plan.execute()
    assert told == [f"cleared 3 checkpoints ({plan.size_bytes:,} bytes) to {plan.set_path}"]
    journal = [json.loads(line) for line in (model_dir / ".cleared" / "journal.jsonl").read_text().splitlines()]
    assert [entry["event"] for entry in journal] == ["clear.begun", "clear.done"]
    assert_model_dir_sound(model_dir)


def test_a_run_that_can_be_resumed_keeps_its_checkpoints(model_dir: Path) -> None:
    """Without a verdict the metadata speaks: only what is not the run's own is planned."""
    make_checkpoint(model_dir / "checkpoint-25", 25)
    (model_dir / "checkpoint-30" / "optimizer.pt").unlink()
    plan = guard.plan_clear(model_dir)
    assert [move.source for move in plan.moves] == ["checkpoint-25", "checkpoint-30"]
    assert plan.protected == model_dir / "checkpoint-20"
    assert "kept: checkpoint-20, the newest intact checkpoint of the run in progress" in str(plan)
    assert any("checkpoint-30 is altered: optimizer.pt is missing" in why for why in plan.why)


def test_what_is_protected_must_be_worth_it(model_dir: Path) -> None:
    """A flip that only the digest shows: the checkpoint before is the one to protect."""
    path = model_dir / "checkpoint-30" / "adapter_config.json"
    path.write_bytes(path.read_bytes().replace(b"8", b"9"))
    assert guard.plan_clear(model_dir).protected == model_dir / "checkpoint-20"


def test_the_last_intact_checkpoint_of_the_run_in_progress_cannot_be_slipped_in(model_dir: Path) -> None:
    """Not even into a plan that was made by hand."""
    stale = guard.plan_clear(model_dir, verdict=EVERYTHING)
    protecting = guard.plan_clear(model_dir)
    protecting.moves = stale.moves
    before = content(model_dir)
    with lock(model_dir), pytest.raises(guard.ClearRefused, match="last intact checkpoint"):
        protecting.execute()
    assert content(model_dir) == before


def test_versions_and_everything_else_are_out_of_reach(model_dir: Path) -> None:
    for name in ("versions/0001/checkpoint-5", "runs/checkpoint-7", "checkpoint-old"):
        make_checkpoint(model_dir / name, 5)
    (model_dir / "latest").symlink_to("versions/0001")
    clear_all(model_dir)
    for name in ("versions/0001/checkpoint-5", "runs/checkpoint-7", "checkpoint-old", "latest/checkpoint-5"):
        assert (model_dir / name / "optimizer.pt").exists()


@pytest.mark.parametrize("where", ["checkpoint-99", ".staging/leftover", ".staging/trash-link"])
def test_symlinks_are_never_followed(model_dir: Path, tmp_path: Path, where: str) -> None:
    outside = make_checkpoint(tmp_path / "outside" / "checkpoint-99", 99)
    before = content(outside)
    (model_dir / where).symlink_to(outside)
    clear_all(model_dir)
    assert content(outside) == before
    inside = [path for path in model_dir.rglob(Path(where).name) if path.is_symlink()]
    # Named like a checkpoint: left alone. Left in staging: moved as the link that it is. Trash: gone, the
    # link alone.
    assert len(inside) == (0 if "trash" in where else 1)


@pytest.mark.parametrize("name", [".cleared", ".staging"])
def test_folders_of_the_guard_that_lead_outside_are_refused(model_dir: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").mkdir()
    if (model_dir / name).exists():
        shutil.rmtree(model_dir / name)
    (model_dir / name).symlink_to(tmp_path / "outside")
    before = content(model_dir)
    with lock(model_dir), pytest.raises(guard.GuardError, match="symbolic link"):
        guard.plan_clear(model_dir, verdict=EVERYTHING).execute()
    assert content(model_dir) == before
    assert list((tmp_path / "outside").iterdir()) == []


def swap_for_symlink(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def swap_for_another(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    make_checkpoint(path, 20)


@pytest.mark.parametrize("change", [shutil.rmtree, swap_for_symlink, swap_for_another])
def test_a_directory_that_changed_since_the_plan_is_not_cleared(
    model_dir: Path, change: Callable[[Path], None]
) -> None:
    plan = guard.plan_clear(model_dir, verdict=EVERYTHING)
    change(model_dir / "checkpoint-20")
    before = content(model_dir)
    with lock(model_dir), pytest.raises(guard.ClearRefused) as error:
        plan.execute()
    assert error.value.hint == "plan again"
    assert content(model_dir) == before


@pytest.mark.parametrize("note", [{}, {"training.save_steps": 99}], ids=["same", "with another note"])
def test_the_set_of_a_finished_run_says_that_it_finished(model_dir: Path, note: dict[str, Any]) -> None:
    """Also when something differs that does not matter."""
    with lock(model_dir):
        guard.mark_finished(model_dir, "0007")
    recorded = guard.read_metadata(model_dir).run.fingerprint  # type: ignore[union-attr]
    again = guard.Fingerprint({**recorded.components, **note})
    verdict = guard.assess(model_dir, fingerprint=again)
    assert guard.plan_clear(model_dir, verdict=verdict, now=NOW).set_path.name == "20261123T120000Z-run-finished"


def test_a_failure_half_way_puts_everything_back(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(model_dir)
    plan = guard.plan_clear(model_dir, verdict=EVERYTHING)
    real, count = os.rename, 0

    def rename(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with lock(model_dir), pytest.raises(guard.ClearRefused, match="input/output error") as error:
        plan.execute()
    assert "system log" in error.value.hint
    assert content(model_dir) == before
    assert not (model_dir / ".cleared").exists()


@contextmanager
def owned(path: Path, uid: int) -> Iterator[None]:
    for item in [path, *path.rglob("*")]:
        os.chown(item, uid, uid, follow_symlinks=False)
    yield


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
@pytest.mark.parametrize("how", ["foreign checkpoint", "read-only model directory", "read-only checkpoint"])
def test_what_may_not_be_moved_gives_one_clear_error(open_tmp_path: Path, how: str) -> None:
    """Run as nobody: one error that says what to do, and everything as it was."""
    folder = open_tmp_path / "model"
    for step in (1, 2):
        make_checkpoint(folder / f"checkpoint-{step}", step)
    with owned(folder, 65_534):
        pass
    if how == "foreign checkpoint":
        os.chown(folder / "checkpoint-2", 0, 0)
    elif how == "read-only checkpoint":
        (folder / "checkpoint-2").chmod(0o555)
    (folder / ".lock").touch()
    os.chown(folder / ".lock", 65_534, 65_534)
    if how == "read-only model directory":
        folder.chmod(0o555)
    before = content(folder)

    def act() -> str:
        with lock(folder):
            try:
                guard.plan_clear(folder).execute()
            except guard.ClearRefused as error:
                return str(error)
        return "cleared"

    said = as_user(65_534, act)
    assert said.startswith(f"cannot clear {folder}: ")
    assert ("belongs to user 0, and we are 65534" in said) == (how == "foreign checkpoint")
    assert ("is not writable" in said) == (how != "foreign checkpoint")
    assert "hint: " in said
    assert content(folder) == before
    assert not (folder / ".cleared").exists()


def test_nothing_to_clear_leaves_no_trace(tmp_path: Path) -> None:
    with lock(tmp_path):
        result = guard.plan_clear(tmp_path).execute()
    assert result == guard.ClearResult(set_path=None, cleared=0, size_bytes=0)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with pytest.raises(guard.NotFound):
        guard.plan_clear(tmp_path / "nothing")


def test_two_clears_within_a_second_are_two_sets(model_dir: Path) -> None:
    clear_all(model_dir, now=NOW)
    make_checkpoint(model_dir / "checkpoint-10", 10)
    clear_all(model_dir, now=NOW)
    assert [path.name for path in guard.list_cleared_sets(model_dir)] == [
        "20261123T120000Z-test",
        "20261123T120000Z-test-2",
    ]


def test_a_second_clear_that_fails_notes_that_it_was_undone_and_leaves_the_first(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear_all(model_dir, now=NOW)
    for step in (1, 2):
        make_checkpoint(model_dir / f"checkpoint-{step}", step)
    before = content(model_dir)
    plan = guard.plan_clear(model_dir, verdict=EVERYTHING, reason="second", now=NOW)
    real = os.fsync

    def fsync(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}") == str(plan.set_path) and (plan.set_path / "checkpoint-2").exists():
            raise OSError(5, "Input/output error")  # everything is moved, and is not known to be durable
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with lock(model_dir), pytest.raises(guard.ClearRefused, match="input/output error"):
        plan.execute()
    after = content(model_dir)
    journal = [json.loads(line) for line in after.pop(".cleared/journal.jsonl").splitlines()]
    assert [entry["event"] for entry in journal] == ["clear.begun", "clear.done", "clear.begun", "clear.undone"]
    assert journal[-1] == {"event": "clear.undone", "set": "20261123T120000Z-second"}
    before.pop(".cleared/journal.jsonl")
    assert after == before
    assert [path.name for path in guard.list_cleared_sets(model_dir)] == ["20261123T120000Z-test"]


def test_a_set_is_durable_where_it_lies_now_and_gone_from_where_it_lay(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the journal says that it is done."""
    (model_dir / ".staging" / "leftover").mkdir(parents=True, exist_ok=True)
    plan = guard.plan_clear(model_dir, verdict=EVERYTHING, now=NOW)
    real, synced = os.fsync, []

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with lock(model_dir):
        plan.execute()
    journal = str(model_dir / ".cleared" / "journal.jsonl")
    last = len(synced) - synced[::-1].index(journal)
    due = (plan.set_path, plan.set_path / "staging", model_dir, model_dir / ".staging", model_dir / ".cleared")
    assert {str(folder) for folder in due} <= set(synced[synced.index(journal) + 1 : last])


def test_what_was_given_up_before_is_deleted_whatever_it_is(model_dir: Path) -> None:
    """Trash alone is no reason for a set."""
    staging = model_dir / ".staging"
    make_checkpoint(staging / "trash-checkpoint-1", 1)
    (staging / "trash-file").write_text("x")
    with lock(model_dir):
        plan = guard.plan_clear(model_dir)
        assert sorted(path.name for path in plan.trash) == ["trash-checkpoint-1", "trash-file"]
        assert str(plan).startswith(f"nothing to clear in {model_dir}\nkept: checkpoint-30")
        assert (plan.to_json()["set"], plan.why) == (None, ())
        assert plan.execute() == guard.ClearResult(set_path=None, cleared=0, size_bytes=0)
    assert list(staging.iterdir()) == []
    assert not (model_dir / ".cleared").exists()


def test_each_verdict_has_what_it_calls_for_cleared(model_dir: Path, fingerprint: guard.Fingerprint) -> None:
    (model_dir / ".staging" / "leftover").mkdir(parents=True)
    shutil.copytree(model_dir / "checkpoint-30", model_dir / "checkpoint-40")
    (model_dir / "checkpoint-5").write_text("")
    resume = guard.plan_clear(model_dir, verdict=guard.assess(model_dir, fingerprint=fingerprint), now=NOW)
    assert [(move.source, move.target, move.is_checkpoint) for move in resume.moves] == [
        ("checkpoint-40", "checkpoint-40", True),
        (".staging/leftover", "staging/leftover", False),
    ]
    assert (resume.cleared, resume.protected) == (1, model_dir / "checkpoint-30")
    told = resume.to_json()
    assert (told["kept"], told["set"]) == (str(model_dir / "checkpoint-30"), "20261123T120000Z-not-of-this-run")
    assert told["left_alone"] == [{"path": str(model_dir / "checkpoint-5"), "reason": "it is not a folder"}]
    assert told["moves"][1] == {"from": ".staging/leftover", "to": "staging/leftover", "size_bytes": 0}
    fresh = guard.plan_clear(model_dir, verdict=Verdict(cause=VerdictCause.NO_CHECKPOINTS), now=NOW)
    assert [move.source for move in fresh.moves] == [".staging/leftover"]
    assert fresh.set_path.name == "20261123T120000Z-torn-staging"


def test_without_a_verdict_what_is_of_nobody_known_is_cleared_and_a_key_is_asked_for(tmp_path: Path) -> None:
    empty = guard.plan_clear(tmp_path)
    assert (empty.moves, empty.why, empty.reason) == ((), (), "torn staging")
    make_checkpoint(tmp_path / "checkpoint-10", 10)
    plan = guard.plan_clear(tmp_path)
    assert [move.source for move in plan.moves] == ["checkpoint-10"]
    assert plan.why == ("whose checkpoints these are is not known: there is no metadata",)
    assert plan.reason == "metadata unknown"
    key = b"k" * 32
    guard.seal_checkpoint(tmp_path / "checkpoint-10", step=10, fingerprint=make_fingerprint(), key=key)
    with pytest.raises(guard.UsageError, match="checkpoint-10 is sealed with a key, and none was given"):
        guard.plan_clear(tmp_path)
    assert len(guard.plan_clear(tmp_path, key=key).moves) == 1


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        ("Data-Set  changed!", "data-set-changed"),
        ("ü" * 60, "cleared"),
        ("a" * 60, "a" * 40),
        ("a" * 39 + " b", "a" * 39),
        ("../../etc", "etc"),
    ],
)
def test_a_set_is_named_for_its_reason_and_stays_inside(model_dir: Path, reason: str, name: str) -> None:
    plan = guard.plan_clear(model_dir, verdict=EVERYTHING, reason=reason, now=NOW)
    assert plan.set_path == model_dir / ".cleared" / f"20261123T120000Z-{name}"


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"dataset__digest": "c"}, "dataset-changed"), ({"lora__r": 9, "lora__lora_alpha": 9}, "lora-r-changed")],
)
def test_a_set_of_another_run_is_named_for_what_changed_first(
    model_dir: Path, changes: dict[str, Any], name: str
) -> None:
    verdict = guard.assess(model_dir, fingerprint=make_fingerprint(**changes))
    if "dataset__digest" not in changes:
        digest = guard.read_metadata(model_dir).run.fingerprint.components["dataset.digest"]  # type: ignore[union-attr]
        verdict = guard.assess(model_dir, fingerprint=make_fingerprint(dataset__digest=digest, **changes))
    assert guard.plan_clear(model_dir, verdict=verdict, now=NOW).set_path.name == f"20261123T120000Z-{name}"


# -- restore


def test_a_restored_set_can_be_resumed_from(model_dir: Path, dataset: Path, fingerprint: guard.Fingerprint) -> None:
    """Cleared for another run by mistake, which then left nothing: everything comes back, the metadata too."""
    before = content(model_dir)
    with lock(model_dir):
        prepared = guard.prepare_run(
            model_dir, fingerprint=make_fingerprint(lora__r=99), dataset_path=dataset, lora_config={}
        )
        assert prepared.cleared is not None
        assert prepared.cleared.set_path is not None
        result = guard.restore_set(model_dir, prepared.cleared.set_path.name)
    assert len(result.restored) == 3
    assert result.metadata_restored
    after = content(model_dir)
    journal = after.pop(".cleared/journal.jsonl")
    assert b"clear.restored" in journal  # type: ignore[operator]
    assert after == before
    assert guard.assess(model_dir, fingerprint=fingerprint).checkpoint is not None


def test_a_restore_never_mixes_two_runs(model_dir: Path, dataset: Path) -> None:
    other = make_fingerprint(lora__r=99)
    with lock(model_dir):
        guard.prepare_run(model_dir, fingerprint=other, dataset_path=dataset, lora_config={})
        make_checkpoint(model_dir / "checkpoint-5", 5)
        guard.seal_checkpoint(model_dir / "checkpoint-5", step=5, fingerprint=other)
        (name,) = (path.name for path in guard.list_cleared_sets(model_dir))
        before = content(model_dir)
        with pytest.raises(guard.ClearRefused, match="checkpoints of another run"):
            guard.restore_set(model_dir, name)
        assert content(model_dir) == before


def test_a_restore_takes_nobody_s_place_and_knows_only_sets(model_dir: Path) -> None:
    result = clear_all(model_dir, now=NOW)
    assert result.set_path is not None
    with pytest.raises(guard.NotLocked):
        guard.restore_set(model_dir, result.set_path.name)
    with lock(model_dir):
        (model_dir / "checkpoint-20").write_text("a plain file")
        with pytest.raises(guard.ClearRefused, match="checkpoint-20 exists"):
            guard.restore_set(model_dir, result.set_path.name)
        for name in ("nothing", "..", "../..", "journal.jsonl", ""):
            with pytest.raises(guard.NotFound) as error:
                guard.restore_set(model_dir, name)
            assert error.value.hint == "there are: 20261123T120000Z-test"
    assert len(list(result.set_path.glob("checkpoint-*"))) == 3


# -- purge


def three_sets(folder: Path) -> list[str]:
    """One, two and three days old; each of the same size."""
    for days in (3, 2, 1):
        make_checkpoint(folder / "checkpoint-10", 10)
        clear_all(folder, now=NOW - timedelta(days=days))
    return [path.name for path in guard.list_cleared_sets(folder)]


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({}, 3),
        ({"keep_sets": 2}, 2),
        ({"keep_sets": 0}, 1),
        ({"keep_days": 2.5}, 2),
        ({"keep_days": 0}, 1),
        ({"keep_bytes": 0}, 1),
        ({"keep_sets": 5, "keep_days": 1.5, "keep_bytes": 10**9}, 1),
    ],
)
def test_a_purge_keeps_what_every_limit_allows_and_always_the_newest(
    tmp_path: Path, limits: dict[str, Any], kept: int
) -> None:
    names = three_sets(tmp_path)
    plan = guard.plan_purge(tmp_path, **limits, now=NOW)
    assert [path.name for path in guard.list_cleared_sets(tmp_path)] == names
    with lock(tmp_path):
        result = plan.execute()
        with pytest.raises(guard.ClearRefused):
            plan.execute()
    assert list(result.purged) == names[: 3 - kept]
    assert [path.name for path in guard.list_cleared_sets(tmp_path)] == names[3 - kept :]
    assert all(name in str(plan) for name in result.purged)
    assert_model_dir_sound(tmp_path)


def test_a_purge_counts_bytes_from_the_newest_on(tmp_path: Path) -> None:
    names = three_sets(tmp_path)
    newest = guard.list_cleared_sets(tmp_path)[-1]
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    with lock(tmp_path):
        assert list(guard.purge_cleared(tmp_path, keep_bytes=2 * size + 5, now=NOW).purged) == names[:1]


def test_a_purge_touches_nothing_but_sets(tmp_path: Path) -> None:
    three_sets(tmp_path)
    outside = make_checkpoint(tmp_path / "outside", 1)
    (tmp_path / ".cleared" / "notes.txt").write_text("mine")
    (tmp_path / ".cleared" / "20200101T000000Z-link").symlink_to(outside)
    (tmp_path / ".cleared" / "20200101T000000Z-file").write_text("not a folder")
    (tmp_path / ".cleared" / "20209999T999999Z-no-moment").mkdir()
    with lock(tmp_path):
        guard.purge_cleared(tmp_path, keep_sets=1)
    left = {path.name for path in (tmp_path / ".cleared").iterdir()}
    theirs = {"notes.txt", "20200101T000000Z-link", "20200101T000000Z-file", "20209999T999999Z-no-moment"}
    assert theirs | {"journal.jsonl"} <= left
    assert len(left) == 6
    assert (outside / "optimizer.pt").exists()
