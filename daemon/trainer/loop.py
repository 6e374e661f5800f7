"""The training loop: transformers' Trainer with its order of rows, its checkpoints' home and its silences replaced."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from daemon.job import FailureKind, Plan
from daemon.run_dir import RunWriter
from daemon.trainer import distributed
from daemon.trainer.attempt import StopFlag
from daemon.trainer.attention import computing
from daemon.trainer.batches import StepBatches
from daemon.trainer.collate import IGNORE, Collator, Example
from daemon.trainer.errors import RunFailure
from daemon.trainer.loss import Objective


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one optimizer step amounted to, over all processes."""

    number: int
    loss: float  # mean over the step's trained tokens
    grad_norm: float  # before clipping
    tokens: int  # padding not counted
    stop: bool  # some process was asked to stop


class RunTrainer(Trainer):  # type: ignore[misc]  # transformers is not followed by the type checker
    """A Trainer that takes a step's rows in our order, divides them into passes, and tells each step's numbers.

    To transformers, a step is one batch: what it calls gradient accumulation happens inside `training_step`, because a
    step's number of passes depends on the lengths of its rows.
    """

    def __init__(
        self,
        *,
        model: PeftModel,
        args: TrainingArguments,
        examples: Sequence[Example],
        collator: Collator,
        objective: Objective,
        tokenizer: Any,
        grouped: bool,
        checkpoint_when_full: bool = False,
        report: RunWriter | None = None,
    ) -> None:
        lengths = [len(example.input_ids) for example in examples]
        self.batches = StepBatches(
            lengths, rows_a_step=args.per_device_train_batch_size, seed=args.seed, grouped=grouped
        )
        self._collator = collator
        self._objective = objective
        self._budget_tokens = collator.budget_tokens
        self._checkpoint_when_full = checkpoint_when_full
        self._run_report = report
        self._grad_norm: torch.Tensor | None = None
        self._loss: torch.Tensor | None = None
        self._tokens = 0
        self._parameter_count: int = sum(parameter.numel() for parameter in model.parameters())
        self._pending: deque[tuple[int, torch.Tensor, Any, int]] = deque()
        self.waited_seconds = 0.0  # for the device's numbers: it computes meanwhile
        self.sealing_seconds = 0.0  # checkpoints, written between steps
        # Several visible GPUs are no reason to spread one process over them: its batches would be cut in pieces.
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(
            model=model,
            args=args,
            train_dataset=list(examples),
            data_collator=collator,
            processing_class=tokenizer,
        )
        self.remove_callback(PrinterCallback)  # the log has it all already

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Steps in `StepBatches`' order. Every process reads every step, and computes its share of the rows."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # the loader draws from it; the process's own random state stays alone
        )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """All passes of one step; returns its loss, the mean over its trained tokens."""
        self._tokens = inputs["tokens"]
        passes = inputs["passes"]
        if self._budget_tokens < self._collator.budget_tokens:
            passes = self._collator.passes(inputs["examples"], budget_tokens=self._budget_tokens)
        while (loss := self._try_passes(model, passes, inputs["trained_tokens"])) is None:
            passes = self._smaller(passes, inputs["examples"])
        self._loss = loss
        return loss

    def _try_passes(self, model: Any, passes: list[dict[str, Any]], trained_tokens: int) -> torch.Tensor | None:
        """The step's loss with its gradients in place; None, and no gradients, when the device ran out of memory."""
        losses = []
        try:
            for number, one in enumerate(passes):
                last = number == len(passes) - 1
                with nullcontext() if last else self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, one, trained_tokens))
            return torch.stack(losses).sum()
        except torch.OutOfMemoryError:
            if distributed.processes() > 1:
                raise  # the others are in the middle of exchanging gradients
        # Behind the except block: its traceback would keep the pass's tensors alive.
        model.zero_grad()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return None

    def _smaller(self, passes: list[dict[str, Any]], examples: Sequence[Example]) -> list[dict[str, Any]]:
        """More and smaller passes; with one row each, gradient checkpointing. Raises RunFailure when neither is left."""
        longest = max(len(example.input_ids) for example in examples)
        while len(passes) < len(examples) and self._budget_tokens > longest:
            self._budget_tokens = max(self._budget_tokens // 2, longest)
            smaller = self._collator.passes(examples, budget_tokens=self._budget_tokens)
            if len(smaller) > len(passes):
                self._tell("run.passes_halved", budget_tokens=self._budget_tokens, passes=len(smaller))
                return smaller
        if not self._checkpoint_when_full:
            raise RunFailure(
                FailureKind.OUT_OF_MEMORY,
                f"a row of {longest} tokens does not fit the device's memory",
                hint="lower max_length under [data], choose a smaller base model, or load_in_4bit under [model]",
            )
        self._checkpoint_when_full = False
        enable_gradient_checkpointing(self.model)
        self._tell("run.gradient_checkpointing_enabled", longest_row=longest)
        return passes

    def _tell(self, name: str, **data: Any) -> None:
        if self._run_report is not None:
            self._run_report.event(name, step=self.state.global_step, **data)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """This pass's share of the step's loss: the sum over its trained tokens, divided by those of the whole step.

        Times the number of processes, because gradients are averaged over them.
        """
        loss = self._objective.loss(model, inputs, over=num_items_in_batch, takes_count=self.model_accepts_loss_kwargs)
        self.loss_is_scaled_for_ga = True
        return loss * distributed.processes()

    def _prepare_inputs(self, inputs: Any) -> Any:
        """A pass on the device, without waiting for what the device is computing: from pinned memory."""
        if self.args.device.type != "cuda":
            return super()._prepare_inputs(inputs)
        return {
            name: value.pin_memory().to(self.args.device, non_blocking=True) if torch.is_tensor(value) else value
            for name, value in inputs.items()
        }

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        """The Trainer's own, timed when it saves."""
        saves, began = self.control.should_save, time.perf_counter()
        super()._maybe_log_save_evaluate(*args, **options)
        if saves:
            self.sealing_seconds += time.perf_counter() - began

    def floating_point_ops(self, inputs: Any) -> int:
        """By the usual estimate: 6 a parameter and token."""
        tokens: int = inputs["tokens"]
        return 6 * tokens * self._parameter_count

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The Trainer's own, kept: it is checked at every step, not only at those that are logged."""
        self._grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._grad_norm

    def record_step(self, *, stop: bool) -> None:
        """Note the numbers of the step that just ended, without waiting for the device."""
        assert self._loss is not None  # noqa: S101  a step has just ended
        norm = torch.as_tensor(0.0 if self._grad_norm is None else self._grad_norm, device=self._loss.device)
        numbers = torch.stack([self._loss.float(), norm.float(), torch.full_like(norm, float(stop)).float()])
        ready = None
        if numbers.is_cuda:
            numbers = torch.empty(3, pin_memory=True).copy_(numbers, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append((int(self.state.global_step), numbers, ready, self._tokens))

    def finished_steps(self, *, all_of_them: bool) -> list[Step]:
        """Steps whose numbers have arrived: on a GPU all but the newest, unless all are asked for.

        Every process asks at the same steps, so that all of them learn the same, stop requests included.
        """
        found = []
        while self._pending and (all_of_them or len(self._pending) > 1 or self._pending[0][2] is None):
            number, numbers, ready, tokens = self._pending.popleft()
            if ready is not None:
                began = time.perf_counter()
                ready.synchronize()
                self.waited_seconds += time.perf_counter() - began
            loss, norm, stop = numbers.tolist()
            loss, stop = distributed.total([loss, stop])
            found.append(
                Step(number=number, loss=loss / distributed.processes(), grad_norm=norm, tokens=tokens, stop=stop > 0)
            )
        return found

    def run(self, resume_from: Path | None, planned: Plan) -> int:
        """Train to the end or until asked to stop; returns the run's step counter.

        A checkpoint of the very last step has nothing left to train: the Trainer would take one step too many when the
        steps end inside an epoch, so its weights are loaded and the run is over.
        """
        if resume_from is not None and int(resume_from.name.rpartition("-")[2]) >= planned.total_steps:
            set_peft_model_state_dict(self.model, load_file(resume_from / "adapter_model.safetensors"))
            return int(resume_from.name.rpartition("-")[2])
        self.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        reached: int = self.state.global_step
        return reached


def enable_gradient_checkpointing(model: PeftModel) -> None:
    """Recompute activations in the backward pass; the embeddings' output has to ask for gradients, their weights do not."""
    model.enable_input_require_grads()
    # Either name is deprecated in one release or another.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def held_out_loss(
    model: PeftModel, examples: Sequence[Example], collator: Collator, objective: Objective, stop: StopFlag
) -> float | None:
    """Mean loss a trained token over held-out rows, None when there are none (or a stop was asked for)."""
    if not examples:
        return None
    total, tokens = 0.0, 0
    with computing(model) as device, torch.inference_mode():
        for one in collator.passes(examples):
            if stop.requested and distributed.processes() == 1:
                break
            count = int((one["labels"][..., 1:] != IGNORE).sum())
            if count:
                batch = {name: value.to(device) if hasattr(value, "to") else value for name, value in one.items()}
                total += float(objective.loss(model, batch, over=1))
            tokens += count
    total, tokens_of_all = distributed.total([total, float(tokens)])
    if not tokens_of_all or stop.requested:
        return None
    if not math.isfinite(total):
        raise RunFailure(
            FailureKind.DIVERGED, "the loss over the held-out rows is not finite", hint="lower learning_rate"
        )
    return total / tokens_of_all
