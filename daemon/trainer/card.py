"""The model card of a version: what it is, what it learned from, how to load it."""

from __future__ import annotations

import json
import re

from daemon.base_identity import BaseIdentity, BasePart
from daemon.fingerprint import minor_version
from daemon.job import Plan, RunResult, RunSpec
from daemon.recipe import Recipe
from daemon.text import escape
from daemon.trainer.origin import Origin

_PLAIN = re.compile(r"[\w./-]+")  # what YAML takes for nothing but text


def model_card(spec: RunSpec, recipe: Recipe, planned: Plan, result: RunResult, origin: Origin) -> str:
    """Return Markdown with the metadata header that the Hub and peft read."""
    training, lora, base, parent = recipe.training, recipe.lora, origin.base, origin.parent
    name = escape(base.name, most=1000)
    held_out = (
        f"{result.held_out_before:.4f} before, {result.held_out_after:.4f} after, over rows that were not trained"
        if result.held_out_before is not None and result.held_out_after is not None
        else result.unmeasured or "no row was held out"
    )
    return f"""---
library_name: peft
base_model: {name if _PLAIN.fullmatch(name) else json.dumps(name)}
tags: [lora, dropforge]
---

# LoRA adapter of {name}

| | |
|---|---|
| base model | {base.describe(tuple(part for part in BasePart if base.part(part)))} |
| dataset | {escape(spec.dataset.name)}, {spec.dataset.rows} rows, {planned.samples} samples trained, BLAKE3 `{spec.dataset.digest}` |
| rehearsed | {_rehearsed(result)} |
| continues | {f"version {parent.name}" if parent else "the base model"} |
| steps | {result.steps_run} of {result.steps_planned}, {planned.global_batch_size} samples each, {planned.epochs:g} epochs |
| adapter | {_kind(recipe)}, r = {lora.r}, lora_alpha = {lora.lora_alpha:g}, dropout {lora.lora_dropout:g}, on {lora.target_modules} |
| schedule | {training.lr_scheduler_type}, peak learning rate {training.learning_rate:g}, {training.optim}, seed {training.seed} |
| data | loss on {recipe.data.train_on}, at most {recipe.data.max_length} tokens a row, {result.truncated_rows} rows cut, {result.dropped_rows} dropped |
| tokens | {planned.tokens} an epoch, {planned.trained_tokens / max(planned.tokens, 1):.1%} of them with a loss |
| weights | {_weights(result)} |
| training loss | {_loss(result.train_loss)}, mean over the last attempt |
| held-out loss | {held_out} |
| made with | torch {minor_version("torch")}, transformers {minor_version("transformers")}, peft {minor_version("peft")} |
| job | {spec.job_id}, attempt {spec.attempt} |

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name!r}{f", revision={base.commit!r}" if base.commit else ""})
model = PeftModel.from_pretrained(model, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
{_whereabouts(base)}{_kept(result)}{_evals(result)}{_warnings(result)}"""


def _whereabouts(base: BaseIdentity) -> str:
    """Say where a base model lies that is no model of the Hub."""
    if base.commit:
        return ""
    if base.name.startswith("./"):
        return f"\n`{escape(base.name, most=1000)}` is in the folder that holds dropforge.toml: run this there, or name the base in full.\n"
    return "\nThe base model is named as it lay on the machine that trained this; name it as it lies on yours.\n"


def _kept(result: RunResult) -> str:
    """Return what was kept of earlier datasets as a section, empty where nothing was compared."""
    evaluation = result.evaluation
    if evaluation is None or not evaluation.datasets:
        return ""
    lines = [
        f"| {escape(one.name)} | {one.rows} | {one.loss_before:.4f} | {one.loss_after:.4f} | {one.loss.low:+.4f} to"
        f" {one.loss.high:+.4f} | {one.exact_before:.0%} | {one.exact_after:.0%} | {one.verdict} |"
        for one in evaluation.datasets
    ]
    blend = (
        "" if evaluation.alpha is None else f"The weights are parent + {evaluation.alpha:g} x (trained - parent).\n\n"
    )
    return (
        "\n## What is kept of earlier datasets\n\n"
        f"{blend}Over held-out rows, under the version that this one continues and under this one; losses in nats a token.\n\n"
        "| dataset | rows | before | after | change | exact before | after | verdict |\n|---|---|---|---|---|---|---|---|\n"
        + "\n".join(lines)
        + "\n"
    )


def _evals(result: RunResult) -> str:
    """Return what was asked of it as a section, empty where nothing was."""
    evals = result.evaluation.evals if result.evaluation is not None else ()
    if not evals:
        return ""
    lines = [
        f"| {escape(one.name)} | {one.rows} | {one.answered} | {_share(one.passed)} | {_share(one.passed_before)} |"
        f" {_share(one.passed_after)} | {one.verdict} |\n"
        for one in evals
    ]
    return (
        "\n## Evals\n\nRows whose greedy answer passes; before and after over those that the version that this one continues"
        " has answered too.\n\n| eval | rows | answered | pass | before | after | verdict |\n|---|---|---|---|---|---|---|\n"
        + "".join(lines)
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _warnings(result: RunResult) -> str:
    """Return the warnings as a section, empty when there are none."""
    if not result.warnings:
        return ""
    return "\n## Warnings of the run\n\n" + "".join(f"- {escape(warning, most=1000)}\n" for warning in result.warnings)


def _rehearsed(result: RunResult) -> str:
    found = ", ".join(f"{dataset.rows} rows of {escape(dataset.name)}" for dataset in result.replayed)
    return found or "nothing of earlier datasets"


def _weights(result: RunResult) -> str:
    """Of which step the weights are, and why."""
    if result.best_step is None or result.kept_step is None:
        return "of the last step"
    best = min((point.loss for point in result.held_out_losses), default=0.0)
    why = "the lowest" if result.kept_step == result.best_step else f"step {result.best_step} had the lowest"
    early = ", stopped early" if result.stopped_early else ""
    return f"of step {result.kept_step}; {why} held-out loss during the run, {best:.4f}{early}"


def _kind(recipe: Recipe) -> str:
    lora = recipe.lora
    kind = "DoRA" if lora.use_dora else "LoRA"
    return f"{'rs' if lora.use_rslora else ''}{kind}{' on 4-bit base weights' if recipe.model.load_in_4bit else ''}"


def _loss(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"
