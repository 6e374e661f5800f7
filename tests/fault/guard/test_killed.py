"""SIGKILL between every two calls that change the disk: the directory is sound, nothing is lost, the next run
right.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import guard
from guard import CheckpointState, VerdictKind
from tests.fault.guard import scenarios
from tests.support.killpoints import KilledRun, full_disk_runs, killed_runs
from tests.support.sound_model import assert_model_dir_sound
from tests.unit.guard.conftest import make_checkpoint, make_fingerprint

OURS = make_fingerprint()
OTHER = {"dataset__digest": "c" * 64, "lora__r": 16}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in progress with sealed checkpoints 10, 20 and 30, and its dataset beside it."""
    root = tmp_path_factory.mktemp("template")
    (root / "rows.jsonl").write_text('{"text": "one"}\n')
    model_dir = root / "model"
    scenarios.prepare(str(model_dir), str(root / "rows.jsonl"), {})
    for step in (10, 20, 30):
        make_checkpoint(model_dir / f"checkpoint-{step}", step)
        guard.seal_checkpoint(model_dir / f"checkpoint-{step}", step=step, fingerprint=OURS)
    return root


def copy_of(template: Path, root: Path) -> dict[str, Any]:
    shutil.copytree(template, root, dirs_exist_ok=True)
    return {"model_dir": str(root / "model"), "dataset": str(root / "rows.jsonl")}


def run_all(target: str, prepare: Any, tmp_path: Path, **options: Any) -> Iterator[tuple[Path, KilledRun]]:
    for run in killed_runs(f"tests.fault.guard.scenarios:{target}", prepare, tmp_path, **options):
        yield run.root / "model", run


def start_again(model_dir: Path, changes: Mapping[str, Any] | None = None) -> guard.PreparedRun:
    dataset = model_dir.parent / "rows.jsonl"
    with guard.ModelLock(model_dir, owner="the next run"):
        return guard.prepare_run(
            model_dir,
            fingerprint=make_fingerprint(**(changes or {})),
            dataset_path=dataset,
            lora_config={"r": 8},
        )


def whereabouts(model_dir: Path) -> dict[str, list[Path]]:
    """Every intact checkpoint below the model directory, by name: in place, in staging, or in a cleared
    set.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(model_dir.rglob("checkpoint-*")):
        if path.is_dir() and guard.verify_checkpoint(path).is_intact:
            found.setdefault(path.name, []).append(path)
    return found


def test_clearing_for_another_run_loses_nothing_and_never_mixes_runs(template: Path, tmp_path: Path) -> None:
    """Killed at any call of decide, clear and record: each old checkpoint is whole and there exactly once, and
    neither the new run nor the old one continues from a checkpoint that is not its own."""
    prepare = lambda root: {**copy_of(template, root), "changes": OTHER}
    for model_dir, run in run_all("prepare", prepare, tmp_path):
        assert_model_dir_sound(model_dir)
        places = whereabouts(model_dir)
        assert {name: len(paths) for name, paths in places.items()} == {
            "checkpoint-10": 1,
            "checkpoint-20": 1,
            "checkpoint-30": 1,
        }, run
        old_way = shutil.copytree(model_dir.parent, model_dir.parent.with_name("old-way"), symlinks=True)
        again = start_again(model_dir, OTHER)
        assert again.resume_from is None, run
        assert guard.scan_checkpoints(model_dir) == (), run
        assert guard.read_metadata(model_dir).run.fingerprint.same_run(make_fingerprint(**OTHER))  # type: ignore[union-attr]
        assert_model_dir_sound(model_dir)
        # The old data comes back instead: from what is still in place, or from the start.
        back = start_again(old_way / "model")
        if back.resume_from is not None:
            assert back.verdict.checkpoint is not None
            assert back.verdict.checkpoint.belongs_to(OURS), run
        shutil.rmtree(old_way)


def test_sealing_in_staging_never_puts_half_a_checkpoint_in_place(template: Path, tmp_path: Path) -> None:
    def prepare(root: Path) -> dict[str, Any]:
        arguments = copy_of(template, root)
        make_checkpoint(Path(arguments["model_dir"], ".staging", "checkpoint-40"), 40)
        return {"model_dir": arguments["model_dir"], "step": 40, "staged": True}

    resumed = set()
    for model_dir, run in run_all("seal", prepare, tmp_path):
        assert_model_dir_sound(model_dir)
        again = start_again(model_dir)
        assert again.verdict.kind is VerdictKind.RESUME, run
        assert again.verdict.checkpoint is not None
        resumed.add(again.verdict.checkpoint.step)
        assert again.verdict.checkpoint.step in (30, 40), run
        # The files of step 40 are somewhere, sealed or not: in place, or in a cleared set.
        assert list(model_dir.rglob("checkpoint-40/optimizer.pt")), run
        assert_model_dir_sound(model_dir)
    assert resumed == {30, 40}


def test_sealing_in_place_is_all_or_nothing(template: Path, tmp_path: Path) -> None:
    """A checkpoint of somebody else's script is unsealed or intact, and resumed from only when intact."""

    def prepare(root: Path) -> dict[str, Any]:
        arguments = copy_of(template, root)
        make_checkpoint(Path(arguments["model_dir"], "checkpoint-40"), 40)
        return {"model_dir": arguments["model_dir"], "step": 40, "staged": False}

    for model_dir, run in run_all("seal", prepare, tmp_path):
        assert_model_dir_sound(model_dir, allow_unsealed=True)
        state = guard.verify_checkpoint(model_dir / "checkpoint-40").state
        assert state in (CheckpointState.UNSEALED, CheckpointState.INTACT), run
        again = start_again(model_dir)
        assert again.verdict.checkpoint is not None
        assert again.verdict.checkpoint.step == (40 if state is CheckpointState.INTACT else 30), run
        assert_model_dir_sound(model_dir)


