"""What a dropped file may say of rehearsal and holdouts, and what it has no say in."""

from __future__ import annotations

from typing import Any

import pytest

from daemon.errors import ConfigError
from daemon.recipe import Recipe


def test_a_dataset_may_set_its_share_what_it_supersedes_and_hold_more_rows_out() -> None:
    overrides = {"replay": {"share": 0.2, "supersedes": ["old.jsonl"]}, "data": {"held_out_min_rows": 80}}
    recipe = Recipe().with_overrides(overrides)
    assert (recipe.replay.share, recipe.replay.supersedes, recipe.data.held_out_min_rows) == (0.2, ("old.jsonl",), 80)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"data": {"held_out_min_rows": 39}}, r"held_out_min_rows cannot be lowered .*got 39, dropforge.toml has 40"),
        ({"replay": {"share": 0.3}}, r"\[replay\].*share is at most max_share = 0.25"),
        ({"replay": {"keep_deleted": True}}, r"\[replay\] keep_deleted cannot be set for one dataset"),
        ({"replay": {"memory_bytes": 0, "max_share": 0.9}}, r"max_share, memory_bytes cannot be set for one dataset"),
    ],
)
def test_a_dataset_has_no_say_in_how_it_is_measured_nor_in_what_is_kept(overrides: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Recipe().with_overrides(overrides)
