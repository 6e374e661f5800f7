"""What a run reports to its user: the arithmetic of its steps, where its time went, and warnings."""

from __future__ import annotations

import math
from typing import Any

from daemon.evaluation.statistics import describe_eval
from daemon.evaluation.values import Evaluation
from daemon.job import Plan
from daemon.recipe import Recipe, TrainingSettings
from daemon.text import escape
from daemon.trainer.callbacks import MonitorCallback
from daemon.trainer.capacity import Capacity
from daemon.trainer.collate import Examples


def arithmetic(planned: Plan, examples: Examples, recipe: Recipe) -> str:
    """Return the plan as a table for the log."""
    training = recipe.training
    withheld = f" + {planned.withheld_rows:,} held out of earlier datasets" if planned.withheld_rows else ""
    tokens_a_sample = planned.tokens / max(planned.samples, 1)
    lines = [
        (
            "rows",
            f"{planned.rows:,} trained + {planned.held_out_rows:,} held out{withheld} + {planned.dropped_rows:,} dropped",
        ),
        ("replayed", f"{planned.replayed_rows:,} rows of earlier datasets, {_share(planned)} of the trained tokens"),
        ("samples", f"{planned.samples:,} of all trained rows"),
        ("tokens", f"{planned.tokens:,} = {planned.samples:,} samples x {tokens_a_sample:.1f}"),
        ("trained", f"{planned.trained_tokens:,} tokens = {planned.trained_tokens / planned.tokens:.1%}"),
        ("truncated", f"{examples.truncated_rows:,} rows to {recipe.data.max_length:,} tokens"),
        (
            "samples a step",
            f"{planned.global_batch_size:,} = {training.per_device_train_batch_size}"
            f" x {training.gradient_accumulation_steps} accumulated x {training.num_processes} processes",
        ),
        ("tokens a step", f"{tokens_a_sample * min(planned.global_batch_size, planned.samples):,.0f} on average"),
        (
            "steps",
            f"{planned.total_steps:,} = {planned.epochs:g} epochs x ceil({planned.samples:,} / {planned.global_batch_size:,})"
            f" = {planned.epochs:g} x {planned.steps_per_epoch:,}",
        ),
        ("warm-up", f"{planned.warmup_steps:,} steps"),
    ]
    return "\n".join(f"{name:<14} {value}" for name, value in lines)


def timing(monitor: MonitorCallback) -> dict[str, Any]:
    """Return where the time from the first step to the last went, for the log."""
    seconds = monitor.train_seconds or math.inf
    return {
        "train_seconds": round(monitor.train_seconds, 3),
        "bookkeeping_share": round(monitor.bookkeeping_seconds / seconds, 5),
        "sealing_share": round(monitor.sealing_seconds / seconds, 5),
        "evaluating_share": round(monitor.evaluating_seconds / seconds, 5),
        "tokens_per_second": round(monitor.tokens_per_second or 0.0, 1),
    }


def data_warnings(examples: Examples, planned: Plan, capacity: Capacity) -> tuple[str, ...]:
    """Return what the user should know of the dataset before it is trained."""
    most = capacity.positions or math.inf
    refused = tuple(row.line for row in examples.refused)
    first = f"; the first: {examples.refused[0].reason}" if refused else ""
    lines_of = {
        "rows without a token to train on": examples.dropped_lines,
        "rows that lost trained tokens to max_length": examples.truncated_lines,
        "rows that hold the text of special tokens, which was read as text": examples.special_token_lines,
        f"rows that cannot be rendered as they should, and were left out{first}": refused,
        **{f"rows that {note}": lines for note, lines in examples.notes.items()},
        f"rows longer than the {capacity.positions} positions that the base model was made for": tuple(
            dict.fromkeys(example.line for example in examples.train if len(example.input_ids) > most)
        ),
    }
    found = [f"{what}: {len(lines):,} (lines {_shown(lines)})" for what, lines in lines_of.items() if lines]
    found += [
        f"rows that are held out of {escape(name)}, and so were not trained: {count:,}"
        for name, count in examples.withheld.items()
    ]
    if examples.released:
        found.append(
            f"rows that were held out of earlier datasets, and are trained by force: {len(examples.released):,}"
        )
    if examples.truncated_rows:
        found.append(f"rows that were cut to max_length: {examples.truncated_rows:,}")
    if planned.trained_tokens < 0.05 * planned.tokens:
        found.append(f"only {planned.trained_tokens / planned.tokens:.1%} of the tokens are trained")
    return tuple(found)


def evaluation_warnings(evaluation: Evaluation) -> tuple[str, ...]:
    """Return what the user should know of what earlier datasets have lost."""
    of_evals = [f"eval {escape(one.name)} {describe_eval(one)}" for one in evaluation.evals]
    found = [
        f"fewer rows pass: {reason}" if reason in of_evals else f"lost of an earlier dataset: {reason}"
        for reason in evaluation.reasons
    ]
    found += [f"not measured: {problem}" for problem in evaluation.eval_problems]
    if evaluation.unscored and not evaluation.datasets:
        found.append("no earlier dataset was scored: that would have cost more than [evaluation] max_budget allows")
    if evaluation.alpha is not None and evaluation.gain_kept is not None:
        found.append(
            f"as it was trained it had lost something of earlier datasets: it was blended with its parent, {evaluation.alpha:g} of"
            f" the way, which keeps {evaluation.gain_kept:.0%} of what was gained on the new dataset"
        )
    return tuple(found)


def selection_warnings(training: TrainingSettings, examples: Examples) -> tuple[str, ...]:
    """Say that what the settings ask of evaluations during the run cannot be done: there is nothing to evaluate."""
    if not training.selects or examples.held_out:
        return ()
    asked = "load_best_model_at_end" if training.load_best_model_at_end else "early_stopping_patience"
    return (
        f"{asked} had no effect: no row of this dataset is held out, so all steps were run and the last one counts",
    )


def training_warnings(
    *, before: float | None, after: float | None, spikes: list[tuple[int, float, float]]
) -> tuple[str, ...]:
    """Return what the user should look at although the run succeeded."""
    rose = before is not None and after is not None and after > before
    return (
        *([f"held-out loss rose from {before:.4f} to {after:.4f}"] if rose else []),
        *(
            f"the loss spiked at step {step}: {loss:.4f}, where {usual:.4f} was usual"
            for step, loss, usual in spikes[:10]
        ),
    )


def _share(planned: Plan) -> str:
    return f"{planned.replayed_tokens / max(planned.trained_tokens, 1):.1%}"


def _shown(lines: tuple[int, ...]) -> str:
    return ", ".join(map(str, lines[:10])) + (", …" if len(lines) > 10 else "")
