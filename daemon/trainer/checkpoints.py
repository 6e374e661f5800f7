"""Where a run starts and how it writes checkpoints: the guard's decision, resume, staging and seal.

Order matters: the guard decides, clears what does not belong and writes the metadata before the first weight is touched, all
under one lock that is held until the candidate is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import guard
from daemon import versions
from daemon.base_identity import CACHE_NAME, BaseModel
from daemon.fingerprint import fingerprint_run
from daemon.job import FailureKind, HeldOutPoint, Plan, RunSpec
from daemon.recipe import Recipe
from daemon.run_dir import RunWriter
from daemon.trainer import distributed
from daemon.trainer.collate import Examples, in_order
from daemon.trainer.errors import RunFailure
from daemon.trainer.model import lora_config, precision_of
from daemon.trainer.origin import Origin, find_parent
from daemon.trainer.rehearsal import Replay
from daemon.trainer.requirements import require_resume_support
from daemon.trainer.tokenise import digest_tokens


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run starts: the version that it continues, and the checkpoint that it resumes from."""

    prepared: guard.PreparedRun
    parent: versions.Version | None  # None: a fresh adapter on the base model
    precision: str  # as `precision_of` names it

    @property
    def staging_dir(self) -> Path:
        """Where checkpoints and the candidate are written before they have their name."""
        return self.prepared.staging_dir

    @property
    def step(self) -> int:
        """Optimizer steps done already."""
        return self.prepared.verdict.checkpoint.step if self.prepared.verdict.checkpoint else 0

    @property
    def resumed_from(self) -> str | None:
        """The checkpoint's name."""
        return self.prepared.resume_from.name if self.prepared.resume_from else None

    @property
    def cleared(self) -> int:
        """How many checkpoints were cleared."""
        return self.prepared.cleared.cleared if self.prepared.cleared else 0


def decide_start(
    spec: RunSpec,
    recipe: Recipe,
    base: BaseModel,
    examples: Examples,
    plan: Plan,
    *,
    origin: Origin,
    replay: Replay,
    key: bytes | None,
    writer: RunWriter,
) -> Start:
    """Let the guard decide fresh, resume or stale, clear what is stale, and write the run's metadata.

    The main process decides, under the model directory's lock, for all processes. Raises GuardError, DropforgeError,
    RunFailure(CONFIG) when a checkpoint would be loaded by libraries that are too old, RunFailure(LOST) when another version
    became current since `origin` was found.
    """
    model_dir, parent = Path(spec.model_dir), origin.parent
    if parent is not None and (current := find_parent(model_dir)) != parent:
        raise RunFailure(
            FailureKind.LOST,
            f"the current version changed from {parent.name} to {current.name if current else 'none'} meanwhile",
            hint="the job is tried again from the version that is current then",
        )
    precision = precision_of(recipe.model)

    def prepare() -> guard.PreparedRun:
        fingerprint = fingerprint_run(
            dataset=spec.dataset,
            recipe=recipe,
            base_path=base.path,
            base_revision=base.revision,
            parent_version=parent.name if parent else None,
            parent_digest=parent.digest if parent else None,
            precision=precision,
            plan=plan,
            tokens_digest=digest_tokens(examples.trained),
            held_out_digest=digest_tokens(in_order(examples.held_out)) if examples.held_out else None,
            replayed=replay.datasets,
            replay_digest=replay.digest,
            lora_config=lora_config(recipe.lora, base).to_dict(),
            cache_path=Path(spec.state_dir) / CACHE_NAME if spec.state_dir else None,
        )
        return guard.prepare_run(
            model_dir,
            fingerprint=fingerprint,
            dataset_path=Path(spec.dataset.path),
            lora_config={"r": recipe.lora.r, "alpha": recipe.lora.lora_alpha, "dropout": recipe.lora.lora_dropout},
            key=key,
            log=lambda name, data: writer.event(name, **data),
        )

    prepared = distributed.broadcast(prepare() if distributed.is_main_process() else None)
    if prepared.resume_from is not None:
        require_resume_support()
    return Start(prepared=prepared, parent=parent, precision=precision)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Whose weights a run ends with."""

    step: int
    checkpoint: Path | None = None  # that has them; None: the model has them already
    problem: str = ""  # why they are not the best ones


def find_best(start: Start, points: Sequence[HeldOutPoint], *, steps_run: int, key: bytes | None) -> Kept:
    """Return the evaluated step with the lowest loss whose weights are there: the model's, or an intact checkpoint's.

    Where those of the best are lost, the best of the others. Raises GuardError.
    """
    step, checkpoint, lost = steps_run, None, ""
    for point in sorted(points, key=lambda point: (point.loss, point.step)):
        step, checkpoint = point.step, start.prepared.model_dir / f"checkpoint-{point.step}"
        if point.step == steps_run:
            checkpoint = None
            break
        reason = _why_lost(checkpoint, start, key)
        if not reason:
            break
        lost = lost or f"the best weights, of step {step}, could not be loaded: {reason}"
    else:
        step, checkpoint = steps_run, None
    return Kept(step=step, checkpoint=checkpoint, problem=lost and f"{lost}; those of step {step} were taken")


def keep_best(
    start: Start,
    points: Sequence[HeldOutPoint],
    *,
    steps_run: int,
    key: bytes | None,
    load: Callable[[Path], None],
    writer: RunWriter,
) -> Kept:
    """Give the model the weights of the evaluation with the lowest loss. The main process chooses for all."""
    found = find_best(start, points, steps_run=steps_run, key=key) if distributed.is_main_process() else None
    kept: Kept = distributed.broadcast(found)
    if kept.checkpoint is not None:
        load(kept.checkpoint)
    writer.event("run.best_kept", step=kept.step, steps_run=steps_run, problem=kept.problem or None)
    return kept


def _why_lost(checkpoint: Path, start: Start, key: bytes | None) -> str:
    """Why a checkpoint of this run cannot be loaded; empty when it can."""
    try:
        found = guard.verify_checkpoint(checkpoint, key=key)
    except guard.NotFound:
        return f"{checkpoint.name} is missing"
    if found.belongs_to(start.prepared.fingerprint):
        return ""
    return f"{checkpoint.name} is {found.state.value if found.reason else 'of another run'}{found.reason and ': '}{found.reason}"


def seal_checkpoints(
    start: Start, recipe: Recipe, *, key: bytes | None, on_sealed: Callable[[guard.Checkpoint], None]
) -> guard.SealCallback:
    """Return the Trainer callback that seals each staged checkpoint, renames it into place and rotates the older ones."""
    return guard.SealCallback(start.prepared, keep=recipe.training.save_total_limit, key=key, on_sealed=on_sealed)
