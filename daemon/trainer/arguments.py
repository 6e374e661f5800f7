"""transformers' TrainingArguments from a recipe."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from daemon.job import Plan
from daemon.recipe import Recipe
from daemon.trainer.requirements import external_reporters

LEAST_LOGGED = 20  # losses of a run, where it has so many steps: of fewer there is no curve
MIN_COMPILE_STEPS = 1000  # a shorter run takes longer to compile than it saves


def training_arguments(
    recipe: Recipe, plan: Plan, staging_dir: Path, precision: str, *, eval_steps: int = 0
) -> TrainingArguments:
    """Return the Trainer's arguments; what they default to in silence is spelled out."""
    training = recipe.training
    return TrainingArguments(
        output_dir=str(staging_dir),
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        per_device_train_batch_size=plan.global_batch_size,  # a whole step: RunTrainer divides it
        gradient_accumulation_steps=1,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=plan.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optim,
        seed=training.seed,
        data_seed=training.seed,
        bf16="bfloat16" in precision and torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        use_liger_kernel=training.use_liger_kernel,
        torch_compile=training.torch_compile and plan.total_steps >= MIN_COMPILE_STEPS,
        eval_strategy="steps" if eval_steps else "no",
        eval_steps=eval_steps or None,  # and after the last step
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=None,  # rotation is the guard's: it knows which checkpoints are intact
        logging_strategy="steps",
        logging_steps=min(training.logging_steps, max(1, plan.total_steps // LEAST_LOGGED)),
        logging_nan_inf_filter=False,  # the filter writes NaN as 0.0
        report_to=sorted(external_reporters(recipe)) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        push_to_hub=False,
    )
