"""What a run tells the guard, and what it takes for a success."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from peft import LoraConfig

import guard
from daemon.dataset.rows import RowReader
from daemon.job import FailureKind, Outcome, Plan
from daemon.recipe import ModelSettings
from daemon.trainer import loop
from daemon.trainer.candidate import require_learned, require_whole_run
from daemon.trainer.errors import RunFailure
from daemon.trainer.merge import merge
from tests.support.inprocess import StopAfterLoading, rows, specify, train

SHORT = {"training": {"max_steps": 2}, "data": {"held_out_fraction": 0.0}}
PLAN = Plan(
    rows=16, replayed_rows=0, replayed_tokens=0, samples=16, held_out_rows=0, withheld_rows=0, dropped_rows=0, tokens=100, trained_tokens=50, global_batch_size=8, steps_per_epoch=2,
    epochs=1.0, total_steps=2, warmup_steps=0,
)  # fmt: skip


def recorded(model_dir: str) -> dict[str, Any]:
    metadata = guard.read_metadata(model_dir).run
    assert metadata is not None
    assert metadata.fingerprint is not None
    return metadata.fingerprint.to_json()


def test_the_metadata_of_a_run_names_everything_that_decides_what_it_computes(tiny_base: Path, tmp_path: Path) -> None:
    """Every field of peft's class as the trainer uses it, the rows that are left, the length, the versions; all of them
    in the guard's table."""
    content = rows(24)
    content[5]["messages"] = content[5]["messages"][:-1]  # nothing to learn in this one
    spec = specify(tmp_path, content, tiny_base, {"lora": {"r": 4}, "data": {"held_out_fraction": 0.2}})
    result = train(spec)
    found = recorded(spec.model_dir)
    assert {f"lora.{name}" for name in LoraConfig().to_dict()} <= found.keys()
    assert (found["lora.r"], found["lora.init_lora_weights"], found["lora.target_modules"]) == (4, True, "all-linear")
    assert found["dataset.rows"] == 24
    assert found["dataset.rows_trained"] == result.rows == 24 - 1 - result.held_out_rows
    assert found["training.total_steps"] == result.steps_planned
    assert len(found["data.tokens"]) == 64
    assert all(found[f"versions.{name}"] for name in ("torch", "transformers", "peft", "dropforge"))
    known = {component.name for component in guard.COMPONENTS}
    assert {name for name in found if name not in known and not name.startswith("attempt.")} == set()


