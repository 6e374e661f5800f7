"""The five functions of old: names, arguments and results as they were, with the core behind them."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import guard
from tests.unit.guard.conftest import make_checkpoint

LORA = {"r": 8, "alpha": 16, "dropout": 0.05}
NAME = ".dataset_metadata.json"


@pytest.fixture
def folder(tmp_path: Path, dataset: Path) -> Path:
    """A model directory with metadata and two checkpoints."""
    path = tmp_path / "out"
    guard.save_dataset_metadata(path, dataset, LORA)
    for step in (10, 20):
        make_checkpoint(path / f"checkpoint-{step}", step)
    return path


def test_their_arguments_are_what_callers_pass_by_name() -> None:
    assert {
        function.__name__: list(inspect.signature(function).parameters)
        for function in (
            guard.compute_dataset_hash,
            guard.save_dataset_metadata,
            guard.load_dataset_metadata,
            guard.validate_checkpoint_compatibility,
            guard.clear_checkpoints,
        )
    } == {
        "compute_dataset_hash": ["dataset_path"],
        "save_dataset_metadata": ["output_dir", "dataset_path", "lora_config"],
        "load_dataset_metadata": ["output_dir"],
        "validate_checkpoint_compatibility": ["output_dir", "dataset_path", "lora_config"],
        "clear_checkpoints": ["output_dir", "logger"],
    }


def test_the_hash_is_md5_of_name_and_size(dataset: Path) -> None:
    expected = hashlib.md5(f"{dataset.name}:{dataset.stat().st_size}".encode()).hexdigest()
    assert guard.compute_dataset_hash(str(dataset)) == expected
    with pytest.raises(guard.NotFound):
        guard.compute_dataset_hash(dataset.with_name("nothing"))


def test_metadata_has_the_four_keys_and_round_trips(folder: Path, dataset: Path) -> None:
    found = guard.load_dataset_metadata(str(folder))
    assert found is not None
    assert found["dataset_name"] == dataset.name
    assert found["dataset_hash"] == guard.compute_dataset_hash(dataset)
    assert found["dataset_path"] == str(dataset)
    assert found["lora_config"] == LORA
    assert guard.validate_checkpoint_compatibility(folder, dataset, LORA) == (True, None)


@pytest.mark.parametrize("content", [None, b"", b"[]", b"null", b"\xff", b"{", b"[" * 200_000])
def test_missing_or_broken_metadata_is_none_and_incompatible(
    folder: Path, dataset: Path, content: bytes | None
) -> None:
    (folder / NAME).unlink()
    if content is not None:
        (folder / NAME).write_bytes(content)
    assert guard.load_dataset_metadata(folder) is None
    compatible, reason = guard.validate_checkpoint_compatibility(folder, dataset, LORA)
    assert compatible is False
    assert reason


def test_another_dataset_is_incompatible_also_with_the_same_name_and_size(folder: Path, dataset: Path) -> None:
    renamed = dataset.with_name("renamed.jsonl")
    renamed.write_bytes(dataset.read_bytes())
    assert guard.validate_checkpoint_compatibility(folder, renamed, LORA) == (True, None)
    dataset.write_bytes(dataset.read_bytes().replace(b"one", b"eno"))
    compatible, reason = guard.validate_checkpoint_compatibility(folder, dataset, LORA)
    assert compatible is False
    assert reason is not None
    assert reason.startswith(f"Dataset changed: the content of {dataset.name} (digest ")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"r": 16}, "LoRA r: 8 -> 16"),
        ({"alpha": 32}, "LoRA alpha: 16 -> 32"),
        ({"dropout": 0.1}, "LoRA dropout: 0.05 -> 0.1"),
        ({"r": 16, "alpha": 32}, "LoRA r: 8 -> 16; LoRA alpha: 16 -> 32"),
    ],
)
def test_another_adapter_is_incompatible_and_every_change_is_named(
    folder: Path, dataset: Path, change: dict[str, Any], reason: str
) -> None:
    assert guard.validate_checkpoint_compatibility(folder, dataset, {**LORA, **change}) == (False, reason)


@pytest.mark.parametrize("form", ["old", "current"])
def test_another_dataset_is_named_beside_the_one_before(folder: Path, tmp_path: Path, dataset: Path, form: str) -> None:
    """By its name, with the digests behind it, and before what changed of the adapter."""
    if form == "old":
        old = {
            "dataset_name": dataset.name, "dataset_hash": guard.compute_dataset_hash(dataset),
            "dataset_path": str(dataset), "lora_config": LORA,
        }  # fmt: skip
        (folder / NAME).write_text(json.dumps(old))
    other = tmp_path / "data b\n.jsonl"
    other.write_text('{"text": "other"}\n')
    compatible, reason = guard.validate_checkpoint_compatibility(folder, other, {**LORA, "alpha": 32})
    assert compatible is False
    assert reason is not None
    changed, lora = reason.split("; ")
    assert re.fullmatch(rf'Dataset changed: {dataset.name} → "data b\\n.jsonl" \(digest \w+ → \w+\)', changed)
    assert lora == "LoRA alpha: 16 -> 32"


def test_peft_s_names_and_its_own_class_are_understood(folder: Path, dataset: Path) -> None:
    peft_names = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
    assert guard.validate_checkpoint_compatibility(folder, dataset, peft_names) == (True, None)

    class LoraConfig:
        r, lora_alpha, lora_dropout = 8, 16, 0.05

    assert guard.validate_checkpoint_compatibility(folder, dataset, LoraConfig()) == (True, None)
    with pytest.raises(TypeError, match="no lora_config"):
        guard.validate_checkpoint_compatibility(folder, dataset, 8)


def test_metadata_of_the_old_form_is_judged_by_name_size_and_adapter(folder: Path, dataset: Path) -> None:
    old = {
        "dataset_name": dataset.name,
        "dataset_hash": guard.compute_dataset_hash(dataset),
        "dataset_path": str(dataset),
        "lora_config": LORA,
    }
    (folder / NAME).write_text(json.dumps(old))
    assert guard.validate_checkpoint_compatibility(folder, dataset, LORA) == (True, None)
    assert guard.validate_checkpoint_compatibility(folder, dataset, {**LORA, "r": 4}) == (
        False,
        "LoRA r: 8 -> 4",
    )
    dataset.write_text("longer than it was, by far, and by some more")
    assert guard.validate_checkpoint_compatibility(folder, dataset, LORA)[0] is False


def test_metadata_of_the_core_is_judged_by_what_these_functions_know(
    model_dir: Path, dataset: Path, fingerprint: guard.Fingerprint
) -> None:
    assert guard.validate_checkpoint_compatibility(model_dir, dataset, {"r": 8, "alpha": 16}) == (True, None)
    assert guard.validate_checkpoint_compatibility(model_dir, dataset, {"r": 9, "alpha": 16})[0] is False
    guard.mark_finished(model_dir, "0002")
    compatible, reason = guard.validate_checkpoint_compatibility(model_dir, dataset, {"r": 8})
    assert (compatible, reason) == (False, "the run that wrote it finished as version 0002")


def test_a_dataset_that_is_gone_is_incompatible(folder: Path, dataset: Path) -> None:
    dataset.unlink()
    compatible, reason = guard.validate_checkpoint_compatibility(folder, dataset, LORA)
    assert compatible is False
    assert reason is not None
    assert "no such file" in reason


def test_clearing_returns_how_many_and_deletes_nothing(folder: Path) -> None:
    (folder / "checkpoint-30").symlink_to("checkpoint-10")
    (folder / "other").mkdir()
    assert guard.clear_checkpoints(str(folder)) == 2
    assert guard.clear_checkpoints(folder, logger=None) == 0
    assert len(list(folder.glob(".cleared/*/checkpoint-*/optimizer.pt"))) == 2
    assert (folder / "other").is_dir()
    assert (folder / "checkpoint-30").is_symlink()
    assert guard.clear_checkpoints(folder / "nothing") == 0
    assert not (folder / "nothing").exists()


def test_they_respect_the_lock_of_another_and_use_their_own(folder: Path, dataset: Path) -> None:
    with guard.ModelLock(folder, owner="ours"):
        guard.save_dataset_metadata(folder, dataset, LORA)
        assert guard.clear_checkpoints(folder) == 2
