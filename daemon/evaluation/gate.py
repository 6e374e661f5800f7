"""What the daemon does with a run's evaluation: promote it, warn, or hold the version."""

from __future__ import annotations

from dataclasses import replace

from daemon.evaluation.settings import GateSettings
from daemon.evaluation.values import GateAction
from daemon.job import RunResult


def with_action(result: RunResult, gate: GateSettings) -> RunResult:
    """Return a finished run's result with what is done about its evaluation, as the settings are now."""
    evaluation = result.evaluation
    if evaluation is None or evaluation.passes:
        return result
    actions = {"hold": GateAction.HELD, "warn": GateAction.WARNED, "off": GateAction.PROMOTED}
    return replace(result, evaluation=replace(evaluation, action=actions[gate.action]))


def held_reason(result: RunResult) -> str:
    """Say why a version is not current, as its job's reason."""
    reasons = result.evaluation.reasons if result.evaluation else ()
    return f"held: {'; '.join(reasons) or 'the gate was not passed'}"
