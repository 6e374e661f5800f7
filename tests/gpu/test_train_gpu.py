"""What only a CUDA device can show; skipped where there is none."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from daemon.executors.forked import ForkedExecutor
from daemon.job import FailureKind, Outcome
from daemon.trainer import loop
from daemon.trainer.attention import PACKED, use_packed
from daemon.trainer.collate import Collator, Example, flatten, pad
from daemon.trainer.errors import RunFailure
from daemon.trainer.loop import held_out_loss
from daemon.trainer.loss import Objective
from tests.support.inprocess import Wish, events, rows, specify, train
from tests.support.root import wait_until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHORT = {"training": {"max_steps": 3, "per_device_train_batch_size": 4}, "data": {"max_length": 256}}


@pytest.fixture(scope="module")
def large_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of about 0.6 billion random parameters, with grouped queries, under the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("large") / "base"
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_run_is_in_bf16_and_flattened(large_base: Path, tmp_path: Path) -> None:
    spec = specify(tmp_path, rows(40), large_base, SHORT)
    result = train(spec)
    assert result.outcome is Outcome.SUCCEEDED
    assert events(spec, "run.started")[0]["flat"] is True
    assert result.held_out_after is not None
    assert result.held_out_before is not None
    assert events(spec, "run.started")[0]["scores_trained_only"] is True
    assert events(spec, "run.trained")[0]["bookkeeping_share"] < 0.05


def test_varlen_attention_computes_what_padded_rows_do(large_base: Path) -> None:
    """In bf16, within its rounding."""
    examples = [
        Example(input_ids=ids, learned=((0, size),), line=size, content_digest="")
        for size in (300, 17, 129, 64)
        for ids in [torch.randint(10, 400, (size,)).tolist()]
    ]
    losses = []
    for flat in (False, True):
        torch.manual_seed(0)
        network = LlamaForCausalLM.from_pretrained(large_base, dtype=torch.bfloat16)
        model = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).to("cuda")
        if flat:
            assert use_packed(model, examples)
            assert model.get_base_model().config._attn_implementation == PACKED
        batch = flatten(examples) if flat else pad(examples, 0)
        batch = {name: value.to("cuda") if hasattr(value, "to") else value for name, value in batch.items()}
        losses.append(float(model(**batch, num_items_in_batch=500).loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


@pytest.mark.parametrize("flat", [False, True])
def test_scoring_trained_positions_alone_computes_what_scoring_all_does(large_base: Path, flat: bool) -> None:
    """In bf16, within its rounding, as the run computes it: under autocast."""
    examples = [
        Example(input_ids=ids, learned=((size // 2, size),), line=size, content_digest="")
        for size in (300, 17, 129, 64)
        for ids in [torch.randint(10, 400, (size,)).tolist()]
    ]
    losses = []
    for selects in (False, True):
        torch.manual_seed(0)
        network = LlamaForCausalLM.from_pretrained(large_base, dtype=torch.bfloat16)
        model = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).to("cuda")
        objective = Objective()
        assert not selects or objective.select_trained(model, examples)
        collator = Collator(pad_token_id=0, budget_tokens=4096, flat=flat and use_packed(model, examples))
        assert collator.flat is flat
        losses.append(held_out_loss(model, examples, collator, objective, Wish()))  # type: ignore[arg-type]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_a_process_that_has_started_cuda_tokenises_alone(tiny_base: Path, tmp_path: Path) -> None:
    """Rows enough for several processes; this one cannot be forked any more."""
    torch.cuda.init()
    content = rows(300) * 8
    result = train(specify(tmp_path, content, tiny_base, {**SHORT, "data": {"max_length": 64}}))
    assert result.outcome is Outcome.SUCCEEDED


def test_running_out_of_memory_divides_the_step(
    large_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real allocation that cannot be had, in a pass that is too large."""
    compute = loop.RunTrainer.compute_loss

    def greedy(self: Any, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        if inputs["input_ids"].numel() > 600:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return compute(self, model, inputs, *args, **options)

    monkeypatch.setattr(loop.RunTrainer, "compute_loss", greedy)
    spec = specify(tmp_path, rows(24), large_base, {**SHORT, "data": {"max_length": 256, "held_out_fraction": 0.0}})
    assert train(spec).outcome is Outcome.SUCCEEDED
    assert events(spec, "run.passes_halved")


def test_a_divergence_is_found_although_numbers_arrive_late(
    large_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = loop.RunTrainer.compute_loss

    def poisoned(self: Any, *args: Any, **options: Any) -> Any:
        loss = compute(self, *args, **options)
        return loss * float("nan") if self.state.global_step == 1 else loss

    monkeypatch.setattr(loop.RunTrainer, "compute_loss", poisoned)
    with pytest.raises(RunFailure, match="at step 2") as caught:
        train(specify(tmp_path, rows(40), large_base, SHORT))
    assert caught.value.kind is FailureKind.DIVERGED


def test_a_forked_trainer_starts_cuda_of_its_own(tiny_base: Path, tmp_path: Path) -> None:
    import sys

    executor = ForkedExecutor((sys.executable, "-P", "-m", "daemon.trainer"))
    try:
        for number in range(3):
            spec = replace(specify(tmp_path / str(number), rows(24), tiny_base, SHORT), daemon_pid=os.getpid())
            was_warm = executor.is_ready
            executor.launch(spec)
            wait_until(lambda: executor.poll(Path(spec.run_dir)), 120, "the job")  # noqa: B023  waited for here
            result = json.loads((Path(spec.run_dir) / "result.json").read_text())
            assert result["outcome"] == "succeeded", result["message"]
            if number == 0:
                wait_until(lambda: executor.is_ready, 120, "the fork server")
        assert was_warm
    finally:
        executor.close()


def test_qlora_trains(large_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is in the extra `gpu`")
    result = train(specify(tmp_path, rows(24), large_base, {**SHORT, "model": {"load_in_4bit": True}}))
    assert result.outcome is Outcome.SUCCEEDED
