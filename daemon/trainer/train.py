"""One run, from a specification to a sealed candidate. Read from top to bottom.

Order matters: lock, decide, clear, stamp - all before the first weight is touched, and all under one lock that is held
until the candidate is complete.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

import guard
from daemon import versions
from daemon.config import Recipe
from daemon.fingerprint import fingerprint_run
from daemon.job import FailureKind, Outcome, Plan, RunResult, RunSpec
from daemon.rows import iter_rows
from daemon.trainer.base import resolve_base
from daemon.trainer.card import model_card
from daemon.trainer.data import Example, Examples, plan, tokenise
from daemon.trainer.failure import RunFailure
from daemon.trainer.loop import LossWatch, RunTrainer, held_out_loss
from daemon.trainer.model import adapter_tensors, all_finite, load_model, load_tokenizer, lora_b_norm, precision_of
from daemon.trainer.report import Reporter
from daemon.trainer.session import StopFlag, check_unchanged


def train(spec: RunSpec, report: Reporter, stop: StopFlag) -> RunResult:
    """Run `spec`; returns a result that succeeded or was interrupted.

    Raises RunFailure with its kind for everything that went wrong, Interrupted when asked to stop before training.
    """
    started = time.monotonic()
    recipe = Recipe.model_validate(spec.recipe)
    model_dir = Path(spec.model_dir)
    key = guard.load_key(Path(spec.key_file)) if spec.key_file else None

    report.progress(phase="preparing")
    check_unchanged(spec)
    base = resolve_base(recipe.model)
    with guard.ModelLock(model_dir, owner=f"job {spec.job_id}"):
        # 1. Whose checkpoints are these?
        parent = versions.current_version(model_dir) if recipe.training.start_from == "latest" else None
        precision = precision_of(recipe.model)
        fingerprint = fingerprint_run(
            dataset=spec.dataset,
            recipe=recipe,
            base_path=base.path,
            base_revision=base.revision,
            parent_version=parent.name if parent else None,
            parent_digest=parent.digest if parent else None,
            precision=precision,
            cache_path=Path(spec.state_dir) / "digests.json" if spec.state_dir else None,
        )
        prepared = guard.prepare_run(
            model_dir,
            fingerprint=fingerprint,
            dataset_path=Path(spec.dataset.path),
            lora_config={
                "r": recipe.lora.r,
                "alpha": recipe.lora.lora_alpha,
                "dropout": recipe.lora.lora_dropout,
            },
            key=key,
            log=lambda name, data: report.event(name, **data),
        )
        stop.check()

        # 2. Rows become tokens; the arithmetic is known before the first step.
        tokenizer = load_tokenizer(base)
        rows = iter_rows(Path(spec.dataset.path), spec.dataset.format, recipe.data)
        examples = tokenise(rows, tokenizer, recipe.data)
        planned = plan(examples, recipe.training)
        report.event("run.planned", **vars(planned), **arithmetic(planned))
        stop.check()

        # 3. Base model and adapter.
        set_seed(recipe.training.seed)
        model = load_model(base, recipe.model, recipe.lora, parent.path if parent else None)
        before = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
        if torch.cuda.is_available():
            model.to("cuda")
        evaluated = held_out_sample(examples, recipe.data.held_out_max_rows)
        report.progress(phase="evaluating", total_steps=planned.total_steps)
        loss_before = held_out_loss(model, evaluated, tokenizer.pad_token_id, recipe.training, stop)
        if loss_before is not None:
            report.event("run.evaluated", when="before", held_out_loss=loss_before, rows=len(evaluated))

        # 4. Train; every checkpoint is staged, sealed, renamed.
        trainer = RunTrainer(
            model=model,
            args=training_arguments(recipe, planned, prepared.staging_dir, precision),
            examples=examples.train,
            pad_token_id=tokenizer.pad_token_id,
            tokenizer=tokenizer,
        )
        watch = LossWatch(report=report, stop=stop, plan=planned, trainer=trainer)
        trainer.add_callback(watch)
        trainer.add_callback(
            guard.SealCallback(prepared, keep=recipe.training.save_total_limit, key=key, on_sealed=watch.sealed)
        )
        start_step = prepared.verdict.checkpoint.step if prepared.verdict.checkpoint else 0
        resumed_from = prepared.resume_from.name if prepared.resume_from else None
        report.event("run.started", start_step=start_step, total_steps=planned.total_steps, resumed_from=resumed_from)
        report.progress(
            phase="training",
            step=start_step,
            start_step=start_step,
            total_steps=planned.total_steps,
            resumed_from=resumed_from,
        )
        steps_run = trainer.run(prepared.resume_from, planned)
        result = RunResult(
            outcome=Outcome.SUCCEEDED,
            steps_planned=planned.total_steps,
            steps_run=steps_run,
            start_step=start_step,
            resumed_from=resumed_from,
            verdict=prepared.verdict.kind.name.lower(),
            reasons=prepared.verdict.reasons,
            cleared=prepared.cleared.cleared if prepared.cleared else 0,
            train_loss=watch.mean_loss,
            held_out_before=loss_before,
            tokens_per_second=watch.tokens_per_second,
            tokens_trained=watch.tokens,
            rows=planned.rows,
            dropped_rows=planned.dropped_rows,
            held_out_rows=planned.held_out_rows,
        )
        if stop.requested and steps_run < planned.total_steps:
            wall = time.monotonic() - started
            return replace(
                result, outcome=Outcome.INTERRUPTED, message=f"stopped at step {steps_run}", wall_seconds=wall
            )

        # 5. Nothing that is not whole leaves this function as a success.
        require_whole_run(steps_run, planned, watch.mean_loss)
        loss_after = held_out_loss(model, evaluated, tokenizer.pad_token_id, recipe.training, stop)
        if loss_after is not None:
            report.event("run.evaluated", when="after", held_out_loss=loss_after, rows=len(evaluated))
        report.progress(phase="finishing", step=steps_run, held_out_loss=loss_after)
        norm = lora_b_norm(model)
        require_learned(model, before, norm)
        candidate = save_candidate(trainer, prepared.staging_dir / f"candidate-{spec.job_id}", tokenizer)
        result = replace(
            result,
            held_out_after=loss_after,
            lora_norm=norm,
            candidate=str(candidate),
            adapter_digest=guard.digest_file(candidate / "adapter_model.safetensors").blake3_hex,
            warnings=warnings_of(examples, planned, loss_before, loss_after),
            wall_seconds=time.monotonic() - started,
        )
        (candidate / "README.md").write_text(model_card(spec, recipe, planned, result, parent), encoding="utf-8")
        return result


def training_arguments(recipe: Recipe, planned: Plan, staging_dir: Path, precision: str) -> TrainingArguments:
    """transformers' arguments from the recipe; what they default to in silence is spelled out."""
    training = recipe.training
    return TrainingArguments(
        output_dir=str(staging_dir),
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=planned.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optim,
        seed=training.seed,
        data_seed=training.seed,
        bf16=precision == "bfloat16" and torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        # Named only when asked for: the library deprecates the argument under either name from one release to the next.
        **({"gradient_checkpointing": True} if training.gradient_checkpointing else {}),
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=None,  # rotation is the guard's: it knows which checkpoints are intact
        logging_strategy="steps",
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,  # the filter writes NaN as 0.0
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        push_to_hub=False,
    )


