"""One run, from a specification to a sealed candidate. Read `train` from top to bottom."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import set_seed

import guard
from daemon.base_identity import BaseModel
from daemon.dataset.rows import Format, RowReader
from daemon.job import FailureKind, HeldOutPoint, Outcome, Plan, RunResult, RunSpec, claimed_on
from daemon.limits import LimitSettings, plan_refusal
from daemon.recipe import Recipe
from daemon.run_dir import TENSORBOARD_NAME, RunWriter
from daemon.text import LIMITS_HINT
from daemon.trainer import distributed
from daemon.trainer.arguments import training_arguments
from daemon.trainer.attempt import StopFlag, check_unchanged
from daemon.trainer.attention import use_packed
from daemon.trainer.base_model import load_tokenizer, offline
from daemon.trainer.callbacks import MonitorCallback, open_scalars
from daemon.trainer.candidate import require_learned, require_whole_run, save_candidate
from daemon.trainer.capacity import Capacity, capacity_of, padding_token, refuse_what_does_not_fit
from daemon.trainer.card import model_card
from daemon.trainer.checkpoints import Kept, Start, decide_start, keep_best, seal_checkpoints
from daemon.trainer.collate import PASS_TOKENS, Collator, Example, Examples, in_order, plan
from daemon.trainer.errors import Interrupted, RunFailure, report_full_disk
from daemon.trainer.evals import Finished, ask_evals, evals_of
from daemon.trainer.evaluation import Assessor, keyed
from daemon.trainer.generation import generation_config
from daemon.trainer.loop import RunTrainer, enable_gradient_checkpointing, held_out_loss
from daemon.trainer.loss import Objective
from daemon.trainer.memory import EarlierDataset, leave_memory, read_known
from daemon.trainer.model import adapter_tensors, load_model, lora_b_norm, resolve_attention
from daemon.trainer.origin import Origin, find_origin, require_as_proven, require_base
from daemon.trainer.rehearsal import Replay, find_replaced, rehearse, replaced_for_all
from daemon.trainer.requirements import require_packages
from daemon.trainer.scoring import Scorer, by_line
from daemon.trainer.selection import Selection, best_point, thinned
from daemon.trainer.summary import (
    arithmetic,
    data_warnings,
    evaluation_warnings,
    selection_warnings,
    timing,
    training_warnings,
)
from daemon.trainer.tokenise import tokenise, worker_processes


def train(spec: RunSpec, writer: RunWriter, stop: StopFlag) -> RunResult:
    """Run `spec`; returns a result that succeeded or was interrupted.

    Raises RunFailure with its kind for everything that went wrong, Interrupted when asked to stop before training.
    """
    run = configure(spec, writer, stop)
    data = load_examples(run)  # forks: before CUDA starts
    distributed.init_process_group()
    main = distributed.is_main_process()
    with guard.ModelLock(Path(spec.model_dir), owner=f"job {spec.job_id}") if main else nullcontext(), offline():
        # fresh | resume | stale -> cleared
        start = decide_start(
            spec,
            run.recipe,
            run.base,
            data.examples,
            data.plan,
            origin=run.origin,
            replay=data.replay,
            key=run.key,
            writer=writer,
        )
        with report_full_disk(start.staging_dir) if main else nullcontext():
            stop.check()
            loaded = load_for_training(run, data, start)
            fitted = fit(run, data, start, loaded)  # every checkpoint is staged, sealed, renamed
            return finish(run, data, start, loaded, fitted)  # all steps, finite, changed, or RunFailure


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is asked for, with every "auto" of the recipe resolved."""

    spec: RunSpec
    recipe: Recipe
    base: BaseModel
    origin: Origin
    key: bytes | None  # of the seals
    writer: RunWriter
    stop: StopFlag
    started_at: float  # time.monotonic()


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The dataset as tokens, and the run's arithmetic."""

    tokenizer: Any
    examples: Examples
    capacity: Capacity
    plan: Plan
    replay: Replay
    earlier: tuple[EarlierDataset, ...]  # what the parent has learned, without what this dataset replaces
    warnings: tuple[str, ...]
    ready_at: float  # time.monotonic()


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """Base model and adapter before the first step, and how they are trained and evaluated."""

    model: PeftModel
    initial: dict[str, torch.Tensor]  # the adapter's tensors, on the CPU
    collator: Collator
    objective: Objective
    held_out: list[Example]
    held_out_before: float | None  # loss over them; None: there are none
    ready_at: float  # time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Where the training loop ended."""

    monitor: MonitorCallback
    steps_run: int  # the run's step counter, earlier attempts included
    interrupted: bool
    points: tuple[HeldOutPoint, ...] = ()  # evaluations during the run, earlier attempts included
    kept: Kept  # the model has the weights of that step
    stopped_early: bool


