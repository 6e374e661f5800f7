"""Values of an evaluation: how rows were scored, how much a dataset lost, and what the gate says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class GateVerdict(StrEnum):
    """What the measurements say of a loss of earlier knowledge."""

    KEPT = "kept"  # no more than the margin is lost, with confidence
    UNCLEAR = "unclear"  # too few rows to tell
    REGRESSED = "regressed"  # more than the margin is lost, with confidence
    UNMEASURED = "unmeasured"  # nothing could be scored


class GateAction(StrEnum):
    """What the daemon did with a version."""

    PROMOTED = "promoted"
    WARNED = "warned"  # promoted although something was lost
    HELD = "held"  # complete, and not current


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScore:
    """A row under one adapter, answers given (teacher forcing)."""

    loss: float  # nats, summed over its trained tokens
    tokens: int  # trained ones
    exact: bool  # every trained token was the most likely one
    row: str = ""  # its digest in the memory; empty: scored by a release that did not say


@dataclass(frozen=True, kw_only=True)
class Change:
    """A measure's change for the worse over the same rows, with one-sided bounds."""

    measured: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class DatasetEvaluation:
    """An earlier dataset's held-out rows under the parent and under the candidate."""

    name: str
    digest: str
    rows: int
    tokens: int
    loss_before: float  # nats a trained token
    loss_after: float
    exact_before: float  # share of rows
    exact_after: float
    loss: Change
    exact: Change
    verdict: GateVerdict
    best_version: str | None = None  # of the line, by the loss over the same rows
    best_loss: float | None = None
    since_best: Change | None = None  # of the loss
    regressed_since_best: bool = False  # the verdict is for what was lost since that one


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalAnswer:
    """What a version answered to a row of an eval."""

    line: int
    prompt: str  # as it is shown: its beginning, or the last message's
    answer: str  # its beginning
    passed: bool


@dataclass(frozen=True, kw_only=True)
class EvalEvaluation:
    """An eval under the parent and under the candidate."""

    name: str
    rows: int  # of the file
    answered: int  # by the candidate, within evals_seconds
    passed: float | None  # share of the answered rows; None: none was answered
    verdict: GateVerdict
    compared: int = 0  # rows that both have answered
    passed_before: float | None = None  # share of those
    passed_after: float | None = None
    change: Change | None = None  # of that share, for the worse


@dataclass(frozen=True, kw_only=True)
class OwnEvaluation:
    """The run's own held-out rows under what became of it."""

    rows: int
    tokens: int
    loss: float
    exact: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured of a candidate, and what the gate says."""

    verdict: GateVerdict
    passes: bool  # whether the verdict lets it be promoted, as `strict` has it
    datasets: tuple[DatasetEvaluation, ...] = ()
    own: OwnEvaluation | None = None
    evals: tuple[EvalEvaluation, ...] = ()  # the administrator's
    eval_problems: tuple[str, ...] = ()  # why some are not used, or rows of them not answered
    unscored: tuple[str, ...] = ()  # names of datasets for which there was no budget this time
    unmeasured: tuple[str, ...] = ()  # names of datasets without held-out rows
    alpha: float | None = None  # the candidate is parent + alpha x (what was trained - parent); None: as it was trained
    gain_kept: float | None = None  # of the gain on its own rows, what the blend has
    tried: tuple[float, ...] = ()  # alphas that were not accepted
    scored_tokens: int = 0
    seconds: float = 0.0
    action: GateAction = GateAction.PROMOTED
    reasons: tuple[str, ...] = ()  # a sentence for each dataset that keeps it from passing
