"""Limits: what one dropped file may ask of the machine, and how much of one owner may wait. The administrator sets them.

A wish beyond a limit refuses the file that has it, and nothing else: the queue is never held for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from daemon.recipe import NOT_FOR_ONE_DATASET, SIDECAR_TABLES, PositiveFloat, PositiveInt, Recipe, Section
from daemon.text import beyond_limit

SIDECAR_KEYS = ("priority", "force")  # beside the tables
# What a sidecar may name, and the limit that bounds it.
_BOUNDED = (
    ("lora", "r", "max_lora_rank"),
    ("training", "num_train_epochs", "max_epochs"),
    ("training", "max_steps", "max_steps"),
    ("training", "learning_rate", "max_learning_rate"),
    ("data", "max_length", "max_length"),
)
_ROWS_A_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")


class LimitSettings(Section):
    """`[limits]`: what one dropped file may ask for, and how much of one owner may wait."""

    sidecar_keys: tuple[str, ...] = Field(
        (*SIDECAR_KEYS, *SIDECAR_TABLES),
        description='What a sidecar may set: "priority", "force", whole tables ("lora"), or keys ("training.seed").',
    )
    max_lora_rank: PositiveInt = Field(1024, description="Largest [lora] r that a sidecar may ask for.")
    max_epochs: PositiveFloat = Field(1000.0, description="Most [training] num_train_epochs, likewise.")
    max_learning_rate: PositiveFloat = Field(10.0, description="Largest [training] learning_rate, likewise.")
    max_length: PositiveInt = Field(262_144, description="Largest [data] max_length, likewise.")
    max_batch_rows: PositiveInt = Field(
        65_536, description="Most rows a step, per_device_train_batch_size x gradient_accumulation_steps, likewise."
    )
    max_steps: int = Field(
        1_000_000,
        ge=0,
        description="Steps of one run over a file's own rows, also where rows and epochs make them; 0: any number.",
    )
    max_queued: PositiveInt = Field(
        500, description="Jobs of one owner that may wait; further files of theirs stay in the inbox."
    )
    max_rows: int = Field(0, ge=0, description="Rows of one file; 0: any number.")
    max_tokens: int = Field(0, ge=0, description="Tokens of one file's trained rows, one epoch; 0: any number.")
    max_file_bytes: int = Field(0, ge=0, description="Size of one file as it was dropped; 0: any.")
    max_expanded_bytes: int = Field(0, ge=0, description="Size of a .gz or .zst once it is decompressed; 0: any.")

    @field_validator("sidecar_keys")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            table, dot, key = name.partition(".")
            section = type(getattr(Recipe(), table)) if table in SIDECAR_TABLES else None
            fields = set(section.model_fields) - NOT_FOR_ONE_DATASET.get(table, frozenset()) if section else set()
            if not (name in SIDECAR_KEYS or (section and (not dot or key in fields))):
                raise ValueError(f"{name!r} is nothing that a sidecar can set")
        return names


def refusal(overrides: Mapping[str, Any], named: frozenset[str], recipe: Recipe, limits: LimitSettings) -> str:
    """Say which wish of a sidecar is beyond the limits; empty when none is.

    `named`: the keys beside its tables. `recipe`: the root's, with the sidecar's tables laid over it.
    """
    return _forbidden_key(overrides, named, limits) or _too_much(overrides, recipe, limits)


def plan_refusal(steps: int, tokens: int, limits: LimitSettings) -> str:
    """Say that a planned run has more steps, or tokens an epoch, than allowed; empty when it has not."""
    if limits.max_steps and steps > limits.max_steps:
        return beyond_limit(f"it would train {steps:,} steps", "max_steps", limits.max_steps)
    if limits.max_tokens and tokens > limits.max_tokens:
        return beyond_limit(f"its rows have {tokens:,} tokens", "max_tokens", limits.max_tokens)
    return ""


def _forbidden_key(overrides: Mapping[str, Any], named: frozenset[str], limits: LimitSettings) -> str:
    allowed = set(limits.sidecar_keys)
    asked = [(name, name) for name in sorted(named)]
    asked += [(f"{table}.{key}", f"[{table}] {key}") for table, values in overrides.items() for key in values]
    for name, shown in asked:
        if not {name, name.partition(".")[0]} & allowed:
            return f"{shown} cannot be set by a sidecar here: [limits] sidecar_keys allows {_listed(limits)}"
    return ""


def _listed(limits: LimitSettings) -> str:
    return ", ".join(limits.sidecar_keys) or "nothing"


def _too_much(overrides: Mapping[str, Any], recipe: Recipe, limits: LimitSettings) -> str:
    for table, key, name in _BOUNDED:
        value, limit = getattr(getattr(recipe, table), key), getattr(limits, name)
        if key in overrides.get(table, {}) and limit and value > limit:
            return beyond_limit(f"[{table}] {key} = {value} is asked for", name, limit)
    training = recipe.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    if set(_ROWS_A_STEP) & overrides.get("training", {}).keys() and rows > limits.max_batch_rows:
        return beyond_limit(f"{rows:,} rows a step are asked for", "max_batch_rows", limits.max_batch_rows)
    return ""
