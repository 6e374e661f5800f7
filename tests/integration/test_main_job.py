"""The main job with the real trainer on a tiny model: drop a file, get a trained adapter."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from daemon.cli.init import examples_dir
from daemon.job import Job, JobState
from daemon.run_dir import run_dir_of
from daemon.versions import list_versions
from tests.support.root import Root, allow, slowed, wait_until
from tests.support.sound import assert_sound

MakeRoot = Callable[..., Root]
TABLES = {
    "training": {"learning_rate": 3e-3, "save_steps": 3, "logging_steps": 1},
    "data": {"max_length": 192, "held_out_fraction": 0.1},
}


@pytest.fixture
def root(make_root: MakeRoot, tiny_base: Path) -> Root:
    return make_root(base_model=tiny_base, tables=TABLES)


def rows(start: int, count: int, name: str = "gsm8k_messages.jsonl") -> list[dict[str, Any]]:
    lines = (examples_dir() / name).read_text().splitlines()
    return [json.loads(line) for line in lines[start : start + count]]


def adapter(root: Root, job: Job) -> dict[str, torch.Tensor]:
    assert job.version is not None
    return load_file(root.settings.model_dir / "versions" / job.version / "adapter_model.safetensors")


def lora_b(tensors: dict[str, torch.Tensor]) -> float:
    return sum(float(tensor.norm()) for name, tensor in tensors.items() if "lora_B" in name)


def test_every_job_trains_all_its_steps_and_carries_the_weights_on(root: Root) -> None:
    """A, then B of the same size, then C that is smaller: each runs what it planned, whatever lay on disk before."""
    root.start()
    jobs = []
    for name, content in (
        ("a.jsonl", rows(0, 40)),
        ("b.jsonl", rows(0, 40, "gsm8k_pairs.jsonl")),
        ("c.jsonl", rows(40, 12)),
    ):
        root.drop(name, content)
        jobs.append(root.finished(name))
    for job in jobs:
        assert job.state is JobState.SUCCEEDED, f"{job.reason} {root.errors()}"
        assert job.result is not None
        assert job.result.steps_run == job.result.steps_planned >= 1
        assert job.result.start_step == 0
        assert job.result.resumed_from is None
    weights = [adapter(root, job) for job in jobs]
    for one, other in itertools.pairwise(weights):
        assert any(not torch.equal(one[name], other[name]) for name in one)
    # Carried on: lora_B never falls back to zero, and each job moves its parent only a little.
    norms = [lora_b(tensors) for tensors in weights]
    assert all(norm > 0 for norm in norms)
    begins = [event for event in root.events("run.evaluated") if event["when"] == "before"]
    ends = [event for event in root.events("run.evaluated") if event["when"] == "after"]
    assert begins[1]["held_out_loss"] < begins[0]["held_out_loss"]
    assert all(after["held_out_loss"] < before["held_out_loss"] for before, after in zip(begins, ends, strict=True))
    # Each new dataset found the finished run's checkpoints and cleared them.
    assert [job.result.cleared for job in jobs] == [0, 2, 2]  # type: ignore[union-attr]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(root.tables["model"]["model_name_or_path"]), root.settings.model_dir
    )
    loaded = model.state_dict()
    assert any("lora_B" in name and tensor.abs().sum() > 0 for name, tensor in loaded.items())
    assert root.stop() == 0
    assert_sound(root)


def test_the_trap_that_the_guard_exists_for(root: Root, tiny_base: Path, tmp_path: Path) -> None:
    """Plain `Trainer(resume_from_checkpoint=True)` on the folders of a finished run trains nothing and calls it success."""
    root.start()
    root.drop("a.jsonl", rows(0, 40))
    first = root.finished("a.jsonl")
    assert first.result is not None
    folder = tmp_path / "plain"
    folder.mkdir()
    newest = max(root.settings.model_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    (folder / newest.name).symlink_to(newest)

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    network = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base),
        LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    )
    other = [
        tokenizer(row["prompt"] + row["completion"], truncation=True, max_length=64)
        for row in rows(0, 24, "gsm8k_pairs.jsonl")
    ]
    plain = Trainer(
        model=network,
        args=TrainingArguments(
            output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        ),
        train_dataset=[{**row, "labels": row["input_ids"]} for row in other],
        data_collator=lambda batch: _pad(batch, tokenizer.pad_token_id),
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    output = plain.train(resume_from_checkpoint=True)
    assert output.training_loss == 0.0
    assert output.global_step == first.result.steps_run  # the other run's counter; no step of this data was taken
    resumed = load_file(newest / "adapter_model.safetensors")
    assert before.keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        if "lora_" in name:
            assert torch.equal(tensor, resumed[name.replace(".default", "")])

    # The same data through the daemon: cleared, all steps run.
    root.drop("b.jsonl", rows(0, 24, "gsm8k_pairs.jsonl"))
    second = root.finished("b.jsonl")
    assert second.state is JobState.SUCCEEDED, root.errors()
    assert second.result is not None
    assert second.result.steps_run == second.result.steps_planned >= 1
    assert second.result.cleared >= 1


def _pad(batch: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in batch)
    ids = torch.tensor([row["input_ids"] + [pad] * (width - len(row["input_ids"])) for row in batch])
    return {"input_ids": ids, "labels": ids.clone()}


def test_a_run_that_was_killed_twice_ends_like_one_that_was_not(
    make_root: MakeRoot, tiny_base: Path, tmp_path: Path
) -> None:
    """Trainer and then daemon are killed in mid-run; the weights at the end are the same to the bit, and every row was
    seen exactly once an epoch."""
    tables = {**TABLES, "training": {**TABLES["training"], "num_train_epochs": 2.0}, "lora": {"lora_dropout": 0.1}}
    whole = make_root("whole", base_model=tiny_base, tables=tables)
    broken = make_root("broken", base_model=tiny_base, tables=tables)
    for root in (whole, broken):
        slowed(root)
        root.start()
        root.drop("b.jsonl", rows(0, 60))
    allow(whole, 10_000)

    allow(broken, 5)
    job = broken.running("b.jsonl", step=3)
    wait_until(lambda: len(seen(broken, job)) >= 5, what="five steps")
    os.kill(broken.trainer(job).pid, signal.SIGKILL)
    allow(broken, 9)
    wait_until(
        lambda: (again := broken.job("b.jsonl")) and again.attempt == 2 and again.max_step >= 6, what="attempt 2"
    )
    wait_until(lambda: max(seen(broken, job), key=lambda step: step[0])[0] >= 9, what="nine steps")
    trainer = broken.trainer(job)
    broken.kill()
    allow(broken, 10_000)
    wait_until(lambda: not trainer.alive, what="the orphan to leave")
    broken.start()

    ended, expected = broken.finished("b.jsonl"), whole.finished("b.jsonl")
    assert ended.state is expected.state is JobState.SUCCEEDED, f"{ended.reason} {broken.errors()}"
    assert ended.result is not None
    assert expected.result is not None
    assert ended.attempt == 3
    assert ended.result.resumed_from is not None
    assert ended.result.steps_run == ended.result.steps_planned == expected.result.steps_run
    assert ended.result.adapter_digest == expected.result.adapter_digest
    assert ended.result.held_out_after == expected.result.held_out_after

    # What each step of the finished run was trained on: the last attempt that took it counts.
    last = dict(seen(broken, job))
    assert sorted(last) == list(range(1, ended.result.steps_run + 1))
    assert last == dict(seen(whole, expected))
    half = ended.result.steps_run // 2
    for epoch in (range(1, half + 1), range(half + 1, 2 * half + 1)):
        trained = [line for step in epoch for line in last[step]]
        assert len(trained) == len(set(trained)) == ended.result.rows
    for root in (whole, broken):
        assert root.stop() == 0
        assert_sound(root)


def seen(root: Root, job: Job) -> list[tuple[int, list[int]]]:
    """(step, line numbers of its rows) in the order in which the attempts took them."""
    path = run_dir_of(root.settings.state_dir, job.id) / "seen.jsonl"
    if not path.exists():
        return []
    return [(entry["step"], entry["lines"]) for entry in map(json.loads, path.read_text().splitlines())]


def test_stopping_the_daemon_seals_a_checkpoint_and_burns_no_attempt(root: Root) -> None:
    slowed(root)
    allow(root, 4)
    root.start()
    root.drop("a.jsonl", rows(0, 60))
    job = root.running("a.jsonl", step=3)
    wait_until(lambda: len(seen(root, job)) >= 4, what="four steps")
    trainer = root.trainer(job)
    allow(root, 5)
    assert root.stop() == 0
    assert not trainer.alive
    stopped = root.job("a.jsonl")
    assert stopped is not None
    assert stopped.state is JobState.QUEUED
    assert stopped.attempts_without_progress == 0
    assert stopped.max_step in (4, 5)  # sealed at the step where it was asked, not at the next multiple of save_steps
    assert_sound(root)
    allow(root, 10_000)
    root.start()
    done = root.finished("a.jsonl")
    assert done.state is JobState.SUCCEEDED, root.errors()
    assert done.result is not None
    assert done.result.resumed_from == f"checkpoint-{stopped.max_step}"
    assert done.result.steps_run == done.result.steps_planned


def test_loss_that_is_not_finite_fails_and_keeps_nothing(root: Root) -> None:
    root.configure(training={"learning_rate": 1e30, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"})
    root.drop("a.jsonl", rows(0, 40))
    assert root.run("run", "--once").returncode == 1
    job = root.job("a.jsonl")
    assert job is not None
    assert (job.state, job.failure) == (JobState.FAILED, "diverged")
    assert list_versions(root.settings.model_dir) == []
    assert_sound(root)
