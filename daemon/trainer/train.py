"""One run, from a specification to a sealed candidate. Read from top to bottom.

Order matters: lock, decide, clear, stamp - all before the first weight is touched, and all under one lock that is held
until the candidate is complete.
"""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations

import guard
from daemon import versions
from daemon.dataset.rows import Format, RowReader
from daemon.fingerprint import fingerprint_run, minor_version
from daemon.job import FailureKind, Outcome, Plan, RunResult, RunSpec, claimed_on
from daemon.recipe import Recipe
from daemon.run_dir import TENSORBOARD_NAME, RunWriter
from daemon.trainer import distributed
from daemon.trainer.attempt import StopFlag, check_unchanged
from daemon.trainer.attention import use_packed
from daemon.trainer.base_model import BaseModel, offline, resolve_base
from daemon.trainer.callbacks import MonitorCallback
from daemon.trainer.capacity import capacity_of, padding_token, refuse_what_does_not_fit
from daemon.trainer.card import model_card
from daemon.trainer.collate import PASS_TOKENS, Collator, Example, Examples, plan
from daemon.trainer.errors import RunFailure
from daemon.trainer.loop import RunTrainer, enable_gradient_checkpointing, held_out_loss
from daemon.trainer.loss import Objective
from daemon.trainer.model import (
    adapter_tensors,
    all_finite,
    attention_of,
    load_model,
    lora_b_norm,
    lora_config,
    precision_of,
)
from daemon.trainer.room import full_disk_is_told
from daemon.trainer.summary import arithmetic, timing, warnings_of
from daemon.trainer.tensorboard import ScalarWriter
from daemon.trainer.tokenise import digest_tokens, tokenise, worker_processes
from daemon.trainer.tokenizer import load_tokenizer

# What a resume relies on: checkpoints loaded by weights alone, and the Trainer whose silences we know.
OLDEST = {"torch": (2, 10), "transformers": (5, 0)}

COMPILE_LEAST_STEPS = 1000  # below, compiling takes longer than it saves


