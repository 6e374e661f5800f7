"""What is monitored while a run trains: every step's numbers, stop requests, and the time that this takes."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from daemon.job import FailureKind, Plan
from daemon.run_dir import RunWriter
from daemon.trainer.attempt import StopFlag
from daemon.trainer.errors import RunFailure
from guard import Checkpoint

if TYPE_CHECKING:
    from daemon.trainer.loop import RunTrainer, Step

# A loss is a spike when it is this many times the median of those before, and this many median deviations above it.
SPIKE_FACTOR, SPIKE_DEVIATIONS = 1.5, 8.0
SPIKE_WINDOW, SPIKE_MIN_STEPS = 64, 10


def is_spike(loss: float, recent: list[float] | deque[float]) -> bool:
    """Return whether a step's loss is far above those before it."""
    if len(recent) < SPIKE_MIN_STEPS:
        return False
    usual = statistics.median(recent)
    deviation = statistics.median(abs(value - usual) for value in recent)
    return loss > SPIKE_FACTOR * usual and loss > usual + SPIKE_DEVIATIONS * deviation


def seconds_left(seconds: float, *, steps: int, left: int) -> float | None:
    """To the end of training, where `steps` behind the first took so long and so many are `left`.

    None before a second step is done: the first loads and compiles what the others find, and says nothing of them.
    """
    if left <= 0:
        return 0.0
    return round(seconds / steps * left, 1) if steps > 0 else None


