"""A Trainer callback that seals every checkpoint. The only module of the guard that needs transformers.

The Trainer writes `<output_dir>/checkpoint-N`, rotates by its own rules, then calls `on_save`. Two ways to
use it:

- `output_dir` is the staging folder of a prepared run: the checkpoint is sealed there and renamed into the
  model directory, so that a half-written one never has a checkpoint's place;
- `output_dir` is the model directory itself, as in most scripts: the checkpoint is sealed where it is, and
  one that a crash cut short is found by its missing seal.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .atomic import PathLike, apply_umask
from .checkpoints import Checkpoint, rotate, seal_checkpoint
from .completeness import why_incomplete
from .errors import RunRefused, SealBroken, WeightsNotFinite, storage_errors
from .fingerprint import Fingerprint
from .layout import STAGING_NAME
from .prepare import PreparedRun

# Pickled arguments: nothing reads them on resume, and whatever unpickles them runs what they say.
_PICKLED_ARGUMENTS = "training_args.bin"


class SealCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by the type checker
    """Seal, move into place and rotate a Trainer's checkpoints.

    Refuses to train from another state than was decided.
    Give it a `PreparedRun`, or a model directory and a fingerprint. `keep` is the number of sealed
    checkpoints that stay besides the best one (the Trainer's `save_total_limit` counts only what is in its own `output_dir`; None
    leaves rotation to it). `on_sealed` is called with each sealed Checkpoint, in world process zero.
    """

    def __init__(
        self,
        prepared: PreparedRun | None = None,
        *,
        model_dir: PathLike | None = None,
        fingerprint: Fingerprint | None = None,
        keep: int | None = 2,
        key: bytes | None = None,
        on_sealed: Callable[[Checkpoint], None] | None = None,
    ) -> None:
        if prepared is not None:
            model_dir, fingerprint = prepared.model_dir, prepared.fingerprint
        if model_dir is None or fingerprint is None:
            raise TypeError("SealCallback needs a PreparedRun, or a model_dir and a fingerprint")
        self.prepared = prepared
        self.model_dir = Path(model_dir)
        self.fingerprint = fingerprint
        self.keep, self.key, self.on_sealed = keep, key, on_sealed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises RunRefused before the first step rather than at the first checkpoint."""
        self._is_staged(args)
        if args.save_only_model:
            raise self._refusal("save_only_model leaves out what a resume needs", "leave save_only_model at False")
        if self.prepared is None:
            return
        checkpoint = self.prepared.verdict.checkpoint
        decided = checkpoint.step if checkpoint is not None else 0
        if state.global_step != decided:
            raise self._refusal(
                f"the Trainer starts at step {state.global_step}, and step {decided} was decided",
                "trainer.train(resume_from_checkpoint=prepared.resume_from), never True",
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Every process has to be done with its part (each writes its own random state) before the seal, and
        # none may go on to the next save before the rename.
        """Seal the checkpoint that was just written, in the main process."""
        _wait_for_all_processes()
        try:
            if state.is_world_process_zero:
                self._seal(args, state, kwargs.get("model"))
        finally:
            _wait_for_all_processes()

    def _seal(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        name = f"checkpoint-{state.global_step}"
        folder = Path(args.output_dir, name)
        if not folder.is_dir():
            return  # save_strategy "best" without a new best: nothing was written
        _require_finite(model, folder)
        with storage_errors("seal", folder):
            with suppress(FileNotFoundError):
                (folder / _PICKLED_ARGUMENTS).unlink()
            apply_umask(folder)
            incomplete = why_incomplete(folder, step=state.global_step)
        if incomplete is not None:
            raise SealBroken(operation="seal", path=folder, cause=incomplete)
        into = self.model_dir / name if self._is_staged(args) else None
        sealed = seal_checkpoint(folder, step=state.global_step, fingerprint=self.fingerprint, key=self.key, into=into)
        if self.keep is not None:
            best = state.best_global_step  # of the evaluations so far; None or 0: there was none
            spared = (best,) if best else ()
            rotate(self.model_dir, keep=self.keep, fingerprint=self.fingerprint, key=self.key, spared=spared)
        if self.on_sealed is not None:
            self.on_sealed(sealed)

    def _is_staged(self, args: TrainingArguments) -> bool:
        output_dir = Path(args.output_dir).resolve()
        model_dir = self.model_dir.resolve()
        if output_dir == model_dir:
            return False
        if output_dir != model_dir / STAGING_NAME:
            raise self._refusal(
                f"the Trainer writes to {output_dir}",
                f"set output_dir to {self.model_dir} or to {self.model_dir / STAGING_NAME}",
            )
        if args.load_best_model_at_end:
            raise self._refusal(
                "load_best_model_at_end looks for checkpoints where they were staged",
                f"set output_dir to {self.model_dir}",
            )
        return True

    def _refusal(self, cause: str, hint: str) -> RunRefused:
        return RunRefused(operation="train in", path=self.model_dir, cause=cause, hint=hint)


def _require_finite(model: Any, folder: Path) -> None:
    """NaN reaches the weights without any error: the Trainer logs such a loss as 0.0 by default."""
    if model is None:
        return
    import torch

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter.detach()).all()):
            raise WeightsNotFinite(
                operation="seal",
                path=folder,
                cause=f"{name} holds NaN or infinite values: the run has diverged",
                hint="start again from the checkpoint before, with a lower learning rate or other data",
            )


def _wait_for_all_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
