"""prepare_run: decide, clear, record, in this order, and never from a checkpoint that is not the run's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import guard
from guard import CheckpointState, VerdictKind
from tests.unit.guard.conftest import make_checkpoint, make_fingerprint

LORA = {"r": 8, "alpha": 16, "dropout": 0.0}


def prepare(folder: Path, fingerprint: guard.Fingerprint, dataset: Path, **options: Any) -> guard.PreparedRun:
    with guard.ModelLock(folder, owner="test"):
        return guard.prepare_run(folder, fingerprint=fingerprint, dataset_path=dataset, lora_config=LORA, **options)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith("checkpoint-")}


def test_an_empty_directory_starts_fresh_and_is_recorded(tmp_path: Path, dataset: Path) -> None:
    fingerprint = make_fingerprint()
    prepared = prepare(tmp_path / "new", fingerprint, dataset)
    assert prepared.verdict.kind is VerdictKind.FRESH
    assert prepared.resume_from is None
    assert prepared.cleared is None
    assert prepared.staging_dir.is_dir()
    metadata = guard.read_metadata(tmp_path / "new").run
    assert metadata is not None
    assert metadata.fingerprint == fingerprint


def test_the_same_run_resumes_from_its_newest_checkpoint_and_changes_nothing(
    model_dir: Path, fingerprint: guard.Fingerprint, dataset: Path
) -> None:
    before = (model_dir / ".dataset_metadata.json").read_bytes()
    prepared = prepare(model_dir, fingerprint, dataset)
    assert prepared.verdict.kind is VerdictKind.RESUME
    assert prepared.resume_from == model_dir / "checkpoint-30"
    assert prepared.cleared is None
    assert names(model_dir) == {"checkpoint-10", "checkpoint-20", "checkpoint-30"}
    assert (model_dir / ".dataset_metadata.json").read_bytes() == before


def test_a_resume_with_other_notes_keeps_the_metadata_of_the_run_s_first_start(
    model_dir: Path, dataset: Path, fingerprint: guard.Fingerprint
) -> None:
    before = (model_dir / ".dataset_metadata.json").read_bytes()
    noted = guard.Fingerprint({**fingerprint.components, "training.save_steps": 99, "attempt.number": 2})
    prepared = prepare(model_dir, noted, dataset)
    assert prepared.verdict.kind is VerdictKind.RESUME
    assert [difference.name for difference in prepared.verdict.differences] == [
        "training.save_steps",
        "attempt.number",
    ]
    assert (model_dir / ".dataset_metadata.json").read_bytes() == before


def test_another_run_clears_everything_and_names_every_difference(model_dir: Path, dataset: Path) -> None:
    other = make_fingerprint(dataset__digest="c" * 64, lora__r=16, training__learning_rate=3e-4)
    prepared = prepare(model_dir, other, dataset)
    assert prepared.verdict.kind is VerdictKind.STALE
    assert [difference.name for difference in prepared.verdict.differences] == [
        "dataset.digest",
        "lora.r",
        "training.learning_rate",
    ]
    assert "LoRA r: 8 -> 16" in prepared.verdict.reasons
    assert prepared.resume_from is None
    assert prepared.cleared is not None
    assert prepared.cleared.cleared == 3
    assert names(model_dir) == set()
    assert prepared.cleared.set_path is not None
    assert names(prepared.cleared.set_path) == {"checkpoint-10", "checkpoint-20", "checkpoint-30"}


def test_a_torn_newest_checkpoint_is_skipped_cleared_and_reported(
    model_dir: Path, fingerprint: guard.Fingerprint, dataset: Path
) -> None:
    (model_dir / "checkpoint-30" / "optimizer.pt").write_bytes(b"")
    events: list[tuple[str, dict[str, Any]]] = []
    prepared = prepare(model_dir, fingerprint, dataset, log=lambda event, data: events.append((event, data)))
    assert prepared.resume_from == model_dir / "checkpoint-20"
    assert [checkpoint.step for checkpoint in prepared.verdict.skipped] == [30]
    told = dict(events)["guard.checkpoint_passed_over"]
    assert told["step"] == 30
    assert "optimizer.pt" in told["reason"]
    # Out of the way, or the run could not write its own checkpoint-30.
    assert names(model_dir) == {"checkpoint-10", "checkpoint-20"}


def test_what_a_crash_left_in_staging_is_cleared_not_deleted(
    model_dir: Path, fingerprint: guard.Fingerprint, dataset: Path
) -> None:
    make_checkpoint(model_dir / ".staging" / "checkpoint-40", 40)
    prepared = prepare(model_dir, fingerprint, dataset)
    assert prepared.resume_from == model_dir / "checkpoint-30"
    assert prepared.cleared is not None
    assert prepared.cleared.set_path is not None
    assert (prepared.cleared.set_path / "staging" / "checkpoint-40" / "optimizer.pt").exists()
    assert list(prepared.staging_dir.iterdir()) == []


def test_a_finished_run_is_never_resumed(model_dir: Path, fingerprint: guard.Fingerprint, dataset: Path) -> None:
    guard.mark_finished(model_dir, "0003")
    prepared = prepare(model_dir, fingerprint, dataset)
    assert prepared.verdict.kind is VerdictKind.STALE
    assert "finished as version 0003" in prepared.verdict.reasons[0]


def test_metadata_of_a_later_form_is_neither_judged_nor_overwritten(
    model_dir: Path, fingerprint: guard.Fingerprint, dataset: Path
) -> None:
    metadata = model_dir / ".dataset_metadata.json"
    metadata.write_text('{"schema_version": 99}')
    with pytest.raises(guard.MetadataTooNew):
        prepare(model_dir, fingerprint, dataset)
    assert metadata.read_text() == '{"schema_version": 99}'
    assert names(model_dir) == {"checkpoint-10", "checkpoint-20", "checkpoint-30"}


def test_without_the_lock_nothing_is_prepared(model_dir: Path, fingerprint: guard.Fingerprint, dataset: Path) -> None:
    with pytest.raises(guard.NotLocked, match="cannot prepare a run"):
        guard.prepare_run(model_dir, fingerprint=fingerprint, dataset_path=dataset, lora_config=LORA)


def test_checkpoints_of_a_plain_script_are_not_resumed_from(tmp_path: Path, dataset: Path) -> None:
    folder = tmp_path / "plain"
    make_checkpoint(folder / "checkpoint-10", 10)
    assert guard.scan_checkpoints(folder)[0].state is CheckpointState.UNSEALED
    prepared = prepare(folder, make_fingerprint(), dataset)
    assert prepared.verdict.kind is VerdictKind.STALE
    assert prepared.cleared is not None
    assert prepared.cleared.cleared == 1
