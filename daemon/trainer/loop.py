"""The training loop: transformers' Trainer with another order of rows, division into passes, and numbers of each step."""

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
from transformers import PrinterCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from daemon.job import FailureKind, HeldOutPoint, MemoryMeasure, Plan
from daemon.run_dir import RunWriter
from daemon.trainer import distributed
from daemon.trainer.attempt import StopFlag
from daemon.trainer.attention import eval_mode
from daemon.trainer.batches import StepBatches
from daemon.trainer.collate import IGNORE, Collator, Example
from daemon.trainer.errors import RunFailure
from daemon.trainer.loss import Objective
from daemon.trainer.selection import EVAL_LOSS, Selection, best_point, points_of, thinned


@dataclass(frozen=True, kw_only=True)
class Step:
    """The numbers of one optimizer step, over all processes."""

    number: int
    loss: float  # mean over the step's trained tokens
    grad_norm: float  # before clipping
    tokens: int  # padding not counted
    stop: bool  # a stop was requested of some process


class RunTrainer(Trainer):  # type: ignore[misc]  # transformers is not followed by the type checker
    """A Trainer that takes a step's rows in our order, divides them into passes, and keeps each step's numbers.

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
        gradient_checkpointing_on_oom: bool = False,
        writer: RunWriter | None = None,
        held_out: Sequence[Example] = (),
        selection: Selection | None = None,
    ) -> None:
        lengths = [len(example.input_ids) for example in examples]
        self.batches = StepBatches(
            lengths, rows_a_step=args.per_device_train_batch_size, seed=args.seed, grouped=grouped
        )
        self._collator = collator
        self._objective = objective
        self._budget_tokens = collator.budget_tokens
        self._gradient_checkpointing_on_oom = gradient_checkpointing_on_oom
        self._tried: tuple[MemoryMeasure, ...] = ()  # beyond smaller passes
        self._held_out = held_out
        self._selection = selection
        self._points: list[HeldOutPoint] = []  # evaluations so far, those of earlier attempts included
        self.stopping = False  # all processes have agreed to leave before the last step
        self.stopped_early = False  # the evaluations said so
        self.evaluating_seconds = 0.0  # between steps
        self._saving_since: float | None = None
        self.control: TrainerControl
        self._writer = writer
        self._grad_norm: torch.Tensor | None = None
        self._loss: torch.Tensor | None = None
        self._tokens = 0
        self._parameter_count: int = sum(parameter.numel() for parameter in model.parameters())
        self._pending: deque[tuple[int, torch.Tensor, Any, int]] = deque()  # step, numbers, CUDA event, tokens
        self.waiting_seconds = 0.0  # for the device's numbers: it computes meanwhile
        self.sealing_seconds = 0.0  # saving and sealing checkpoints, between steps
        # Several visible GPUs are no reason to spread one process over them: its batches would be cut in pieces.
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(
            model=model,
            args=args,
            train_dataset=list(examples),
            eval_dataset=list(held_out) or None,
            data_collator=collator,
            processing_class=tokenizer,
        )
        self.remove_callback(PrinterCallback)  # the log has it all already

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the steps in `StepBatches`' order. Every process reads every step, and computes its share of the rows."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # the loader draws from it, not from the process's random state
        )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Compute all passes of one step; returns its loss, the mean over its trained tokens."""
        self._tokens = inputs["tokens"]
        passes = inputs["passes"]
        if self._budget_tokens < self._collator.budget_tokens:
            passes = self._collator.passes(inputs["examples"], budget_tokens=self._budget_tokens)
        while (loss := self._try_passes(model, passes, inputs["trained_tokens"])) is None:
            passes = self._shrink(passes, inputs["examples"])
        self._loss = loss
        return loss

    def _try_passes(self, model: Any, passes: list[dict[str, Any]], trained_tokens: int) -> torch.Tensor | None:
        """Return the step's loss, with its gradients in place; None, without gradients, when the device is out of memory."""
        losses = []
        try:
            for number, one in enumerate(passes):
                last = number == len(passes) - 1
                with nullcontext() if last else self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, one, trained_tokens))
            return torch.stack(losses).sum()
        except torch.OutOfMemoryError:
            if distributed.world_size() > 1:
                raise  # the others are in the middle of exchanging gradients
        # Behind the except block: its traceback would keep the pass's tensors alive.
        model.zero_grad()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return None

    def _shrink(self, passes: list[dict[str, Any]], examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Return more and smaller passes; with one row each, enable gradient checkpointing.

        Raises RunFailure(OUT_OF_MEMORY) when neither is left.
        """
        longest = max(len(example.input_ids) for example in examples)
        while len(passes) < len(examples) and self._budget_tokens > longest:
            self._budget_tokens = max(self._budget_tokens // 2, longest)
            smaller = self._collator.passes(examples, budget_tokens=self._budget_tokens)
            if len(smaller) > len(passes):
                self._event("run.passes_halved", budget_tokens=self._budget_tokens, passes=len(smaller))
                return smaller
        if not self._gradient_checkpointing_on_oom:
            raise RunFailure(
                FailureKind.OUT_OF_MEMORY,
                f"a row of {longest} tokens does not fit the device's memory",
                tried=(MemoryMeasure.ONE_ROW, *self._tried),
            )
        self._gradient_checkpointing_on_oom = False
        self._tried = (MemoryMeasure.GRADIENT_CHECKPOINTING,)
        enable_gradient_checkpointing(self.model)
        self._event("run.gradient_checkpointing_enabled", longest_row=longest)
        return passes

    def _event(self, name: str, **data: Any) -> None:
        if self._writer is not None:
            self._writer.event(name, step=self.state.global_step, **data)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return this pass's share of the step's loss: the sum over its trained tokens, divided by those of the step.

        Times the number of processes, because gradients are averaged over them.
        """
        loss = self._objective.loss(model, inputs, over=num_items_in_batch, takes_count=self.model_accepts_loss_kwargs)
        self.loss_is_scaled_for_ga = True
        return loss * distributed.world_size()

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Move a pass to the device from pinned memory, without waiting for what the device computes."""
        if self.args.device.type != "cuda":
            return super()._prepare_inputs(inputs)
        return {
            name: value.pin_memory().to(self.args.device, non_blocking=True) if torch.is_tensor(value) else value
            for name, value in inputs.items()
        }

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        """As the Trainer, timed when it saves."""
        self._saving_since = None
        super()._maybe_log_save_evaluate(*args, **options)
        if self._saving_since is not None:
            self.sealing_seconds += time.perf_counter() - self._saving_since

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        """As the Trainer, from here on until it is sealed."""
        self._saving_since = time.perf_counter()
        super()._save_checkpoint(*args, **options)

    @property
    def held_out_points(self) -> tuple[HeldOutPoint, ...]:
        """The evaluations during the run, those of earlier attempts included, ascending by step."""
        return tuple(self._points)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Evaluate the held-out rows between two steps; a new best is sealed, and so is the end that they call for.

        Not when a stop is requested: the next attempt evaluates what this one left.
        """
        step = int(self.state.global_step)
        metrics: dict[str, float] = {}
        if not self.stopping or step >= self.state.max_steps:
            point = self._evaluate_now(step)
            metrics = {EVAL_LOSS: point.loss}
            self._take(point)
            self.state.log_history.append({**metrics, "step": step, "epoch": self.state.epoch})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_now(self, step: int) -> HeldOutPoint:
        started_at = time.perf_counter()
        loss = held_out_loss(self.model, self._held_out, self._collator, self._objective, None)
        assert loss is not None  # noqa: S101  there are rows
        self.evaluating_seconds += time.perf_counter() - started_at
        return HeldOutPoint(step=step, loss=loss)

    def _take(self, point: HeldOutPoint) -> None:
        """Note an evaluation, and ask for what follows from it."""
        assert self._selection is not None  # noqa: S101  nothing is evaluated without
        self._points.append(point)
        best = best_point(self._points)
        if best is point:
            self.state.best_metric, self.state.best_global_step = point.loss, point.step  # rotation spares it
            self.control.should_save = True
        self.stopped_early = self._selection.is_exhausted(self._points)
        if self.stopped_early:
            self.control.should_save = self.control.should_training_stop = True
        if self._writer is not None:
            self._writer.event(
                "run.evaluated",
                when="during",
                step=point.step,
                held_out_loss=point.loss,
                rows=len(self._held_out),
                best_step=best.step if best else None,
            )
        self._publish_points()

    def _publish_points(self) -> None:
        if self._writer is not None and (best := best_point(self._points)) is not None:
            self._writer.progress(
                held_out_loss=self._points[-1].loss, held_out_losses=thinned(self._points), best_step=best.step
            )

    def floating_point_ops(self, inputs: Any) -> int:
        """Return the usual estimate: 6 for each parameter and token."""
        tokens: int = inputs["tokens"]
        return 6 * tokens * self._parameter_count

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As the Trainer, and keep it: it is checked at every step, not only at those that are logged."""
        self._grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._grad_norm

    def record_step(self, *, stop: bool) -> None:
        """Queue the numbers of the step that just ended, without waiting for the device."""
        assert self._loss is not None  # noqa: S101  a step has just ended
        norm = torch.as_tensor(0.0 if self._grad_norm is None else self._grad_norm, device=self._loss.device)
        numbers = torch.stack([self._loss.float(), norm.float(), torch.full_like(norm, float(stop)).float()])
        ready = None
        if numbers.is_cuda:
            numbers = torch.empty(3, pin_memory=True).copy_(numbers, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append((int(self.state.global_step), numbers, ready, self._tokens))

    def completed_steps(self, *, wait: bool) -> list[Step]:
        """Return the steps whose numbers have arrived: on a GPU all but the newest, unless told to `wait` for it.

        Every process calls this at the same steps, so that all of them see the same, stop requests included.
        """
        steps = []
        while self._pending and (wait or len(self._pending) > 1 or self._pending[0][2] is None):
            number, numbers, ready, tokens = self._pending.popleft()
            if ready is not None:
                started_at = time.perf_counter()
                ready.synchronize()
                self.waiting_seconds += time.perf_counter() - started_at
            loss, norm, stop = numbers.tolist()
            loss, stop = distributed.all_reduce_sum([loss, stop])
            steps.append(
                Step(number=number, loss=loss / distributed.world_size(), grad_norm=norm, tokens=tokens, stop=stop > 0)
            )
        return steps

    def run(self, resume_from: Path | None, plan: Plan) -> int:
        """Train to the last step, to where the evaluations end it, or until a stop is requested; returns the step counter.

        A checkpoint of the very last step has nothing left to train: the Trainer would take one step too many when the
        steps end inside an epoch, so only its weights are loaded.
        """
        if resume_from is not None:
            step = int(resume_from.name.rpartition("-")[2])
            self._catch_up(resume_from, step)
            if step >= plan.total_steps or self.stopped_early:
                self.load_weights(resume_from)
                return step
        self.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        return int(self.state.global_step)

    def _catch_up(self, checkpoint: Path, step: int) -> None:
        """Take over the evaluations of earlier attempts, and make up for the one that a stop kept from being made."""
        if self._selection is None or not self._selection.every:
            return
        history = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).log_history
        self._points = points_of(history)
        self.stopped_early = self._selection.is_exhausted(self._points)
        if self._selection.is_due(step) and all(point.step != step for point in self._points):
            self.load_weights(checkpoint)
            self._take(self._evaluate_now(step))

    def take_up(self, state: TrainerState) -> None:
        """Give the state that training begins with the evaluations so far; one that was made up for is not yet in it."""
        known = {point.step for point in points_of(state.log_history)}
        state.log_history += [
            {EVAL_LOSS: point.loss, "step": point.step, "epoch": state.epoch}
            for point in self._points
            if point.step not in known
        ]
        if (best := best_point(self._points)) is not None:
            state.best_metric, state.best_global_step = best.loss, best.step
            self._publish_points()

    def load_weights(self, checkpoint: Path) -> None:
        """Give the adapter the weights of a checkpoint."""
        set_peft_model_state_dict(self.model, load_file(checkpoint / "adapter_model.safetensors"))


def enable_gradient_checkpointing(model: PeftModel) -> None:
    """Recompute activations in the backward pass; the embeddings' output has to ask for gradients, their weights do not."""
    model.enable_input_require_grads()
    # Either name is deprecated in one release or another.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def held_out_loss(
    model: PeftModel, examples: Sequence[Example], collator: Collator, objective: Objective, stop: StopFlag | None
) -> float | None:
    """Return the mean loss of a trained token over held-out rows, None without rows or when a stop is requested.

    Without `stop`, no request ends it.
    """
    if not examples:
        return None
    total, tokens = 0.0, 0
    with eval_mode(model) as device, torch.inference_mode():
        for inputs in collator.passes(examples):
            if stop is not None and stop.requested and distributed.world_size() == 1:
                break
            count = int((inputs["labels"][..., 1:] != IGNORE).sum())
            if count:
                batch = {name: value.to(device) if hasattr(value, "to") else value for name, value in inputs.items()}
                total += float(objective.loss(model, batch, over=1))
            tokens += count
    total, all_tokens = distributed.all_reduce_sum([total, float(tokens)])
    if not all_tokens or (stop is not None and stop.requested):
        return None
    if not math.isfinite(total):
        raise RunFailure(
            FailureKind.DIVERGED, "the loss over the held-out rows is not finite", hint="lower learning_rate"
        )
    return total / all_tokens
