"""Every setting of a recipe either changes the identity of a run, or is named here with the reason why it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from daemon.fingerprint import fingerprint_run
from daemon.job import Dataset
from daemon.recipe import Recipe
from guard import Fingerprint

# Settings that compute nothing, or whose effect another component holds.
HELD_ELSEWHERE = {
    "model.model_name_or_path": "the digest of the weights decides, not what they are called",
    "model.revision": "the trainer resolves it, and names the commit that it found",
    "model.allow_downloads": "how the weights come here",
    "model.allow_template_change": "whether a version is continued at all; the template itself is in tokenizer.digest",
    "model.dtype": "resolved into training.precision",
    "model.load_in_4bit": "resolved into training.precision",
    "training.num_processes": "a factor of the global batch, which stays the same while the other factors change",
    "training.report_to": "who is told",
    "training.gradient_checkpointing": "trades memory for time; the gradients are the same",
    "training.save_steps": "when it is saved",
    "training.save_total_limit": "what is kept",
    "training.logging_steps": "what is logged",
    "training.eval_steps": "evaluates; where that decides something, in selection.*",
    "training.load_best_model_at_end": "in selection.*, where rows are held out",
    "training.early_stopping_patience": "in selection.*, where rows are held out",
    "training.early_stopping_threshold": "in selection.*, where rows are held out",
    "data.render_seconds": "a limit that ends the run",
    "data.held_out_min_rows": "the rows that are trained are in data.tokens",
    "data.held_out_max_rows": "the rows that are trained are in data.tokens",
    "replay.share": "with the rows that it leads to, in replay.share and replay.digest",
    "replay.min_rows": "the rows that it leads to are in replay.digest",
    "replay.max_share": "the rows that it leads to are in replay.digest",
    "replay.supersedes": "the rows that it leads to are in replay.digest",
    "replay.memory_rows": "what is kept for later runs",
    "replay.memory_bytes": "what is kept for later runs",
    "replay.keep_deleted": "what is kept for later runs",
    "data.on_bad_rows": "rows kept are counted in dataset.rows",
    "data.max_bad_fraction": "refuses the file",
    "data.max_line_bytes": "rows kept are counted in dataset.rows",
    "data.max_expansion": "refuses the file",
}
# Other values of the settings whose type does not suggest one.
OTHER: dict[str, Any] = {
    "model.attn_implementation": "eager",
    "training.start_from": "base",
    "training.train_sampling_strategy": "random",
    "training.lr_scheduler_type": "linear",
    "training.optim": "adamw_torch",
    "lora.bias": "all",
    "lora.lora_dropout": 0.1,
    "lora.target_modules": ["q_proj"],
    "lora.modules_to_save": ["lm_head"],
    "data.train_on": "all",
    "data.prompt_completion": "chat",
    "data.columns": {"prompt": "question", "completion": "answer"},
}


def settings_of(model: BaseModel) -> list[str]:
    return [
        f"{table}.{name}" for table in type(model).model_fields for name in type(getattr(model, table)).model_fields
    ]


def fingerprint(recipe: Recipe, base: Path, *, held_out_digest: str | None = None) -> Fingerprint:
    dataset = Dataset(name="x.jsonl", path="/x.jsonl", size_bytes=1, rows=9, digest="ab" * 32, format="columns")
    return fingerprint_run(
        dataset=dataset,
        recipe=recipe,
        base_path=base,
        base_revision=None,
        parent_version=None,
        parent_digest=None,
        precision="float32",
        held_out_digest=held_out_digest,
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path


@pytest.mark.parametrize("name", sorted(set(settings_of(Recipe())) - HELD_ELSEWHERE.keys()))
def test_a_setting_that_decides_what_is_computed_makes_another_run(name: str, base: Path) -> None:
    table, key = name.split(".")
    values = Recipe().model_dump()
    before = values[table][key]
    if name in OTHER:
        values[table][key] = OTHER[name]
    elif isinstance(before, bool):
        values[table][key] = not before
    else:
        values[table][key] = before / 2 if isinstance(before, float) and before else before + 1 or 1
    changed = Recipe.model_validate(values)
    assert changed != Recipe()
    assert not fingerprint(changed, base).same_run(fingerprint(Recipe(), base)), f"{name} would resume a foreign run"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"prompt": "question", "completion": "answer"}, {"prompt": "answer", "completion": "question"}),
        ({"text": "question"}, {"text": "answer"}),
    ],
)
def test_other_columns_of_the_same_file_are_another_run(
    base: Path, before: dict[str, str], after: dict[str, str]
) -> None:
    one, other = (Recipe.model_validate({"data": {"columns": columns}}) for columns in (before, after))
    differences = fingerprint(one, base).differences(fingerprint(other, base))
    assert [change.name for change in differences if change.is_identity] == ["data.columns"]


SELECTS: dict[str, Any] = {"eval_steps": 5, "load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ({}, {"eval_steps": 5}, []),
        (SELECTS, {**SELECTS, "eval_steps": 6}, ["selection.eval_steps"]),
        (SELECTS, {**SELECTS, "early_stopping_patience": 2}, ["selection.early_stopping_patience"]),
        (SELECTS, {**SELECTS, "early_stopping_threshold": 0.1}, ["selection.early_stopping_threshold"]),
        (SELECTS, SELECTS, []),
    ],
)
def test_evaluations_are_part_of_a_run_s_identity_where_they_decide_what_it_ends_with(
    base: Path, before: dict[str, Any], after: dict[str, Any], changed: list[str]
) -> None:
    one, other = (
        fingerprint(Recipe.model_validate({"training": settings}), base, held_out_digest="12")
        for settings in (before, after)
    )
    assert [change.name for change in one.differences(other) if change.is_identity] == changed


def test_other_held_out_rows_are_another_run_only_where_they_choose_its_weights(base: Path) -> None:
    for settings, is_same in (({}, True), ({"eval_steps": 5}, True), (SELECTS, False)):
        recipe = Recipe.model_validate({"training": settings})
        one, other = (fingerprint(recipe, base, held_out_digest=digest) for digest in ("12", "34"))
        assert one.same_run(other) is is_same


def test_what_is_held_elsewhere_is_still_a_setting() -> None:
    assert HELD_ELSEWHERE.keys() | OTHER.keys() <= set(settings_of(Recipe()))
