"""One more run with twice the share of earlier rows, where a version has lost something: `[gate] retry_share`.

What the first run trained waits as a version that the gate holds, whatever becomes of the second one. The pure decisions come
first; `drop`, `take` and `was_promoted` ask and change the versions, under the model lock.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import guard
from daemon import held_versions
from daemon.config import Settings
from daemon.evaluation.gate import held_reason, with_action
from daemon.evaluation.settings import GateSettings
from daemon.evaluation.values import Evaluation, GateAction
from daemon.job import FirstRun, Job, RunResult
from daemon.lineage import HELD, read_lineage

MOST_SHARE = 0.9  # of the trained tokens: something of the new dataset has to be left


def recipe_of_second(job: Job, result: RunResult, gate: GateSettings) -> dict[str, Any] | None:
    """Return the recipe with which a finished job runs once more; None where it does not.

    Only after a run that rehearsed something: without that, twice as much is nothing either.
    """
    evaluation, recipe = result.evaluation, job.recipe
    if not gate.retry_share or gate.action == "off" or job.first_run is not None or recipe is None:
        return None
    if evaluation is None or evaluation.passes or not result.replayed:
        return None
    return {**recipe, "replay": doubled(recipe["replay"])}


def doubled(replay: Mapping[str, Any]) -> dict[str, Any]:
    """Return `[replay]` with twice the share; of small files, whose share min_rows decides, twice those and their limit."""
    shares = {name: max(replay[name], min(2 * replay[name], MOST_SHARE)) for name in ("share", "max_share")}
    return {**replay, **shares, "min_rows": 2 * replay["min_rows"]}


def held_for_now(result: RunResult) -> RunResult:
    """Return a first run's result as that of a version that waits for the second run, whatever the action is."""
    if result.evaluation is None:
        return result
    return replace(result, evaluation=replace(result.evaluation, action=GateAction.HELD))


def reason_of_second(result: RunResult, recipe: Mapping[str, Any], version: str) -> str:
    """Say why a job goes back into the queue after a run that succeeded."""
    share = f"twice the share of earlier rows ({recipe['replay']['share']:g})"
    return f"{held_reason(result)}; version {version} waits while the dataset is trained once more with {share}"


def is_better(second: RunResult, first: RunResult) -> bool:
    """Whether the second run's adapter is taken: by the gate, then by how many datasets and evals do not pass, then by the worst.

    Where they are alike the first one, of which less was rehearsed, is. One that continues another version is no measure.
    """
    if second.parent_digest != first.parent_digest:
        return True
    return _rank(second.evaluation) < _rank(first.evaluation)


def _rank(evaluation: Evaluation | None) -> tuple[bool, bool, int, float]:
    """The smaller the better; what was not measured is no better than anything."""
    if evaluation is None:
        return True, True, 0, 0.0
    lost = [change.measured for one in evaluation.datasets for change in (one.loss, one.exact)]
    lost += [one.change.measured for one in evaluation.evals if one.change is not None]
    if not lost:
        return True, True, 0, 0.0
    return not evaluation.passes, False, len(evaluation.reasons), max(lost)


def told(second: RunResult, first_version: str, reason: str) -> str:
    """The reason of a job whose second run was taken."""
    share = f"with twice the share of earlier rows, since version {first_version} had lost something of them"
    passes = second.evaluation is None or second.evaluation.passes
    return f"{reason} {share}" if passes else f"{reason} (also {share})"


def reason_of_first(first: RunResult, why: str) -> str:
    """The reason of a job whose first run is what came of it."""
    is_held = first.evaluation is not None and first.evaluation.action is GateAction.HELD
    return f"{held_reason(first) if is_held else f'{first.steps_run} of {first.steps_planned} steps'}; {why}"


# -- versions


def was_promoted(settings: Settings, job: Job) -> bool:
    """Whether a person made the first run's version current while the second run waited. Raises OSError."""
    if job.first_run is None:
        return False
    found = read_lineage(settings.model_dir).recorded().get(job.first_run.version)
    return found is not None and found.get("event") != HELD


def is_there(settings: Settings, version: str) -> bool:
    """Whether a version is held still, and nobody has discarded it. Raises OSError."""
    return version in read_lineage(settings.model_dir).held()


def first_stays(settings: Settings, first: FirstRun, second: RunResult) -> bool:
    """Whether the first run's version is taken, and not what the second one made. Raises OSError."""
    return not is_better(second, first.result) and is_there(settings, first.version)


def drop(settings: Settings, version: str) -> None:
    """Delete the first run's version, since the second one's is taken. Can be repeated.

    Raises DropforgeError, GuardError, OSError.
    """
    if is_there(settings, version):
        with guard.ModelLock(settings.model_dir, owner="gate"):
            held_versions.discard_held(settings.model_dir, settings.state_dir, version)


def take(settings: Settings, first: RunResult, version: str) -> RunResult:
    """Return the first run's result with what is done about it now; promotes its version where the action is to warn.

    Can be repeated. Raises DropforgeError, GuardError, OSError.
    """
    result = with_action(first, settings.gate)
    if result.evaluation is not None and result.evaluation.action is not GateAction.HELD:
        with guard.ModelLock(settings.model_dir, owner="gate"):
            held_versions.promote_held(settings.model_dir, version)
    return result


def give_up(settings: Settings, second: RunResult, version: str) -> None:
    """Delete the second run's adapter, since the first one's version is taken. Can be repeated. Raises GuardError, OSError."""
    with guard.ModelLock(settings.model_dir, owner="gate"):
        shutil.rmtree(second.candidate or "", ignore_errors=True)
        guard.mark_finished(settings.model_dir, version)
