"""Which mixture of parent and candidate is accepted in place of a candidate that has lost something.

parent + alpha x (candidate - parent), over all trained tensors. An alpha is chosen by one half of every dataset's rows and
verified by the other, so that it is not taken for what suits the rows that chose it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from daemon.evaluation.settings import GateSettings
from daemon.evaluation.statistics import Measured, Rows, judge, mean_loss, overall, passes
from daemon.evaluation.values import RowScore

ALPHAS = (0.75, 0.5, 0.25)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What one adapter scored: earlier datasets by their digests, and the run's own rows."""

    datasets: Mapping[str, Rows]
    own: Rows


@dataclass(frozen=True, kw_only=True)
class Blend:
    """The mixture that is accepted, and those that were tried before it."""

    alpha: float | None
    gain_kept: float | None = None
    scored: Scored | None = None
    tried: tuple[float, ...] = ()


def choose_blend(
    score: Callable[[float], Scored],
    *,
    measured: Sequence[Measured],
    parent: Rows,
    candidate: Rows,
    gate: GateSettings,
) -> Blend:
    """Return the largest alpha that is accepted; `parent` and `candidate` scored the run's own rows."""
    tried: list[float] = []
    for alpha in ALPHAS:
        scored = score(alpha)
        kept = gain_kept(parent, candidate, scored.own)
        if kept is not None and is_accepted(scored, measured, parent=parent, candidate=candidate, gate=gate):
            return Blend(alpha=alpha, gain_kept=kept, scored=scored, tried=tuple(tried))
        tried.append(alpha)
    return Blend(alpha=None, tried=tuple(tried))


def is_accepted(
    scored: Scored, measured: Sequence[Measured], *, parent: Rows, candidate: Rows, gate: GateSettings
) -> bool:
    """Whether a blend keeps the gain and what earlier versions had learned: as measured on the rows that choose, without a
    verdict against it on those that verify, and on all of them."""
    for chooses in (True, False):
        kept = gain_kept(half(parent, chooses), half(candidate, chooses), half(scored.own, chooses))
        if kept is None or kept < gate.min_gain_kept:
            return False
        halves = [with_candidate(one, scored, chooses) for one in measured]
        judged = judge([one for one in halves if one.before], gate)
        if chooses and any(max(one.loss.measured, one.exact.measured) > gate.margin for one in judged):
            return False
        if not chooses and not passes(overall(judged), strict=False):
            return False
    whole = judge([replace(one, after=scored.datasets[one.digest]) for one in measured], gate)
    return passes(overall(whole), strict=gate.strict)


def gain_kept(parent: Rows, candidate: Rows, blend: Rows) -> float | None:
    """Of the candidate's gain on its own rows, what a blend has; None when there was none."""
    before, after = mean_loss(list(parent.values())), mean_loss(list(candidate.values()))
    if not parent or after >= before:
        return None
    return (before - mean_loss(list(blend.values()))) / (before - after)


def half(rows: Rows, chooses: bool) -> dict[str, RowScore]:
    """The rows that choose, by their digests, or those that verify."""
    return {key: row for key, row in rows.items() if (int(key[-1], 16) % 2 == 0) is chooses}


def with_candidate(one: Measured, scored: Scored, chooses: bool) -> Measured:
    """One half of a dataset's rows, with another candidate's scores."""
    return replace(
        one,
        before=half(one.before, chooses),
        after=half(scored.datasets[one.digest], chooses),
        best=None if one.best is None else half(one.best, chooses),
    )
