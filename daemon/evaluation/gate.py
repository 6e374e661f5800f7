"""What the daemon does with a run's evaluation: promote it, warn, or hold the version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from daemon.evaluation.settings import GateSettings
from daemon.evaluation.statistics import describe_eval, passes, worst_of
from daemon.evaluation.values import EvalEvaluation, Evaluation, GateAction
from daemon.job import RunResult
from daemon.text import escape


def with_action(result: RunResult, gate: GateSettings) -> RunResult:
    """Return a finished run's result with what is done about its evaluation, as the settings are now."""
    evaluation = result.evaluation
    if evaluation is None or evaluation.passes:
        return result
    actions = {"hold": GateAction.HELD, "warn": GateAction.WARNED, "off": GateAction.PROMOTED}
    return replace(result, evaluation=replace(evaluation, action=actions[gate.action]))


def with_evals(evaluation: Evaluation, evals: Sequence[EvalEvaluation], gate: GateSettings) -> Evaluation:
    """Return an evaluation of datasets with what came of the evals: they take part in its verdict as a dataset does."""
    verdict = worst_of([evaluation.verdict, *(one.verdict for one in evals)])
    return replace(
        evaluation,
        verdict=verdict,
        passes=evaluation.passes and passes(verdict, strict=gate.strict),
        evals=tuple(evals),
        reasons=(*evaluation.reasons, *eval_reasons(evals, gate)),
    )


def eval_reasons(evals: Sequence[EvalEvaluation], gate: GateSettings) -> tuple[str, ...]:
    """A sentence for each eval that keeps a version from passing."""
    return tuple(
        f"eval {escape(one.name)} {describe_eval(one)}" for one in evals if not passes(one.verdict, strict=gate.strict)
    )


def held_reason(result: RunResult) -> str:
    """Say why a version is not current, as its job's reason."""
    reasons = result.evaluation.reasons if result.evaluation else ()
    return f"held: {'; '.join(reasons) or 'the gate was not passed'}"