def test_a_resume_that_sweeps_is_killed_and_still_resumes(template: Path, tmp_path: Path) -> None:
    """Torn checkpoints and leftovers of staging go to `.cleared/`; whenever that is cut off, the run
    resumes.
    """

    def prepare(root: Path) -> dict[str, Any]:
        arguments = copy_of(template, root)
        model_dir = Path(arguments["model_dir"])
        (make_checkpoint(model_dir / "checkpoint-50", 50) / "optimizer.pt").unlink()
        make_checkpoint(model_dir / ".staging" / "checkpoint-60", 60)
        make_checkpoint(model_dir / ".staging" / "trash-checkpoint-5", 5)
        return {**arguments, "changes": {}}

    for model_dir, run in run_all("prepare", prepare, tmp_path):
        again = start_again(model_dir)
        assert again.resume_from == model_dir / "checkpoint-30", run
        assert_model_dir_sound(model_dir)
        assert list(again.staging_dir.iterdir()) == [], run
        assert list(model_dir.glob(".cleared/*/checkpoint-50")), run
        assert list(model_dir.glob(".cleared/*/staging/checkpoint-60")), run
        assert not list(model_dir.rglob("trash-*")), run


@pytest.mark.parametrize("before", ["missing", "unreadable", "current"])
def test_the_metadata_is_the_old_one_or_the_new_one(template: Path, tmp_path: Path, before: str) -> None:
    def prepare(root: Path) -> dict[str, Any]:
        arguments = copy_of(template, root)
        path = Path(arguments["model_dir"], ".dataset_metadata.json")
        if before == "missing":
            path.unlink()
        elif before == "unreadable":
            path.write_text("{ not json")
        return arguments

    kinds = set()
    for model_dir, run in run_all("metadata", prepare, tmp_path):
        reading = guard.read_metadata(model_dir)
        kinds.add(reading.kind)
        if before == "unreadable":  # set aside whole, or still in its place
            texts = [path.read_text() for path in model_dir.glob(".dataset_metadata.json*")]
            assert "{ not json" in texts, run
        again = start_again(model_dir)
        finished = reading.run is not None and reading.run.finished is not None
        known = reading.kind is guard.MetadataKind.CURRENT and not finished
        assert again.verdict.kind is (VerdictKind.RESUME if known else VerdictKind.STALE), run
        assert_model_dir_sound(model_dir)
    expected = {"missing": {"missing", "current"}, "unreadable": {"unreadable", "missing", "current"}}
    assert kinds == expected.get(before, {"current"})


def test_a_full_disk_gives_one_clear_error_and_a_clear_leaves_everything_as_it_was(
    template: Path, tmp_path: Path
) -> None:
    """The disk is full from any call of the clear on; moving things back needs no space."""

    def prepare(root: Path) -> dict[str, Any]:
        return {"model_dir": copy_of(template, root)["model_dir"]}

    failed = 0
    for run in full_disk_runs("tests.fault.guard.scenarios:clear", prepare, tmp_path):
        model_dir = run.root / "model"
        if run.outcome.result is None:  # it was full for something that does not matter, such as the holder's name
            continue
        failed += 1
        name, cause, hint = run.outcome.result
        assert name in ("ClearRefused", "StorageError"), run
        assert "no space left" in cause, run
        assert "free some space" in hint, run
        assert [c.step for c in guard.scan_checkpoints(model_dir, digests=True) if c.is_intact] == [
            10,
            20,
            30,
        ], run
        assert guard.list_cleared_sets(model_dir) == [], run
        assert not list(model_dir.rglob("*.tmp")), run
        assert_model_dir_sound(model_dir)
        assert start_again(model_dir).resume_from == model_dir / "checkpoint-30", run
    assert failed > 10


