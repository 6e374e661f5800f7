"""The paired bootstrap over rows, and the verdict that follows from it.

The loss of a dataset is the ratio of two sums, nats over tokens. Both adapters score the same rows, so that rows are drawn
with what both made of them: what makes a row hard for both does not count. Bounds are one-sided, at
(1 - confidence) / tests, tests being all comparisons of one evaluation.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import repeat
from operator import truediv

from daemon.evaluation.settings import GateSettings
from daemon.evaluation.values import Change, DatasetEvaluation, EvalAnswer, EvalEvaluation, GateVerdict, RowScore

RESAMPLES = 2000
SEED = 0
MEASURES = 2  # of each dataset: loss and exact match
BEST_MARGINS = 3  # since the best of the line, so many margins may be lost: a best is in part luck
LEAST_ROWS = 8  # of fewer, a bootstrap says nothing: verdicts are unclear

Rows = Mapping[str, RowScore]  # by the digest of a row's tokens


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A dataset's rows under the parent, the candidate, and the version of the line that scored best on all of them."""

    name: str
    digest: str
    before: Rows
    after: Rows  # the same rows
    best: Rows | None = None  # the same rows; None: no other version scored them all
    best_version: str | None = None


@dataclass(frozen=True, kw_only=True)
class MeasuredEval:
    """An eval's rows, by their digests, as far as the parent and the candidate have answered them."""

    name: str
    rows: int
    before: Mapping[str, EvalAnswer]
    after: Mapping[str, EvalAnswer]


def judge(measured: Sequence[Measured], gate: GateSettings, *, evals: int = 0) -> tuple[DatasetEvaluation, ...]:
    """Judge each dataset at a confidence that holds for all of them together, and for so many evals beside them."""
    level = _level(gate, datasets=len(measured), evals=evals)
    return tuple(judge_dataset(one, margin=gate.margin, level=level) for one in measured)


def judge_evals(
    measured: Sequence[MeasuredEval], gate: GateSettings, *, datasets: int = 0
) -> tuple[EvalEvaluation, ...]:
    """Judge each eval by the share of rows that pass, at a confidence that holds for datasets and evals together."""
    level = _level(gate, datasets=datasets, evals=len(measured))
    return tuple(_judge_eval(one, margin=gate.margin, level=level) for one in measured)


def _level(gate: GateSettings, *, datasets: int, evals: int) -> float:
    return (1 - gate.confidence) / max(1, MEASURES * datasets + evals)


def _judge_eval(one: MeasuredEval, *, margin: float, level: float) -> EvalEvaluation:
    found = EvalEvaluation(
        name=one.name,
        rows=one.rows,
        answered=len(one.after),
        passed=sum(answer.passed for answer in one.after.values()) / len(one.after) if one.after else None,
        verdict=GateVerdict.UNMEASURED,
    )
    keys = [key for key in one.after if key in one.before]
    if not keys:
        return found
    before, after = ([answers[key].passed for key in keys] for answers in (one.before, one.after))
    change = bootstrap_ratio([float(old) - float(new) for old, new in zip(before, after, strict=True)], None, level)
    return replace(
        found,
        compared=len(keys),
        passed_before=sum(before) / len(keys),
        passed_after=sum(after) / len(keys),
        change=change,
        verdict=verdict_of([change], margin) if len(keys) >= LEAST_ROWS else GateVerdict.UNCLEAR,
    )


def judge_dataset(one: Measured, *, margin: float, level: float) -> DatasetEvaluation:
    """Compare a candidate with its parent, and with the best of the line."""
    keys = list(one.before)
    before, after = [one.before[key] for key in keys], [one.after[key] for key in keys]
    loss, exact = loss_change(before, after, level), exact_change(before, after, level)
    verdict = verdict_of((loss, exact), margin)
    best = None if one.best is None else [one.best[key] for key in keys]
    since_best = None if best is None else loss_change(best, after, level)
    drifted = since_best is not None and since_best.low > BEST_MARGINS * margin
    enough = len(keys) >= LEAST_ROWS
    return DatasetEvaluation(
        name=one.name,
        digest=one.digest,
        rows=len(keys),
        tokens=sum(row.tokens for row in before),
        loss_before=mean_loss(before),
        loss_after=mean_loss(after),
        exact_before=exact_share(before),
        exact_after=exact_share(after),
        loss=loss,
        exact=exact,
        verdict=(GateVerdict.REGRESSED if drifted else verdict) if enough else GateVerdict.UNCLEAR,
        best_version=one.best_version,
        best_loss=None if best is None else mean_loss(best),
        since_best=since_best,
        regressed_since_best=enough and drifted and verdict is not GateVerdict.REGRESSED,
    )


def verdict_of(changes: Sequence[Change], margin: float) -> GateVerdict:
    """REGRESSED when one lower bound is beyond the margin, KEPT when all upper ones are within."""
    if any(change.low > margin for change in changes):
        return GateVerdict.REGRESSED
    return GateVerdict.KEPT if all(change.high <= margin for change in changes) else GateVerdict.UNCLEAR


