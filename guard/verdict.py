"""The verdict: may a run continue from what the model directory holds? Pure: values in, value out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from .checkpoints import Checkpoint
from .errors import StampTooNew
from .fingerprint import Difference, Fingerprint
from .layout import STAMP_NAME
from .metadata import StampKind, StampReading


class VerdictKind(StrEnum):
    FRESH = "fresh"
    RESUME = "resume"
    STALE = "stale"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`checkpoint` is set for RESUME alone. `differences` holds every component that changed, notes included.

    `passed_over` are the checkpoints newer than the one to resume from, each with its reason.
    """

    kind: VerdictKind
    checkpoint: Checkpoint | None = None
    reasons: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    passed_over: tuple[Checkpoint, ...] = ()

    def __str__(self) -> str:
        where = f" from {self.checkpoint.path.name}" if self.checkpoint is not None else ""
        return "\n".join([f"{self.kind.value.upper()}{where}", *(f"  {reason}" for reason in self.reasons)])

    def to_json(self) -> dict[str, Any]:
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
                for item in self.passed_over
            ],
        }


def decide(*, stamp: StampReading, fingerprint: Fingerprint, checkpoints: Sequence[Checkpoint]) -> Verdict:
    """FRESH without checkpoints; RESUME when stamp and seal both are of this very run; STALE otherwise.

    `checkpoints` ascend by step; those older than the newest that can be resumed from may be left out. Raises
    StampTooNew: metadata of a later form is not judged.
    """
    if stamp.kind is StampKind.NEWER:
        raise StampTooNew(
            operation="use the metadata in",
            path=STAMP_NAME,
            cause=stamp.reason,
            hint="run the version of this program that wrote it, or move the model directory aside",
        )
    if not checkpoints:
        return Verdict(kind=VerdictKind.FRESH, reasons=("there are no checkpoints",))
    recorded = stamp.stamp.fingerprint if stamp.stamp is not None else None
    if stamp.stamp is None or recorded is None:
        return Verdict(kind=VerdictKind.STALE, reasons=(f"whose checkpoints these are is not known: {stamp.reason}",))
    differences = recorded.differences(fingerprint)
    reasons = [str(change) for change in differences if change.is_identity]
    if stamp.stamp.finished is not None:
        reasons.insert(0, f"the run that wrote them finished as version {stamp.stamp.finished}")
    if reasons:
        return Verdict(kind=VerdictKind.STALE, reasons=tuple(reasons), differences=differences)

    passed_over: list[Checkpoint] = []
    for checkpoint in reversed(checkpoints):
        if checkpoint.belongs_to(fingerprint):
            notes = tuple(f"{change} (noted, does not matter)" for change in differences)
            told = tuple(explain_passed_over(item, fingerprint) for item in reversed(passed_over))
            return Verdict(
                kind=VerdictKind.RESUME,
                checkpoint=checkpoint,
                reasons=(*told, *notes),
                differences=differences,
                passed_over=tuple(reversed(passed_over)),
            )
        passed_over.append(checkpoint)
    reasons = ["no checkpoint is intact and of this run"]
    reasons += [explain_passed_over(checkpoint, fingerprint) for checkpoint in checkpoints]
    return Verdict(kind=VerdictKind.STALE, reasons=tuple(reasons), differences=differences)


def explain_passed_over(checkpoint: Checkpoint, fingerprint: Fingerprint) -> str:
    """`checkpoint-30 is torn: ...`, or, for an intact one of another run, in what that run differs."""
    name = checkpoint.path.name
    if checkpoint.is_intact and checkpoint.fingerprint is not None:
        changes = "; ".join(str(d) for d in checkpoint.fingerprint.differences(fingerprint) if d.is_identity)
        return f"{name} is of another run: {changes}"
    return f"{name} is {checkpoint.state.value}: {checkpoint.reason}"