def test_a_full_disk_while_sealing_leaves_the_earlier_checkpoints_good(template: Path, tmp_path: Path) -> None:
    def prepare(root: Path) -> dict[str, Any]:
        arguments = copy_of(template, root)
        make_checkpoint(Path(arguments["model_dir"], ".staging", "checkpoint-40"), 40)
        return {"model_dir": arguments["model_dir"], "step": 40, "staged": True}

    for run in full_disk_runs("tests.fault.guard.scenarios:try_seal", prepare, tmp_path):
        model_dir = run.root / "model"
        assert_model_dir_sound(model_dir)
        if run.outcome.result is not None:
            assert "no space left" in run.outcome.result[1], run
            assert "free some space" in run.outcome.result[2], run
        assert start_again(model_dir).verdict.kind is VerdictKind.RESUME, run


def cleared_three_times(template: Path, root: Path) -> list[str]:
    """Four sets, the oldest first; afterwards the directory belongs to a fourth run and has no
    checkpoints.
    """
    arguments = copy_of(template, root)
    model_dir = Path(arguments["model_dir"])
    for number in range(3):
        run = make_fingerprint(lora__r=number + 20)
        start_again(model_dir, {"lora__r": number + 20})
        name = f"checkpoint-{number + 1}"
        make_checkpoint(model_dir / name, number + 1)
        guard.seal_checkpoint(model_dir / name, step=number + 1, fingerprint=run)
    start_again(model_dir, {"lora__r": 99})
    return [path.name for path in guard.list_cleared_sets(model_dir)]


def test_a_purge_deletes_whole_sets_and_never_the_newest(template: Path, tmp_path: Path) -> None:
    three = tmp_path / "three"
    three.mkdir()
    sets = cleared_three_times(template, three)
    newest = max(guard.list_cleared_sets(three / "model"), key=lambda path: path.name).name

    def prepare(root: Path) -> dict[str, Any]:
        return {"model_dir": copy_of(three, root)["model_dir"]}

    for model_dir, run in run_all("purge", prepare, tmp_path / "runs"):
        assert_model_dir_sound(model_dir)
        left = {path.name for path in guard.list_cleared_sets(model_dir)}
        assert newest in left, run
        assert left <= set(sets)
        for path in guard.list_cleared_sets(model_dir):  # a set that can be seen can be restored
            for checkpoint in path.glob("checkpoint-*"):
                assert guard.verify_checkpoint(checkpoint).is_intact, run
        with guard.ModelLock(model_dir, owner="the next purge"):
            guard.purge_cleared(model_dir, keep_sets=1)
        assert [path.name for path in guard.list_cleared_sets(model_dir)] == [newest], run
        assert not list(model_dir.glob(".cleared/.purging-*")), run


def test_a_restore_that_was_cut_off_is_finished_by_the_next(template: Path, tmp_path: Path) -> None:
    cleared = tmp_path / "cleared"
    cleared.mkdir()
    cleared_three_times(template, cleared)
    first = next(path.name for path in guard.list_cleared_sets(cleared / "model") if (path / "checkpoint-30").is_dir())

    def prepare(root: Path) -> dict[str, Any]:
        return {"model_dir": copy_of(cleared, root)["model_dir"], "set_name": first}

    for model_dir, run in run_all("restore", prepare, tmp_path / "runs"):
        assert_model_dir_sound(model_dir)
        assert {name for name in whereabouts(model_dir) if name.endswith("0")} == {
            "checkpoint-10",
            "checkpoint-20",
            "checkpoint-30",
        }, run
        if (model_dir / ".cleared" / first).exists():
            with guard.ModelLock(model_dir, owner="again"):
                guard.restore_set(model_dir, first)
        assert start_again(model_dir).resume_from == model_dir / "checkpoint-30", run
        assert_model_dir_sound(model_dir)


def test_an_append_is_whole_or_absent_and_torn_lines_are_kept(tmp_path: Path) -> None:
    def prepare(root: Path) -> dict[str, Any]:
        (root / "log.jsonl").write_bytes(b'{"n": 1}\n{"n": tor')
        return {"path": str(root / "log.jsonl")}

    for run in killed_runs("tests.fault.guard.scenarios:append", prepare, tmp_path):
        path = run.root / "log.jsonl"
        guard.append_line_durable(path, '{"n": 9}')
        numbers = [json.loads(line)["n"] for line in path.read_bytes().splitlines()]
        assert numbers in ([1, 9], [1, 2, 9], [1, 2, 3, 9]), run
        assert '{"n": tor' in (run.root / "log.jsonl.torn").read_text(), run


def test_a_written_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    def prepare(root: Path) -> dict[str, Any]:
        (root / "file").write_bytes(b"old")
        return {"path": str(root / "file"), "size_bytes": 5000}

    seen = set()
    for run in killed_runs("tests.fault.guard.scenarios:write", prepare, tmp_path):
        seen.add((run.root / "file").read_bytes())
    assert seen == {b"old", b"n" * 5000}