def overall(judged: Sequence[DatasetEvaluation | EvalEvaluation]) -> GateVerdict:
    """The verdict over all of them: that of the worst."""
    return worst_of([one.verdict for one in judged])


def worst_of(verdicts: Sequence[GateVerdict]) -> GateVerdict:
    """The verdict that decides; UNMEASURED where all are, or there is none."""
    order = (GateVerdict.REGRESSED, GateVerdict.UNCLEAR, GateVerdict.KEPT)
    return next((verdict for verdict in order if verdict in verdicts), GateVerdict.UNMEASURED)


def passes(verdict: GateVerdict, *, strict: bool) -> bool:
    """Whether a verdict lets a version be promoted."""
    return verdict is not GateVerdict.REGRESSED and not (strict and verdict is GateVerdict.UNCLEAR)


# -- measures


def mean_loss(rows: Sequence[RowScore]) -> float:
    """Nats a trained token."""
    return sum(row.loss for row in rows) / max(1, sum(row.tokens for row in rows))


def exact_share(rows: Sequence[RowScore]) -> float:
    """Share of the rows that are exact."""
    return sum(row.exact for row in rows) / max(1, len(rows))


def loss_change(before: Sequence[RowScore], after: Sequence[RowScore], level: float) -> Change:
    """How much the loss rose, nats a trained token."""
    differences = [new.loss - old.loss for old, new in zip(before, after, strict=True)]
    return bootstrap_ratio(differences, [row.tokens for row in before], level)


def exact_change(before: Sequence[RowScore], after: Sequence[RowScore], level: float) -> Change:
    """How much the share of exact rows fell."""
    differences = [float(old.exact) - float(new.exact) for old, new in zip(before, after, strict=True)]
    return bootstrap_ratio(differences, None, level)


def bootstrap_ratio(differences: Sequence[float], weights: Sequence[int] | None, level: float) -> Change:
    """Sum of differences over sum of weights (None: one each), with bounds that each fail with probability `level`.

    Of rows drawn with replacement, RESAMPLES times, the same draws every time. The spread is widened by sqrt(n / (n - 1)): a
    resample of n rows varies by so much less than n new rows would.
    """
    count = len(differences)
    total = float(count) if weights is None else float(sum(weights))
    measured = sum(differences) / max(total, 1.0)
    if count < 2 or not any(differences):
        return Change(measured=measured, low=measured, high=measured)
    draws = _resamples(count)
    sums = [sum(map(differences.__getitem__, draw)) for draw in draws]
    totals = repeat(total) if weights is None else (max(1, sum(map(weights.__getitem__, draw))) for draw in draws)
    ordered = sorted(map(truediv, sums, totals))
    widen = (count / (count - 1)) ** 0.5
    cut = min(int(level * RESAMPLES), RESAMPLES - 1)
    return Change(
        measured=measured,
        low=measured + widen * (ordered[cut] - measured),
        high=measured + widen * (ordered[-1 - cut] - measured),
    )


@lru_cache(maxsize=8)
def _resamples(count: int) -> tuple[list[int], ...]:
    """Which rows are drawn, of so many."""
    generator = random.Random(SEED)  # noqa: S311  draws of rows keep no secret
    return tuple(generator.choices(range(count), k=count) for _ in range(RESAMPLES))


# -- sentences


def describe(one: DatasetEvaluation) -> str:
    """Say what a dataset lost, in one line."""
    loss = one.loss
    sentence = (
        f"{one.loss_before:.3g} -> {one.loss_after:.3g} nats a token ({loss.measured:+.3g}, {loss.low:+.3g} to {loss.high:+.3g})"
        f", exact {one.exact_before:.0%} -> {one.exact_after:.0%}, {one.rows} rows"
    )
    if one.regressed_since_best and one.since_best is not None and one.best_loss is not None:
        sentence += f"; version {one.best_version} had {one.best_loss:.3g} ({one.since_best.measured:+.3g} since)"
    return sentence


def describe_eval(one: EvalEvaluation) -> str:
    """Say how many rows of an eval pass, in one line."""
    rows = f"{one.rows} row{'' if one.rows == 1 else 's'}"
    if one.passed is None:
        return f"none of {rows} was answered"
    answered = f"{one.answered} of {rows}" if one.answered < one.rows else rows
    if one.change is None:
        return f"{one.passed:.0%} of {answered} pass"
    measured, low, high = (0 - change for change in (one.change.measured, one.change.high, one.change.low))
    change = f"{measured:+.0%}, {low:+.0%} to {high:+.0%}"
    compared = f", {one.compared} compared" if one.compared < one.answered else ""
    return f"{one.passed_before:.0%} -> {one.passed_after:.0%} pass ({change}), {answered}{compared}"
