"""What a finished run must prove, and the candidate that it leaves: a complete adapter, which the daemon promotes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from daemon.job import FailureKind, Plan
from daemon.trainer.errors import RunFailure
from daemon.trainer.generation import write_generation_config
from daemon.trainer.model import ADAPTER_CONFIG, adapter_tensors, all_finite
from guard.atomic import apply_umask


def require_whole_run(steps_run: int, plan: Plan, mean_loss: float | None, *, stopped_early: bool = False) -> None:
    """Raise RunFailure unless every planned step ran, or those until the evaluations ended it, with a finite loss."""
    if (steps_run != plan.total_steps and not stopped_early) or steps_run < 1:
        raise RunFailure(
            FailureKind.INTERNAL,
            f"{steps_run} of {plan.total_steps} planned steps ran",
            hint="nothing was promoted; the trainer's log in the run directory tells more",
        )
    if mean_loss is not None and not math.isfinite(mean_loss):
        raise RunFailure(FailureKind.DIVERGED, f"the mean loss is {mean_loss}", hint="lower learning_rate")


def require_learned(model: PeftModel, initial: dict[str, torch.Tensor], lora_b_norm: float) -> None:
    """Raise RunFailure when the adapter is not finite, is as it was (`initial`), or does nothing."""
    if not all_finite(model):
        raise RunFailure(FailureKind.DIVERGED, "the adapter has NaN or infinite weights", hint="lower learning_rate")
    unchanged = all(torch.equal(initial[name], tensor.cpu()) for name, tensor in adapter_tensors(model).items())
    if unchanged or lora_b_norm == 0.0:
        raise RunFailure(
            FailureKind.CONFIG,
            "the run left the adapter as it was" if unchanged else "the adapter amounts to nothing (lora_B is zero)",
            hint="look at learning_rate and warmup_steps: they decide how far a short run moves",
        )


def save_candidate(
    model: PeftModel, tokenizer: Any, folder: Path, *, base_name: str, generation: dict[str, Any] | None
) -> None:
    """Write adapter, tokenizer and generation configuration to `folder`, safetensors and text only.

    The adapter's configuration names the base as `base_name`. What was there is replaced.
    """
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder), safe_serialization=True)
    # Not before: peft looks for the base's configuration under the name that it writes.
    config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    named = json.dumps({**config, "base_model_name_or_path": base_name}, indent=2, sort_keys=True)
    (folder / ADAPTER_CONFIG).write_text(named, encoding="utf-8")
    tokenizer.save_pretrained(str(folder))
    write_generation_config(folder, generation)
    apply_umask(folder)
