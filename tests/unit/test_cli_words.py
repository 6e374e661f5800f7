"""What a person types: options in any place, names of settings from elsewhere, and combinations that make no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from daemon import config
from daemon.cli.arguments import reorder
from daemon.cli.main import app
from daemon.errors import ConfigError
from daemon.recipe import Recipe

APPLICATION = typer.main.get_command(app)


@pytest.mark.parametrize(
    ("typed", "parsed"),
    [
        ("status --root R", "--root R status"),
        ("status --root=R --json", "--root=R status --json"),
        ("--json status", "status --json"),
        ("--json --root R memory forget X", "--root R memory forget --json X"),
        ("memory forget X --root R", "--root R memory forget X"),
        ("jobs", "jobs"),
        ("--help", "--help"),
        ("status --help --root R", "--root R status --help"),
        ("restore B --root NEW", "restore B --root NEW"),
        ("submit -- --root", "submit -- --root"),
        ("--root", "--root"),
        ("jobs --root", "--root jobs"),
        ("--json", "--json"),
    ],
)
def test_shared_options_stand_before_or_behind_the_command(typed: str, parsed: str) -> None:
    """And a command's own option of that name stays its own."""
    assert reorder(typed.split(), APPLICATION) == parsed.split()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[training]\nlr = 1e-4", "line 2: unknown key [training] lr; is [training] learning_rate meant?"),
        ("[lora]\nlora_r = 8", "is [lora] r meant?"),
        ("[lora]\nrank = 8", "is [lora] r meant?"),
        ("[training]\nbatch_size = 8", "is [training] per_device_train_batch_size meant?"),
        ("[data]\nmax_seq_length = 8", "is [data] max_length meant?"),
        ("[training]\nbf16 = true", "is [model] dtype meant?"),
        ("[training]\nr = 8", "is [lora] r meant?"),
        ("[training]\nlearing_rate = 1.0", "is [training] learning_rate meant?"),
        ("[trainig]\nseed = 1", "line 1: unknown key trainig; is [training] meant?"),
        ("[data.columns]\npromt = 'x'", "is [data] columns.prompt meant?"),
        ("[training]\nquux = 1", "line 2: unknown key [training] quux"),
        ("[training]\n\nstart_from = 'x'", "line 3: [training] start_from is 'latest' or 'base' (got \"x\")"),
        ("[training]\nreport_to = 'tensorboard'", '[training] report_to is a list, in brackets (got "tensorboard")'),
        ("[training]\ngradient_checkpointing = 'x'", "is true or false or 'auto' (got \"x\")"),
        ("[training]\nlearning_rate = nan", "is a finite number"),
        ("[training]\nlearning_rate = '1e-4x'", "[training] learning_rate is a number"),
        ("[training]\nnum_train_epochs = 0", "is more than 0"),
        ("[lora]\nr = 1.5", "[lora] r is a whole number (got 1.5)"),
        ("training = 3", "[training] is a table (got 3)"),
    ],
)
def test_a_wrong_setting_is_told_with_its_line_and_the_right_name(tmp_path: Path, text: str, said: str) -> None:
    """Names of other trainers are known; nothing is said in the words of the library that checks."""
    (tmp_path / config.CONFIG_NAME).write_text(text)
    with pytest.raises(ConfigError) as raised:
        config.load(tmp_path)
    assert said in raised.value.cause
    for word in ("Input should", "extra_forbidden", "Value error", "valid dictionary", "instance of"):
        assert word not in raised.value.cause


@pytest.mark.parametrize("overrides", [{"training": {"lr": 1}}, {"lora": {"rank": 3}}])
def test_a_sidecar_is_told_the_right_name_too(overrides: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"unknown key .*; is \[.* meant\?"):
        Recipe().with_overrides(overrides)
