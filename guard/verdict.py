"""The verdict: may a run continue from what the model directory holds? Pure: values in, value out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from .checkpoints import Checkpoint
from .fingerprint import Difference, Fingerprint
from .metadata import MetadataReading, require_known_form


class VerdictKind(StrEnum):
    """What a run may do with the checkpoints that are there."""

    FRESH = "fresh"
    RESUME = "resume"
    STALE = "stale"


class VerdictCause(StrEnum):
    """Why a verdict is what it is; `reasons` has the sentences."""

    NO_CHECKPOINTS = "no checkpoints"
    SAME_RUN = "same run"
    METADATA_UNKNOWN = "metadata unknown"
    RUN_FINISHED = "run finished"
    COMPONENTS_CHANGED = "components changed"
    NONE_INTACT = "none intact"
    REQUESTED = "requested"  # by a caller, whatever the checkpoints are


_KINDS = {VerdictCause.NO_CHECKPOINTS: VerdictKind.FRESH, VerdictCause.SAME_RUN: VerdictKind.RESUME}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a run may start from, and why.

    `checkpoint` is set for RESUME alone. `differences` holds every component that changed, notes included. `skipped` are the checkpoints newer than the one to resume from, each with its reason.
    """

    cause: VerdictCause
    checkpoint: Checkpoint | None = None
    reasons: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    skipped: tuple[Checkpoint, ...] = ()

    @property
    def kind(self) -> VerdictKind:
        """Follows from the cause."""
        return _KINDS.get(self.cause, VerdictKind.STALE)

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the components whose change makes checkpoints stale."""
        return tuple(difference.name for difference in self.differences if difference.is_identity)

    def __str__(self) -> str:
        where = f" from {self.checkpoint.path.name}" if self.checkpoint is not None else ""
        return "\n".join([f"{self.kind.value.upper()}{where}", *(f"  {reason}" for reason in self.reasons)])

    def to_json(self) -> dict[str, Any]:
        """The verdict as `--json` prints it."""
        return {
            "verdict": self.kind.value,
            "checkpoint": str(self.checkpoint.path) if self.checkpoint is not None else None,
            "step": self.checkpoint.step if self.checkpoint is not None else None,
            "reasons": list(self.reasons),
            "differences": [
                {"name": change.name, "old": change.old, "new": change.new, "kind": change.kind.value}
                for change in self.differences
            ],
            "passed_over": [
                {"path": str(item.path), "step": item.step, "state": item.state.value, "reason": item.reason}
                for item in self.skipped
            ],
        }


def decide(*, metadata: MetadataReading, fingerprint: Fingerprint, checkpoints: Sequence[Checkpoint]) -> Verdict:
    """FRESH without checkpoints; RESUME when metadata and seal both are of this very run; STALE otherwise.

    `checkpoints` ascend by step; those older than the newest that can be resumed from may be left out. Raises
    MetadataTooNew: metadata of a later form is not judged.
    """
    require_known_form("", metadata)
    if not checkpoints:
        return Verdict(cause=VerdictCause.NO_CHECKPOINTS, reasons=("there are no checkpoints",))
    recorded = metadata.run.fingerprint if metadata.run is not None else None
    if metadata.run is None or recorded is None:
        unknown = f"whose checkpoints these are is not known: {metadata.reason}"
        return Verdict(cause=VerdictCause.METADATA_UNKNOWN, reasons=(unknown,))
    differences = recorded.differences(fingerprint)
    changes = recorded.explain_changes(fingerprint)
    if changes or metadata.run.finished is not None:
        finished = metadata.run.finished
        ended = [f"the run that wrote them finished as version {finished}"] if finished is not None else []
        cause = VerdictCause.COMPONENTS_CHANGED if changes else VerdictCause.RUN_FINISHED
        return Verdict(cause=cause, reasons=(*ended, *changes), differences=differences)

    skipped: list[Checkpoint] = []
    for checkpoint in reversed(checkpoints):
        if checkpoint.belongs_to(fingerprint):
            notes = tuple(f"{change} (noted, does not matter)" for change in differences)
            explained = tuple(explain_skipped(item, fingerprint) for item in reversed(skipped))
            return Verdict(
                cause=VerdictCause.SAME_RUN,
                checkpoint=checkpoint,
                reasons=(*explained, *notes),
                differences=differences,
                skipped=tuple(reversed(skipped)),
            )
        skipped.append(checkpoint)
    explained = tuple(explain_skipped(checkpoint, fingerprint) for checkpoint in checkpoints)
    reasons = ("no checkpoint is intact and of this run", *explained)
    return Verdict(cause=VerdictCause.NONE_INTACT, reasons=reasons, differences=differences)


def explain_skipped(checkpoint: Checkpoint, fingerprint: Fingerprint) -> str:
    """Say why a checkpoint cannot be resumed from.

    `checkpoint-30 is torn: ...`, or, for an intact one of another run, in what that run differs.
    """
    name = checkpoint.path.name
    if checkpoint.is_intact and checkpoint.fingerprint is not None:
        changes = "; ".join(checkpoint.fingerprint.explain_changes(fingerprint))
        return f"{name} is of another run: {changes}"
    return f"{name} is {checkpoint.state.value}: {checkpoint.reason}"