@pytest.mark.parametrize("how", ["while it is read", "before"])
def test_a_dataset_that_changes_after_it_was_checked_is_not_trained(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A program that still holds the file open writes between the digest and the last row; the size stays the same."""
    spec = specify(tmp_path, rows(16), tiny_base, SHORT)
    path = Path(spec.dataset.path)
    plain = RowReader.lines

    def edit() -> None:
        path.write_text(path.read_text().replace("1", "2"))

    def late(reader: RowReader) -> Iterator[Any]:
        yield from plain(reader)
        edit()

    if how == "before":
        edit()
    else:
        monkeypatch.setattr(RowReader, "lines", late)
    with pytest.raises(RunFailure, match="changed after it was checked") as caught:
        train(spec)
    assert caught.value.kind is FailureKind.BAD_DATA
    assert guard.read_metadata(spec.model_dir).kind is guard.MetadataKind.MISSING


def test_with_a_key_only_what_that_key_sealed_is_resumed(tiny_base: Path, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_bytes(b"k" * 32)
    key_file.chmod(0o600)
    tables = {"training": {"save_steps": 1, "max_steps": 4}, "data": {"held_out_fraction": 0.0}}
    spec = replace(specify(tmp_path, rows(32), tiny_base, tables), key_file=str(key_file))
    stopped = train(spec, StopAfterLoading())
    assert (stopped.outcome, stopped.steps_run) == (Outcome.INTERRUPTED, 1)
    checkpoint = Path(spec.model_dir, "checkpoint-1")
    assert not guard.verify_checkpoint(checkpoint).is_intact
    assert guard.verify_checkpoint(checkpoint, key=b"k" * 32).is_intact
    assert train(spec).start_step == 1

    key_file.write_bytes(b"another key of 32 bytes, or so...")
    again = train(spec)
    assert (again.start_step, again.steps_run, again.cleared) == (0, 4, 2)
    key_file.chmod(0o640)
    with pytest.raises(guard.UsageError, match="others can use it"):
        train(spec)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_trainer_that_ran_other_than_the_planned_steps_is_no_success(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """What transformers reports is not believed: the run fails, and leaves nothing that could be promoted."""
    run = loop.RunTrainer.run

    def lying(self: Any, *arguments: Any) -> int:
        run(self, *arguments)
        return steps

    monkeypatch.setattr(loop.RunTrainer, "run", lying)
    spec = specify(tmp_path, rows(16), tiny_base, SHORT)
    with pytest.raises(RunFailure, match=f"{steps} of 2 planned steps ran"):
        train(spec)
    assert not list(Path(spec.model_dir).glob("**/candidate-*"))


def test_a_run_of_no_steps_or_without_a_finite_loss_is_not_whole() -> None:
    require_whole_run(2, PLAN, 1.5)
    for steps, planned in ((0, replace(PLAN, total_steps=0)), (1, PLAN), (3, PLAN)):
        with pytest.raises(RunFailure, match="planned steps ran"):
            require_whole_run(steps, planned, 1.5)
    for loss in (float("nan"), float("inf")):
        with pytest.raises(RunFailure) as caught:
            require_whole_run(2, PLAN, loss)
        assert caught.value.kind is FailureKind.DIVERGED


def test_an_adapter_that_did_not_move_or_does_nothing_or_is_not_finite_has_not_learned() -> None:
    model = torch.nn.Module()
    model.lora_B = torch.nn.Parameter(torch.ones(2))
    before = {"lora_B": torch.zeros(2)}
    require_learned(model, before, 1.0)
    with pytest.raises(RunFailure, match="left the adapter as it was"):
        require_learned(model, {"lora_B": torch.ones(2)}, 1.0)
    with pytest.raises(RunFailure, match="lora_B is zero"):
        require_learned(model, before, 0.0)
    model.lora_B.data[0] = float("inf")
    with pytest.raises(RunFailure) as caught:
        require_learned(model, before, 1.0)
    assert caught.value.kind is FailureKind.DIVERGED


def test_a_run_that_died_after_its_last_checkpoint_trains_no_step_twice(tiny_base: Path, tmp_path: Path) -> None:
    """Everything was trained; what was lost is the adapter that comes after. The next attempt writes the same one."""
    spec = specify(tmp_path, rows(16), tiny_base, SHORT)
    first = train(spec)
    again = train(spec)
    assert (again.outcome, again.start_step, again.steps_run) == (Outcome.SUCCEEDED, 2, 2)
    assert again.adapter_digest == first.adapter_digest


def no_network() -> NoReturn:
    raise OSError("no network")


def test_a_base_from_the_hub_is_known_by_its_commit_and_its_files_are_digested_once(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's own cache, links into blobs and all; another commit with the same files is another base model."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--some--tiny"
    commits = ["a" * 40, "b" * 40]
    for commit in commits:
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in tiny_base.iterdir():
            blob = repository / "blobs" / guard.digest_file(path).blake3_hex
            blob.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, blob)
            os.utime(blob, (1, 1))
            (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[0])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: asked.append(host) or no_network())

    tables = {**SHORT, "model": {"model_name_or_path": "some/tiny"}}
    spec = specify(tmp_path / "run", rows(16), tiny_base, SHORT)
    spec = replace(spec, recipe={**spec.recipe, "model": {**spec.recipe["model"], **tables["model"]}})
    first = train(spec)
    merge(Path(first.candidate or ""), tmp_path / "merged", ModelSettings(model_name_or_path="some/tiny"))
    assert asked == []  # downloads are not allowed, and peft would look for a configuration at every checkpoint
    found = recorded(spec.model_dir)
    assert (first.outcome, found["model.name"], found["model.revision"]) == (Outcome.SUCCEEDED, "some/tiny", commits[0])
    assert found["model.digest"] == guard.digest_model_files(tiny_base)
    adapter = json.loads((Path(first.candidate or "") / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "some/tiny"  # which other machines know, unlike the cache's folder
    cached = json.loads((Path(spec.state_dir or "") / "digests.json").read_text())
    assert {Path(path).parent.name for path in cached} == {"blobs"}

    (repository / "refs" / "main").write_text(commits[1])
    again = train(spec)
    assert (again.start_step, again.cleared) == (0, 1)
    assert again.reasons == (f"model.revision: {commits[0]} -> {commits[1]}",)
