"""A real Trainer on a tiny random Llama with LoRA: a run of a few steps takes tenths of a second on one
core.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

VOCABULARY = 128


def save_base_model(folder: Path, *, seed: int = 0) -> Path:
    """A Llama of some 60,000 parameters with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, *, seed: int = 0) -> Path:
    """`count` rows of 12 token ids."""
    numbers = random.Random(seed)
    rows = [{"input_ids": [numbers.randrange(VOCABULARY) for _ in range(12)]} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Seen(TrainerCallback):  # type: ignore[misc]
    """Which steps ran, with the learning rate of each."""

    def __init__(self) -> None:
        self.learning_rates: dict[int, float] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.learning_rates[state.global_step + 1] = kwargs["optimizer"].param_groups[0]["lr"]

    @property
    def steps(self) -> list[int]:
        return sorted(self.learning_rates)


def make_trainer(
    *, base: Path, dataset: Path, output_dir: Path, lora: dict[str, Any] | None = None, **arguments: Any
) -> tuple[Trainer, Seen]:
    """A Trainer for one epoch of batches of 4 that saves every 2 steps."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    settings.update(lora or {})
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    for row in rows:
        row["labels"] = row["input_ids"]
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(output_dir=str(output_dir), **{**defaults, **arguments})
    seen = Seen()
    return Trainer(model=model, args=args, train_dataset=rows, callbacks=[seen]), seen
