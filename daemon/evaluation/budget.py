"""Which earlier datasets are scored after a run, and how many rows of each: as many as their cost allows.

A scored token costs about 0.4 of a trained one. Within `budget` of a run's work all datasets are scored, with fewer rows
each where there are many; where that is not enough, those that were scored longest ago come first. The worst and the latest
ones are scored after every run, as long as that stays within `max_budget`, or within what costs no more than loading a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from daemon.evaluation.settings import EvaluationSettings

SCORED_TOKEN_COST = 0.4  # of a trained one: no backward pass
MOST_ROWS = 40
LEAST_ROWS = 16  # of a dataset that is scored at all, if it has as many
ALWAYS_TOKENS = 8192  # that may be scored after however small a run: a few rows can do much harm
LATEST = 3  # datasets that are scored after every run, beside the worst


@dataclass(frozen=True, kw_only=True)
class ScoreBudget:
    """How many tokens may be scored."""

    tokens: float
    most: float  # of the worst and the latest

    @classmethod
    def of(cls, run_tokens: float, settings: EvaluationSettings) -> ScoreBudget:
        """The budget beside so many tokens that a run trains over all epochs."""
        return cls(
            tokens=run_tokens * settings.budget / SCORED_TOKEN_COST,
            most=max(run_tokens * settings.max_budget / SCORED_TOKEN_COST, ALWAYS_TOKENS),
        )


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What is known of an earlier dataset before it is scored."""

    digest: str
    learned: int  # versions ago
    scored: int | None  # versions ago, None: never
    lost: float = 0.0  # nats a token since it was learned, as far as it was measured


def scoring_order(datasets: Sequence[Standing]) -> tuple[list[str], list[str]]:
    """Return the datasets that are scored after every run, and the others, longest unscored first."""
    worst = [one for one in sorted(datasets, key=lambda one: (-one.lost, one.learned)) if one.lost > 0][:1]
    latest = [one for one in sorted(datasets, key=lambda one: (one.learned, one.digest)) if one not in worst][:LATEST]
    always = [*worst, *latest]
    others = sorted(
        (one for one in datasets if one not in always),
        key=lambda one: (one.scored is not None, -(one.scored or 0), -one.learned, one.digest),
    )
    return [one.digest for one in always], [one.digest for one in others]


def choose_rows(
    always: Sequence[str], others: Sequence[str], costs: Callable[[str], Sequence[int]], budget: ScoreBudget
) -> dict[str, int]:
    """How many rows of each dataset are scored, from its first on; datasets that are not scored have none.

    `costs`: tokens that scoring each row takes, under all the adapters that have not scored it; asked for only of datasets
    that there may be room for.
    """
    known: dict[str, Sequence[int]] = {}
    taken: dict[str, int] = {}
    spent = 0.0
    for digest in (*always, *others):
        most = max(budget.tokens, budget.most) if digest in always else budget.tokens
        if spent >= most:
            continue
        sizes = costs(digest)[:MOST_ROWS]
        least = min(LEAST_ROWS, len(sizes))
        if spent + sum(sizes[:least]) > most and digest not in always:
            break  # those behind it are not even read
        if least and spent + sum(sizes[:least]) <= most:
            known[digest], taken[digest] = sizes, least
            spent += sum(sizes[:least])
    limit = max(budget.tokens, budget.most) if taken.keys() <= set(always) else budget.tokens
    growing = list(taken)
    while growing:
        for digest in list(growing):
            at = taken[digest]
            if at >= len(known[digest]) or spent + known[digest][at] > limit:
                growing.remove(digest)
                continue
            spent += known[digest][at]
            taken[digest] += 1
    return taken
