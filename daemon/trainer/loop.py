"""The training loop: transformers' Trainer with its order of rows, its checkpoints' home and its silences replaced."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from daemon.config import TrainingSettings
from daemon.job import FailureKind, Plan
from daemon.trainer.data import Collator, EpochBatches, Example
from daemon.trainer.failure import RunFailure
from daemon.trainer.report import Reporter
from daemon.trainer.session import StopFlag
from guard import Checkpoint


class RunTrainer(Trainer):  # type: ignore[misc]  # transformers is not followed by the type checker
    """A Trainer that takes its rows in our order and tells each step's loss."""

    def __init__(
        self,
        *,
        model: PeftModel,
        args: TrainingArguments,
        examples: Sequence[Example],
        pad_token_id: int,
        tokenizer: Any,
    ) -> None:
        self.batches = EpochBatches(len(examples), args.per_device_train_batch_size, args.seed)
        self.step_loss: torch.Tensor | None = None  # of the optimizer step in progress, still on the device
        self.step_tokens: torch.Tensor | None = None  # likewise, padding not counted
        super().__init__(
            model=model,
            args=args,
            train_dataset=list(examples),
            data_collator=Collator(pad_token_id=pad_token_id),
            processing_class=tokenizer,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The rows in `EpochBatches`' order."""
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass; its loss is this pass's share of the step's."""
        tokens = inputs["attention_mask"].sum()
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss = loss if self.step_loss is None else self.step_loss + loss
        self.step_tokens = tokens if self.step_tokens is None else self.step_tokens + tokens
        return loss

    def take_step(self) -> tuple[float, int]:
        """Loss and tokens of the optimizer step that just ended; the one synchronisation with the device a step."""
        loss, tokens = self.step_loss, self.step_tokens
        self.step_loss = self.step_tokens = None
        return (float(loss) if loss is not None else math.nan), (int(tokens) if tokens is not None else 0)

    def run(self, resume_from: Path | None, planned: Plan) -> int:
        """Train to the end or until asked to stop; returns the run's step counter.

        A checkpoint of the very last step has nothing left to train: the Trainer would take one step too many when the
        steps end inside an epoch, so its weights are loaded and the run is over.
        """
        if resume_from is not None and int(resume_from.name.rpartition("-")[2]) >= planned.total_steps:
            set_peft_model_state_dict(self.model, load_file(resume_from / "adapter_model.safetensors"))
            return int(resume_from.name.rpartition("-")[2])
        self.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        return int(self.state.global_step)


class LossWatch(TrainerCallback):  # type: ignore[misc]  # likewise
    """Watches every step: stops on request, fails on the first number that is not finite, tells the daemon."""

    def __init__(self, *, report: Reporter, stop: StopFlag, plan: Plan, trainer: RunTrainer) -> None:
        self._report = report
        self._stop = stop
        self._plan = plan
        self._trainer = trainer
        self._losses: list[float] = []
        self._began = 0.0
        self._start_step = 0
        self.tokens = 0  # trained over in this attempt, padding not counted

    @property
    def mean_loss(self) -> float | None:
        """Mean over the steps of this attempt; None when it had none to run."""
        return sum(self._losses) / len(self._losses) if self._losses else None

    @property
    def tokens_per_second(self) -> float | None:
        """Useful tokens a second of this attempt, padding not counted."""
        elapsed = time.monotonic() - self._began
        return self.tokens / elapsed if self._losses and elapsed > 0 else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the Trainer plans what we planned."""
        self._began = time.monotonic()
        self._start_step = int(state.global_step)
        if state.max_steps != self._plan.total_steps:
            raise RunFailure(
                FailureKind.INTERNAL, f"the Trainer plans {state.max_steps} steps, we planned {self._plan.total_steps}"
            )
        # A resumed state brings the old intervals along; these may differ between attempts.
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch of our order ourselves: after a resume the Trainer's own way reaches no wrapped sampler."""
        self._trainer.batches.set_epoch(math.floor(state.epoch or 0.0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the step, tell it, and stop if asked to."""
        loss, tokens = self._trainer.take_step()
        if not math.isfinite(loss):
            raise RunFailure(
                FailureKind.DIVERGED,
                f"the loss became {loss} at step {state.global_step}",
                hint="lower learning_rate, or look for odd rows near there; nothing of this run is kept",
            )
        self._losses.append(loss)
        steps_done = state.global_step - self._start_step
        elapsed = time.monotonic() - self._began
        self.tokens += tokens
        self._report.progress(
            phase="training",
            step=state.global_step,
            epoch=round(state.epoch or 0.0, 4),
            loss=round(loss, 6),
            learning_rate=float(self._trainer._get_learning_rate()),
            tokens_per_second=round(self.tokens / elapsed, 1) if elapsed else None,
            eta_seconds=round(elapsed / steps_done * (self._plan.total_steps - state.global_step), 1),
        )
        if self._stop.requested:
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Gradient norms are computed anyway; one that is not finite means that the weights are next."""
        norm = (logs or {}).get("grad_norm")
        if norm is not None and not math.isfinite(norm):
            raise RunFailure(
                FailureKind.DIVERGED,
                f"the gradient norm became {norm} at step {state.global_step}",
                hint="lower learning_rate",
            )
        if logs and "loss" in logs:
            self._report.event("run.stepped", step=state.global_step, **{k: round(v, 8) for k, v in logs.items()})

    def sealed(self, checkpoint: Checkpoint) -> None:
        """A checkpoint of ours is intact on disk."""
        self._report.progress(last_checkpoint_step=checkpoint.step)
        self._report.event(
            "checkpoint.sealed", step=checkpoint.step, path=str(checkpoint.path), size_bytes=checkpoint.size_bytes
        )


def held_out_loss(
    model: PeftModel, examples: Sequence[Example], pad_token_id: int, training: TrainingSettings, stop: StopFlag
) -> float | None:
    """Mean loss a trained token over held-out rows, None when there are none (or a stop was asked for)."""
    if not examples:
        return None
    collate = Collator(pad_token_id=pad_token_id)
    ordered = sorted(examples, key=lambda example: len(example.input_ids))  # little padding
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    size = training.per_device_train_batch_size
    with torch.inference_mode():
        for start in range(0, len(ordered), size):
            if stop.requested:
                break
            part = ordered[start : start + size]
            batch = {name: tensor.to(device) for name, tensor in collate(part).items()}
            count = sum(example.trained_tokens for example in part)
            total += float(model(**batch).loss) * count
            tokens += count
    model.train(was_training)
    return total / tokens if tokens and not stop.requested else None