def held_out_sample(examples: Examples, most: int) -> list[Example]:
    """The rows that are evaluated: the same ones whatever the order of the file."""
    return sorted(examples.held_out, key=lambda example: (example.content_digest, example.line))[:most]


def arithmetic(planned: Plan) -> dict[str, Any]:
    """The plan in words, for the log."""
    return {
        "arithmetic": f"{planned.rows} rows / {planned.global_batch_size} a step -> {planned.steps_per_epoch} steps an"
        f" epoch x {planned.epochs:g} = {planned.total_steps} steps, {planned.tokens / max(planned.rows, 1):.0f} tokens a row"
    }


def require_whole_run(steps_run: int, planned: Plan, mean_loss: float | None) -> None:
    """Raise RunFailure unless every planned step ran, at least one, with a finite loss."""
    if steps_run != planned.total_steps or steps_run < 1:
        raise RunFailure(
            FailureKind.INTERNAL,
            f"{steps_run} of {planned.total_steps} planned steps ran",
            hint="nothing was promoted; the trainer's log in the run directory tells more",
        )
    if mean_loss is not None and not torch.isfinite(torch.tensor(mean_loss)):
        raise RunFailure(FailureKind.DIVERGED, f"the mean loss is {mean_loss}", hint="lower learning_rate")


def require_learned(model: Any, before: dict[str, torch.Tensor], norm: float) -> None:
    """Raise RunFailure when the weights are not finite, did not change, or amount to nothing."""
    if not all_finite(model):
        raise RunFailure(FailureKind.DIVERGED, "the adapter has NaN or infinite weights", hint="lower learning_rate")
    after = adapter_tensors(model)
    unchanged = all(torch.equal(before[name], tensor.cpu()) for name, tensor in after.items())
    if unchanged or norm == 0.0:
        raise RunFailure(
            FailureKind.CONFIG,
            "the run left the adapter as it was" if unchanged else "the adapter amounts to nothing (lora_B is zero)",
            hint="look at learning_rate and warmup_steps: they decide how far a short run moves",
        )


def save_candidate(trainer: RunTrainer, folder: Path, tokenizer: Any) -> Path:
    """Write the finished adapter, complete, beside the checkpoints' staging; safetensors and text only."""
    shutil.rmtree(folder, ignore_errors=True)
    trainer.model.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
    return folder


def warnings_of(examples: Examples, planned: Plan, before: float | None, after: float | None) -> tuple[str, ...]:
    """What a person should look at although the run succeeded."""
    found = []
    if examples.dropped_lines:
        shown = ", ".join(map(str, examples.dropped_lines[:10]))
        found.append(f"{len(examples.dropped_lines)} rows had no token to train on (lines {shown})")
    if examples.truncated_rows:
        found.append(f"{examples.truncated_rows} rows were cut to max_length")
    if planned.trained_tokens < 0.05 * planned.tokens:
        found.append(f"only {planned.trained_tokens / planned.tokens:.1%} of the tokens are trained")
    if before is not None and after is not None and after > before:
        found.append(f"held-out loss rose from {before:.4f} to {after:.4f}")
    return tuple(found)