def train(spec: RunSpec, report: RunWriter, stop: StopFlag) -> RunResult:
    """Run `spec`; returns a result that succeeded or was interrupted.

    Raises RunFailure with its kind for everything that went wrong, Interrupted when asked to stop before training.
    """
    started = time.monotonic()
    recipe = Recipe.model_validate(spec.recipe)
    model_dir = Path(spec.model_dir)
    key = guard.load_key(Path(spec.key_file)) if spec.key_file else None
    first = distributed.process() == 0

    # 1. Rows become tokens, in forks of this process, so before CUDA starts; the arithmetic is known before the first step.
    report.progress(phase="preparing")
    check_unchanged(spec)
    base = resolve_base(recipe.model)
    require_packages(recipe)
    recipe = with_attention(recipe, attention_of(base, recipe.model))  # by its name, also in the fingerprint
    tokenizer = load_tokenizer(base)
    reader = RowReader(Path(spec.dataset.path), Format(spec.dataset.format), recipe.data)
    # A process that has started CUDA, as some package may have when it was imported, cannot be forked.
    most = 1 if torch.cuda.is_initialized() else worker_processes(spec.dataset.rows)
    workers = max(1, most // distributed.processes())
    examples = tokenise(
        reader.lines(), tokenizer, recipe.data, read=reader.row, processes=workers, day=claimed_on(spec.job_id)
    )
    capacity = capacity_of(base)
    refuse_what_does_not_fit(examples, tokenizer, capacity)
    check_unchanged(spec)  # again: what was digested is what was read, also when somebody wrote in between
    planned = plan(examples, recipe.training)
    report.event("run.planned", **vars(planned), arithmetic=arithmetic(planned, examples, recipe))
    tokenised = time.monotonic()
    stop.check()

    distributed.join()
    lock = guard.ModelLock(model_dir, owner=f"job {spec.job_id}") if first else nullcontext()
    with lock, offline(), ExitStack() as stack:
        # 2. Whose checkpoints are these?
        parent = versions.current_version(model_dir) if recipe.training.start_from == "latest" else None
        precision = precision_of(recipe.model)
        prepared = distributed.from_first(
            prepare(
                spec,
                recipe,
                base,
                planned,
                tokens_digest=digest_tokens(examples.train),
                parent=parent,
                precision=precision,
                key=key,
                report=report,
            )
            if first
            else None
        )
        if first:
            stack.enter_context(full_disk_is_told(prepared.staging_dir))
        if prepared.resume_from is not None:
            refuse_old_libraries()
        stop.check()

        # 3. Base model and adapter.
        set_seed(recipe.training.seed)
        model = load_model(base, recipe.model, recipe.lora, parent.path if parent else None)
        before = {name: tensor.detach().to("cpu", copy=True) for name, tensor in adapter_tensors(model).items()}
        if torch.cuda.is_available() and not recipe.model.load_in_4bit:
            model.to("cuda")
        if recipe.training.gradient_checkpointing is True:
            enable_gradient_checkpointing(model)
        collator = collator_for(model, recipe, examples, padding_token(tokenizer, capacity.tokens))
        objective = Objective()
        if not (recipe.training.use_liger_kernel or recipe.training.torch_compile):  # they have ways of their own
            objective.select_trained(model, examples.train)
        evaluated = held_out_sample(examples, recipe.data.held_out_max_rows)
        report.progress(phase="evaluating", total_steps=planned.total_steps)
        loss_before = held_out_loss(model, evaluated, collator, objective, stop)
        if loss_before is not None:
            report.event("run.evaluated", when="before", held_out_loss=loss_before, rows=len(evaluated))
        loaded = time.monotonic()

        # 4. Train; every checkpoint is staged, sealed, renamed.
        trainer = RunTrainer(
            model=model,
            args=training_arguments(recipe, planned, prepared.staging_dir, precision),
            examples=examples.train,
            collator=collator,
            objective=objective,
            tokenizer=tokenizer,
            grouped=recipe.training.train_sampling_strategy == "group_by_length",
            checkpoint_when_full=recipe.training.gradient_checkpointing == "auto",
            report=report,
        )
        scalars = ScalarWriter(Path(spec.run_dir) / TENSORBOARD_NAME) if first else None
        watch = MonitorCallback(report=report, stop=stop, plan=planned, trainer=trainer, scalars=scalars)
        trainer.add_callback(watch)
        trainer.add_callback(
            guard.SealCallback(prepared, keep=recipe.training.save_total_limit, key=key, on_sealed=watch.sealed)
        )
        start_step = prepared.verdict.checkpoint.step if prepared.verdict.checkpoint else 0
        resumed_from = prepared.resume_from.name if prepared.resume_from else None
        if loss_before is not None:
            watch.draw(start_step, {"held_out/loss": loss_before})
        report.event(
            "run.started",
            start_step=start_step,
            total_steps=planned.total_steps,
            resumed_from=resumed_from,
            tokenised_seconds=round(tokenised - started, 3),
            loaded_seconds=round(loaded - tokenised, 3),
            flat=collator.flat,
            scores_trained_only=objective.selects,
        )
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
            samples=planned.samples,
            refused_rows=len(examples.refused),
            dropped_rows=planned.dropped_rows,
            held_out_rows=planned.held_out_rows,
            truncated_rows=examples.truncated_rows,
            trained_share=planned.trained_tokens / planned.tokens,
            spikes=tuple(step for step, _, _ in watch.spikes),
        )
        if steps_run < planned.total_steps and distributed.total([float(stop.requested)])[0]:
            wall = time.monotonic() - started
            return replace(
                result, outcome=Outcome.INTERRUPTED, message=f"stopped at step {steps_run}", wall_seconds=wall
            )

        # 5. Nothing that is not whole leaves this function as a success.
        require_whole_run(steps_run, planned, watch.mean_loss)
        norm = lora_b_norm(model)
        require_learned(model, before, norm)
        loss_after = held_out_loss(model, evaluated, collator, objective, stop)
        if loss_after is not None:
            report.event("run.evaluated", when="after", held_out_loss=loss_after, rows=len(evaluated))
            watch.draw(steps_run, {"held_out/loss": loss_after})
        report.event("run.trained", **timing(watch))
        report.progress(phase="finishing", step=steps_run, held_out_loss=loss_after)
        if not first:  # process 0 writes; the others have agreed on every number
            return replace(result, held_out_after=loss_after, lora_norm=norm)
        candidate = save_candidate(trainer, prepared.staging_dir / f"candidate-{spec.job_id}", tokenizer)
        result = replace(
            result,
            held_out_after=loss_after,
            lora_norm=norm,
            candidate=str(candidate),
            adapter_digest=guard.digest_file(candidate / "adapter_model.safetensors").blake3_hex,
            warnings=warnings_of(
                examples, planned, capacity, before=loss_before, after=loss_after, spikes=watch.spikes
            ),
            wall_seconds=time.monotonic() - started,
        )
        (candidate / "README.md").write_text(model_card(spec, recipe, planned, result, parent), encoding="utf-8")
        return result