def configure(spec: RunSpec, writer: RunWriter, stop: StopFlag) -> Run:
    """Find the base model, the version to continue, and what the recipe leaves open.

    Raises RunFailure(CONFIG), RunFailure(BAD_DATA), RunFailure(IDENTITY).
    """
    started_at = time.monotonic()
    recipe = Recipe.model_validate(spec.recipe)
    key = guard.load_key(Path(spec.key_file)) if spec.key_file else None
    writer.progress(phase="preparing")
    check_unchanged(spec)
    base = require_base(spec, recipe)
    require_packages(recipe)
    origin = find_origin(spec, recipe, base)
    if origin.warnings:
        writer.event("run.origin_warned", warnings=origin.warnings)
    # The kernel by its name, so that it is part of the fingerprint.
    settings = recipe.model.model_copy(update={"attn_implementation": resolve_attention(base, recipe.model)})
    return Run(
        spec=spec,
        recipe=recipe.model_copy(update={"model": settings}),
        base=base,
        origin=origin,
        key=key,
        writer=writer,
        stop=stop,
        started_at=started_at,
    )


def load_examples(run: Run) -> TrainingData:
    """Tokenise the dataset, in forks of this process, and plan the steps.

    Raises RunFailure(BAD_DATA) when the dataset changed, RunFailure(CONFIG) when it does not fit the base model.
    """
    spec, recipe = run.spec, run.recipe
    tokenizer = load_tokenizer(run.base)
    known = read_known(spec, run.origin.parent)
    reader = RowReader(Path(spec.dataset.path), Format(spec.dataset.format), recipe.data)
    # A process that has started CUDA, as some package may have when it was imported, cannot be forked.
    processes = 1 if torch.cuda.is_initialized() else worker_processes(spec.dataset.rows)
    examples = tokenise(
        reader.lines(),
        tokenizer,
        recipe.data,
        read=reader.row,
        processes=max(1, processes // distributed.world_size()),
        day=claimed_on(spec.job_id),
        held_out_before=known.held_out,
        held_out_again=known.held_out_of(spec.dataset.digest),
        prompts=known.prompts,
        force=spec.force,
    )
    own = plan(examples, recipe.training)  # what is rehearsed beside them is nothing that the file asks for
    replaced = find_replaced(spec, recipe, examples, known)
    replay = rehearse(spec, recipe, tokenizer, examples=examples, known=known, replaced=replaced)
    examples = replace(examples, replay=replay.examples, replay_rows=replay.rows)
    capacity = capacity_of(run.base)
    refuse_what_does_not_fit(examples, tokenizer, capacity)
    planned = plan(examples, recipe.training)
    limits = LimitSettings.model_validate(spec.limits)
    if too_much := plan_refusal(own.total_steps, own.tokens, limits):
        raise RunFailure(FailureKind.CONFIG, too_much, hint=LIMITS_HINT)
    if distributed.is_main_process():
        leave_memory(spec, recipe, reader=reader, examples=examples, plan=planned, known=known, replaced=replaced)
    check_unchanged(spec)  # again: what was digested is what was read, also when somebody wrote in between
    if replay.datasets or replaced:
        run.writer.event(
            "run.replay_drawn",
            rows=replay.rows,
            trained_tokens=replay.tokens,
            wanted_tokens=replay.wanted_tokens,
            datasets={dataset.name: dataset.rows for dataset in replay.datasets},
            replaced_rows=len(replaced),
        )
    run.writer.event("run.planned", **vars(planned), arithmetic=arithmetic(planned, examples, recipe))
    if warnings := (
        *data_warnings(examples, planned, capacity),
        *selection_warnings(recipe.training, examples),
        *known.problems,
    ):
        run.writer.event("run.data_warned", warnings=warnings)
    run.stop.check()
    return TrainingData(
        tokenizer=tokenizer,
        examples=examples,
        capacity=capacity,
        plan=planned,
        replay=replay,
        earlier=known.without(replaced_for_all(spec, recipe, examples, known)),
        warnings=warnings,
        ready_at=time.monotonic(),
    )


def load_for_training(run: Run, data: TrainingData, start: Start) -> LoadedModel:
    """Load base model and adapter onto the device, choose how passes are computed, and evaluate the held-out rows.

    Raises RunFailure(CONFIG).
    """
    recipe, examples = run.recipe, data.examples
    set_seed(recipe.training.seed)
    model = load_model(run.base, recipe.model, recipe.lora, start.parent.path if start.parent else None)
    if distributed.is_main_process():
        require_as_proven(run.origin, run.base, run.spec.state_dir)
    initial = {name: tensor.detach().to("cpu", copy=True) for name, tensor in adapter_tensors(model).items()}
    if torch.cuda.is_available() and not recipe.model.load_in_4bit:
        model.to("cuda")
    if recipe.training.gradient_checkpointing is True:
        enable_gradient_checkpointing(model)
    collator = make_collator(model, recipe, examples, padding_token(data.tokenizer, data.capacity.tokens))
    objective = Objective()
    if not (recipe.training.use_liger_kernel or recipe.training.torch_compile):  # they have ways of their own
        objective.select_trained(model, examples.trained)
    held_out = in_order(examples.held_out)
    run.writer.progress(phase="evaluating", total_steps=data.plan.total_steps)
    held_out_before = held_out_loss(model, held_out, collator, objective, run.stop)
    if held_out_before is not None:
        run.writer.event("run.evaluated", when="before", held_out_loss=held_out_before, rows=len(held_out))
    return LoadedModel(
        model=model,
        initial=initial,
        collator=collator,
        objective=objective,
        held_out=held_out,
        held_out_before=held_out_before,
        ready_at=time.monotonic(),
    )


def fit(run: Run, data: TrainingData, start: Start, loaded: LoadedModel) -> Fitted:
    """Train to the last planned step, or until a stop is requested. Raises RunFailure."""
    recipe, total_steps = run.recipe, data.plan.total_steps
    selection = Selection.of(recipe.training, total_steps=total_steps, measured=bool(loaded.held_out))
    trainer = RunTrainer(
        model=loaded.model,
        args=training_arguments(recipe, data.plan, start.staging_dir, start.precision, eval_steps=selection.every),
        examples=data.examples.trained,
        collator=loaded.collator,
        objective=loaded.objective,
        tokenizer=data.tokenizer,
        grouped=recipe.training.train_sampling_strategy == "group_by_length",
        gradient_checkpointing_on_oom=recipe.training.gradient_checkpointing == "auto",
        writer=run.writer,
        held_out=loaded.held_out,
        selection=selection,
    )
    scalars_dir = Path(run.spec.run_dir) / TENSORBOARD_NAME
    scalars = open_scalars(scalars_dir, run.writer) if distributed.is_main_process() else None
    monitor = MonitorCallback(writer=run.writer, stop=run.stop, plan=data.plan, trainer=trainer, scalars=scalars)
    trainer.add_callback(monitor)
    trainer.add_callback(seal_checkpoints(start, recipe, key=run.key, on_sealed=monitor.sealed))
    if loaded.held_out_before is not None:
        monitor.write_scalars(start.step, {"held_out/loss": loaded.held_out_before})
    run.writer.event(
        "run.started",
        start_step=start.step,
        total_steps=total_steps,
        resumed_from=start.resumed_from,
        tokenised_seconds=round(data.ready_at - run.started_at, 3),
        loaded_seconds=round(loaded.ready_at - data.ready_at, 3),
        flat=loaded.collator.flat,
        scores_trained_only=loaded.objective.selects,
    )
    run.writer.progress(
        phase="training",
        step=start.step,
        start_step=start.step,
        total_steps=total_steps,
        resumed_from=start.resumed_from,
    )
    steps_run = trainer.run(start.prepared.resume_from, data.plan)
    # Whether a stop was requested of any process; asked only where all of them ended early.
    interrupted = (
        steps_run < total_steps
        and not trainer.stopped_early
        and distributed.all_reduce_sum([float(run.stop.requested)])[0] > 0
    )
    kept = Kept(step=steps_run)
    if selection.load_best and not interrupted:
        kept = keep_best(
            start,
            trainer.held_out_points,
            steps_run=steps_run,
            key=run.key,
            load=trainer.load_weights,
            writer=run.writer,
        )
    return Fitted(
        monitor=monitor,
        steps_run=steps_run,
        interrupted=interrupted,
        points=trainer.held_out_points,
        kept=kept,
        stopped_early=trainer.stopped_early,
    )


def finish(run: Run, data: TrainingData, start: Start, loaded: LoadedModel, fitted: Fitted) -> RunResult:
    """Prove that the run did what was planned, evaluate it, and write its candidate; returns the result.

    An interrupted run leaves its last checkpoint and no candidate. Raises RunFailure for a run that is not whole.
    """
    planned, monitor, model = data.plan, fitted.monitor, loaded.model
    result = trained_result(run, data, start, loaded, fitted)
    if fitted.interrupted:
        return interrupted_result(run, result, fitted)
    require_whole_run(fitted.steps_run, planned, monitor.mean_loss, stopped_early=fitted.stopped_early)
    norm = lora_b_norm(model)
    require_learned(model, loaded.initial, norm)
    run.writer.progress(phase="evaluating", step=fitted.steps_run)
    try:
        assessor = assessor_of(run, data, start, loaded)
        assessed = assessor.assess(keyed(by_line(loaded.held_out)), data.examples.train)
        answered = ask_evals(
            run.spec,
            Finished(
                model=loaded.model,
                tokenizer=data.tokenizer,
                capacity=data.capacity,
                base_path=run.base.path,
                learned_ends=data.examples.end_ids,
                parent=start.parent,
                parent_tensors=loaded.initial,
            ),
            history=assessor.history(),
            tick=lambda: report_asking(run),
        )
    except Interrupted:  # the last checkpoint is sealed: the next attempt goes on here
        return interrupted_result(run, result, fitted)
    evaluation, norm = answered.added_to(assessed.evaluation), lora_b_norm(model)
    if data.earlier or evaluation.evals or evaluation.eval_problems:
        run.writer.event(
            "run.gate_judged",
            verdict=evaluation.verdict,
            reasons=evaluation.reasons,
            scored=[one.name for one in evaluation.datasets],
            unscored=evaluation.unscored,
            evals={one.name: one.passed for one in evaluation.evals},
            alpha=evaluation.alpha,
            tried=evaluation.tried,
            scored_tokens=evaluation.scored_tokens,
            seconds=evaluation.seconds,
        )
    held_out_after = evaluation.own.loss if evaluation.own else None
    if held_out_after is not None:
        run.writer.event(
            "run.evaluated",
            when="after",
            step=fitted.kept.step,
            held_out_loss=held_out_after,
            rows=len(loaded.held_out),
        )
        if not fitted.points:  # else the last step has its point, and the weights may be of another
            monitor.write_scalars(fitted.steps_run, {"held_out/loss": held_out_after})
    run.writer.event("run.trained", **timing(monitor))
    run.writer.progress(phase="finishing", step=fitted.steps_run, held_out_loss=held_out_after)
    result = replace(result, held_out_after=held_out_after, lora_norm=norm, evaluation=evaluation)
    if not distributed.is_main_process():  # it writes the candidate; all have agreed on every number
        return result
    candidate = start.staging_dir / f"candidate-{run.spec.job_id}"
    generation = generation_config(
        run.base.path,
        start.parent.path if start.parent else None,
        eos=data.tokenizer.eos_token_id,
        learned=data.examples.end_ids,
    )
    save_candidate(model, data.tokenizer, candidate, base_name=run.base.portable_name, generation=generation)
    adapter_digest = guard.digest_file(candidate / "adapter_model.safetensors").blake3_hex
    assessor.history().write(adapter_digest, assessed.scores, answered.candidate)
    result = replace(
        result,
        candidate=str(candidate),
        adapter_digest=adapter_digest,
        warnings=(
            *result.warnings,
            *evaluation_warnings(evaluation),
            *training_warnings(before=loaded.held_out_before, after=held_out_after, spikes=monitor.spikes),
        ),
        wall_seconds=time.monotonic() - run.started_at,
    )
    card = model_card(run.spec, run.recipe, planned, result, run.origin)
    (candidate / "README.md").write_text(card, encoding="utf-8")
    return result


def assessor_of(run: Run, data: TrainingData, start: Start, loaded: LoadedModel) -> Assessor:
    """Return what measures the finished run against its parent."""
    return Assessor(
        spec=run.spec,
        recipe=run.recipe,
        tokenizer=data.tokenizer,
        scorer=Scorer(model=loaded.model, collator=loaded.collator, objective=loaded.objective, stop=run.stop),
        parent=start.parent,
        parent_tensors=loaded.initial,
        earlier=data.earlier,
        plan=data.plan,
        precision=start.precision,
        evals=len(evals_of(run.spec).usable),
    )


def report_asking(run: Run) -> None:
    """Show that the run goes on while evals are answered. Raises Interrupted."""
    run.stop.check()
    run.writer.progress(phase="evaluating")


def interrupted_result(run: Run, result: RunResult, fitted: Fitted) -> RunResult:
    """Return the result of a run that was asked to stop: its last checkpoint is what it leaves."""
    return replace(
        result,
        outcome=Outcome.INTERRUPTED,
        message=f"stopped at step {fitted.steps_run}",
        wall_seconds=time.monotonic() - run.started_at,
    )


def trained_result(run: Run, data: TrainingData, start: Start, loaded: LoadedModel, fitted: Fitted) -> RunResult:
    """Return what is known when the training loop has ended, as that of a run that succeeds."""
    planned, monitor, best = data.plan, fitted.monitor, best_point(fitted.points)
    return RunResult(
        outcome=Outcome.SUCCEEDED,
        steps_planned=planned.total_steps,
        steps_run=fitted.steps_run,
        start_step=start.step,
        resumed_from=start.resumed_from,
        verdict=start.prepared.verdict.kind.name.lower(),
        reasons=start.prepared.verdict.reasons,
        cleared=start.cleared,
        train_loss=monitor.mean_loss,
        held_out_before=loaded.held_out_before,
        held_out_losses=thinned(fitted.points),
        best_step=best.step if best else None,
        kept_step=None if fitted.interrupted else fitted.kept.step,
        stopped_early=fitted.stopped_early,
        tokens_per_second=monitor.tokens_per_second,
        steady_tokens_per_second=monitor.steady_tokens_per_second,
        tokens_trained=monitor.tokens,
        rows=planned.rows,
        samples=planned.samples,
        refused_rows=len(data.examples.refused),
        dropped_rows=planned.dropped_rows,
        held_out_rows=planned.held_out_rows,
        withheld_rows=planned.withheld_rows,
        replayed=data.replay.datasets,
        unmeasured=data.examples.unmeasured,
        truncated_rows=data.examples.truncated_rows,
        trained_share=planned.trained_tokens / planned.tokens,
        spikes=tuple(step for step, _, _ in monitor.spikes),
        warnings=(*run.origin.warnings, *data.warnings, *([fitted.kept.problem] if fitted.kept.problem else [])),
        base=run.origin.base.to_record(),
        parent=start.parent.name if start.parent else None,
        parent_digest=start.parent.digest if start.parent else None,
    )


def make_collator(model: PeftModel, recipe: Recipe, examples: Examples, pad_token_id: int) -> Collator:
    """Decide how steps are divided into passes on the model's device: without padding where that is proven the same."""
    device = next(model.parameters()).device.type
    return Collator(
        pad_token_id=pad_token_id,
        budget_tokens=recipe.training.per_device_train_batch_size * recipe.data.max_length,
        flat=device == "cuda" and use_packed(model, examples.trained),
        pass_tokens=PASS_TOKENS.get(device, PASS_TOKENS["cuda"]),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