class ScalarWriter:
    """Appends scalars to one TensorBoard event file in `folder`; each attempt has its own, and TensorBoard joins them.

    Whole after each write, and on this thread: tensorboardX's own SummaryWriter would lose a full disk's error in another
    thread. Raises ImportError when tensorboardX is not installed, OSError.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboardX import RecordWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        self._records = RecordWriter(str(folder / f"events.out.tfevents.{time.time():.0f}.dropforge.{os.getpid()}"))
        self._append(file_version="brain.Event:2")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add one point to each of these curves."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._append(step=step, summary=self._summary(value=values))

    def _append(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()


def open_scalars(folder: Path, writer: RunWriter) -> ScalarWriter | None:
    """Open a ScalarWriter; None, and one event that says so, without tensorboardX or where the disk refuses it."""
    try:
        return ScalarWriter(folder)
    except ImportError as error:
        writer.event("run.scalars_not_written", error=str(error), hint="pip install tensorboardX")
    except OSError as error:
        writer.event("run.scalars_not_written", error=str(error), hint="the next attempt writes them again")
    return None


@dataclass(frozen=True, kw_only=True)
class _Moment:
    """When a step was done, and how many tokens were trained by then."""

    seconds: float
    tokens: int


class MonitorCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by the type checker
    """Monitors every step: stops on request, fails on the first number that is not finite, publishes progress."""

    def __init__(
        self,
        *,
        writer: RunWriter,
        stop: StopFlag,
        plan: Plan,
        trainer: RunTrainer,
        scalars: ScalarWriter | None = None,
    ) -> None:
        self._writer = writer
        self._stop = stop
        self._plan = plan
        self._trainer = trainer
        self._scalars = scalars
        self._loss_sum, self._steps = 0.0, 0
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._started_at = 0.0
        self._start_step = 0
        self.tokens = 0  # trained over in this attempt, padding not counted
        self.spikes: list[tuple[int, float, float]] = []  # step, its loss, the usual one
        self.bookkeeping_seconds = 0.0  # spent in here, between steps
        self.train_seconds = 0.0
        self._after_first: _Moment | None = None  # when the first step was done
        self._after_last: _Moment | None = None
        self._logged = _Moment(seconds=0.0, tokens=0)  # what the speed of the next logged steps is measured from

    @property
    def sealing_seconds(self) -> float:
        """Spent on saving and sealing checkpoints."""
        return self._trainer.sealing_seconds

    @property
    def evaluating_seconds(self) -> float:
        """Spent on the held-out rows, between steps."""
        return self._trainer.evaluating_seconds

    @property
    def mean_loss(self) -> float | None:
        """Mean over the steps of this attempt; None when it had none to run."""
        return self._loss_sum / self._steps if self._steps else None

    @property
    def tokens_per_second(self) -> float | None:
        """Useful tokens a second of this attempt, padding not counted."""
        elapsed = self.train_seconds or time.monotonic() - self._started_at
        return self.tokens / elapsed if self._steps and elapsed > 0 else None

    @property
    def steady_tokens_per_second(self) -> float | None:
        """The same without the first step, which loads and compiles what the others find; None when there was no other."""
        first, last = self._after_first, self._after_last
        if first is None or last is None or last.tokens == first.tokens or last.seconds <= first.seconds:
            return None
        return (last.tokens - first.tokens) / (last.seconds - first.seconds)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the Trainer plans as many steps as the run."""
        self._started_at = time.monotonic()
        self._logged = _Moment(seconds=self._started_at, tokens=self.tokens)
        self._start_step = int(state.global_step)
        if state.max_steps != self._plan.total_steps:
            raise RunFailure(
                FailureKind.INTERNAL,
                f"the Trainer plans {state.max_steps} steps, and {self._plan.total_steps} were planned",
                hint="the installed transformers counts steps in another way than Dropforge expects; report this",
            )
        # A resumed state brings the old intervals along; these may differ between attempts.
        state.save_steps, state.logging_steps, state.eval_steps = args.save_steps, args.logging_steps, args.eval_steps
        self._trainer.take_up(state)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch of the row order: after a resume the Trainer's own way reaches no wrapped sampler."""
        self._trainer.batches.set_epoch(math.floor(state.epoch or 0.0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the steps whose numbers have arrived, publish the newest, and stop when that is requested."""
        started_at = time.perf_counter() - self._trainer.waiting_seconds
        self._trainer.record_step(stop=self._stop.requested)
        # Nothing unchecked may be sealed.
        steps = self._trainer.completed_steps(
            wait=control.should_save or control.should_evaluate or control.should_training_stop
        )
        for step in steps:
            self._check(step)
        if steps:
            if steps[0].number == self._start_step + 1:
                self._writer.event("run.first_step", step=steps[0].number, loss=round(steps[0].loss, 6))
            self._publish_progress(state, steps[-1])
        if any(step.stop for step in steps):
            for step in self._trainer.completed_steps(wait=True):
                self._check(step)
            control.should_save = True
            control.should_training_stop = True
            self._trainer.stopping = True
        # Waiting is subtracted on both sides: the device computes meanwhile.
        self.bookkeeping_seconds += time.perf_counter() - self._trainer.waiting_seconds - started_at

    def _check(self, step: Step) -> None:
        for name, value in (("loss", step.loss), ("gradient norm", step.grad_norm)):
            if not math.isfinite(value):
                raise RunFailure(
                    FailureKind.DIVERGED,
                    f"the {name} became {value} at step {step.number}",
                    hint="lower learning_rate, or look for odd rows near there; nothing of this run is kept",
                )
        if is_spike(step.loss, self._recent):
            usual = statistics.median(self._recent)
            self.spikes.append((step.number, step.loss, usual))
            self._writer.event("run.loss_spiked", step=step.number, loss=round(step.loss, 6), usual=round(usual, 6))
        self._recent.append(step.loss)
        self._loss_sum += step.loss
        self._steps += 1
        self.tokens += step.tokens
        self._after_last = _Moment(seconds=time.monotonic(), tokens=self.tokens)
        self._after_first = self._after_first or self._after_last

    def _publish_progress(self, state: TrainerState, step: Step) -> None:
        elapsed = time.monotonic() - self._started_at
        first, last = self._after_first, self._after_last
        steady = last.seconds - first.seconds if first and last else 0.0
        self._writer.progress(
            phase="training",
            step=step.number,
            epoch=round(state.epoch or 0.0, 4),
            loss=round(step.loss, 6),
            grad_norm=round(step.grad_norm, 6),
            learning_rate=float(self._trainer._get_learning_rate()),
            tokens_per_second=round(self.tokens / elapsed, 1) if elapsed else None,
            eta_seconds=seconds_left(steady, steps=self._steps - 1, left=self._plan.total_steps - step.number),
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Publish what the Trainer logs as an event and as scalars."""
        started_at = time.perf_counter()
        if logs and "loss" in logs:
            numbers = {name: round(float(value), 8) for name, value in logs.items()}
            self._writer.event(
                "run.stepped", step=state.global_step, **numbers, tokens_per_second=self._speed_since_logged()
            )
            self.write_scalars(int(state.global_step), {f"train/{name}": value for name, value in numbers.items()})
        self.bookkeeping_seconds += time.perf_counter() - started_at

    def _speed_since_logged(self) -> float | None:
        """Useful tokens a second since this was last called; None where no step has arrived since."""
        now, before = _Moment(seconds=time.monotonic(), tokens=self.tokens), self._logged
        if now.tokens == before.tokens or now.seconds <= before.seconds:
            return None
        self._logged = now
        return round((now.tokens - before.tokens) / (now.seconds - before.seconds), 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the last steps, and note the time."""
        for step in self._trainer.completed_steps(wait=True):
            self._check(step)
        self.train_seconds = time.monotonic() - self._started_at

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Add one point to each of these curves. A disk that refuses them ends the curves, not the run."""
        if self._scalars is None:
            return
        try:
            self._scalars.write(step, scalars)
        except OSError as error:
            self._scalars = None
            self._writer.event("run.scalars_not_written", error=str(error), hint="the next attempt writes them again")

    def sealed(self, checkpoint: Checkpoint) -> None:
        """Publish a checkpoint that is intact on disk."""
        self._writer.progress(last_checkpoint_step=checkpoint.step)
        self._writer.event(
            "checkpoint.sealed", step=checkpoint.step, path=str(checkpoint.path), size_bytes=checkpoint.size_bytes
        )