def prepare(
    spec: RunSpec,
    recipe: Recipe,
    base: BaseModel,
    planned: Plan,
    *,
    tokens_digest: str,
    parent: versions.Version | None,
    precision: str,
    key: bytes | None,
    report: RunWriter,
) -> guard.PreparedRun:
    """Ask the guard, let it clear and stamp; under the model directory's lock."""
    fingerprint = fingerprint_run(
        dataset=spec.dataset,
        recipe=recipe,
        base_path=base.path,
        base_revision=base.revision,
        parent_version=parent.name if parent else None,
        parent_digest=parent.digest if parent else None,
        precision=precision,
        plan=planned,
        tokens_digest=tokens_digest,
        lora_config=lora_config(recipe.lora, base).to_dict(),
        cache_path=Path(spec.state_dir) / "digests.json" if spec.state_dir else None,
    )
    return guard.prepare_run(
        Path(spec.model_dir),
        fingerprint=fingerprint,
        dataset_path=Path(spec.dataset.path),
        lora_config={"r": recipe.lora.r, "alpha": recipe.lora.lora_alpha, "dropout": recipe.lora.lora_dropout},
        key=key,
        log=lambda name, data: report.event(name, **data),
    )


def with_attention(recipe: Recipe, name: str) -> Recipe:
    """The recipe with this attention kernel."""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"attn_implementation": name})})


def require_packages(recipe: Recipe) -> None:
    """Raise RunFailure(CONFIG) before anything is done when the recipe needs a package that is not installed."""
    if recipe.training.use_liger_kernel and find_spec("liger_kernel") is None:
        raise RunFailure(
            FailureKind.CONFIG,
            "use_liger_kernel needs the package liger-kernel",
            hint="`pip install 'dropforge[gpu]'`, or use_liger_kernel = false under [training]",
        )
    missing = others_reported_to(recipe) - {*get_available_reporting_integrations(), "all", "none"}
    if missing:
        raise RunFailure(
            FailureKind.CONFIG,
            f"report_to names {', '.join(sorted(missing))}, whose package is not installed",
            hint="install it into the trainer's environment, or take it out of report_to under [training]",
        )


def others_reported_to(recipe: Recipe) -> set[str]:
    """Where else the run's numbers go. TensorBoard's events are written anyway, by ourselves, into the run directory."""
    return set(recipe.training.report_to) - {"tensorboard"}


def refuse_old_libraries() -> None:
    """Raise RunFailure(CONFIG) when a checkpoint would be loaded by libraries older than those whose loading we know."""
    for package, oldest in OLDEST.items():
        found = minor_version(package) or "0.0"
        if tuple(map(int, found.split(".")[:2])) < oldest:
            raise RunFailure(
                FailureKind.CONFIG,
                f"a run cannot be resumed with {package} {found}",
                hint=f"install {package} {'.'.join(map(str, oldest))} or newer into the trainer's environment",
            )


def collator_for(model: Any, recipe: Recipe, examples: Examples, pad_token_id: int) -> Collator:
    """How steps are divided into passes on this device: without padding where that is faster and proven the same."""
    device = next(model.parameters()).device.type
    return Collator(
        pad_token_id=pad_token_id,
        budget_tokens=recipe.training.per_device_train_batch_size * recipe.data.max_length,
        flat=device == "cuda" and use_packed(model, examples.train),
        pass_tokens=PASS_TOKENS.get(device, PASS_TOKENS["cuda"]),
        process=distributed.process(),
        processes=distributed.processes(),
    )


def training_arguments(recipe: Recipe, planned: Plan, staging_dir: Path, precision: str) -> TrainingArguments:
    """transformers' arguments from the recipe; what they default to in silence is spelled out."""
    training = recipe.training
    return TrainingArguments(
        output_dir=str(staging_dir),
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        per_device_train_batch_size=planned.global_batch_size,  # a whole step: RunTrainer divides it
        gradient_accumulation_steps=1,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=planned.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optim,
        seed=training.seed,
        data_seed=training.seed,
        bf16="bfloat16" in precision and torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        use_liger_kernel=training.use_liger_kernel,
        torch_compile=training.torch_compile and planned.total_steps >= COMPILE_LEAST_STEPS,
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=None,  # rotation is the guard's: it knows which checkpoints are intact
        logging_strategy="steps",
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,  # the filter writes NaN as 0.0
        report_to=sorted(others_reported_to(recipe)) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        push_to_hub=False,
    )


def held_out_sample(examples: Examples, most: int) -> list[Example]:
    """The rows that are evaluated: the same ones whatever the order of the file."""
    return sorted(examples.held_out, key=lambda example: (example.content_digest, example.line))[:most]


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
