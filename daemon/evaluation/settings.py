"""`[evaluation]` and `[gate]`: how much is measured, and what is done about a loss. Nothing of it in a sidecar."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from daemon.recipe import MOST, Section


class EvaluationSettings(Section):
    """`[evaluation]`: scoring held-out rows of earlier datasets after each run."""

    budget: float = Field(
        0.04, ge=0, lt=1, description="Of a run's work, what scoring earlier datasets may cost; 0: none are scored."
    )
    max_budget: float = Field(
        0.2, ge=0, lt=1, description="Of small runs: the share up to which the latest and the worst dataset are scored."
    )

    evals_seconds: float = Field(
        120.0,
        ge=0,
        le=MOST,
        description="In which a version answers the evals of the root's `evals/`; 0: it answers none.",
    )
    evals_max_new_tokens: int = Field(128, gt=0, le=2**20, description="The longest answer.")
    evals_check_seconds: float = Field(
        10.0,
        gt=0,
        le=MOST,
        description="For judging one answer, by a regular expression or a program; beyond: it fails.",
    )

    @model_validator(mode="after")
    def _bounds(self) -> EvaluationSettings:
        if self.budget > self.max_budget:
            raise ValueError(f"budget is at most max_budget = {self.max_budget:g}")
        return self


class GateSettings(Section):
    """`[gate]`: what becomes of a version that has lost something of what earlier ones had learned."""

    action: Literal["hold", "warn", "off"] = Field(
        "hold", description="Keep it from becoming current, promote it with a warning, or score nothing."
    )
    margin: float = Field(
        0.05, ge=0, le=MOST, description="Loss that is accepted: nats a token, and likewise share of exact answers."
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="With which a verdict holds over all datasets together.")
    strict: bool = Field(False, description="Pass only what is shown to have kept everything, not what is unclear.")
    remedies: tuple[Literal["interpolate"], ...] = Field(
        ("interpolate",), description="Tried before the action: blend the version with its parent."
    )
    retry_share: bool = Field(
        False, description="Then train once more with twice the share of earlier rows, and take what came out better."
    )
    min_gain_kept: float = Field(
        0.8, ge=0, le=1, description="Of the gain on the new dataset, what a blend must have to be taken."
    )
