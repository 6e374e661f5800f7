"""What a person types: options in any place, names of settings from elsewhere, and combinations that make no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from daemon import config
from daemon.cli.account import typed
from daemon.cli.arguments import reorder
from daemon.cli.main import app
from daemon.errors import ConfigError
from daemon.recipe import Recipe
from tests.support.root import dropforge

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
        ("[training]\nreport_to = 'tensorboard'", '[training] report_to is a list, in brackets: ["tensorboard"] (got'),
        ("[inbox]\nsettle_seconds = -1", "[inbox] settle_seconds is at least 0 (got -1)"),
        ("[lora]\nr = 8\n[lora]\nr = 9", "[lora] stands there twice (at line 3"),
        ("[data.columns]\n[data.columns]", "[data.columns] stands there twice (at line 2"),
        ("[lora]\nr = 8\nr = 9\n", "a key stands there twice (at line 3"),
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


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("jobs -n 0", "it has to be at least 1"),
        ("jobs -n many", "it has to be a whole number"),
        ("jobs --state done", "Invalid value for '--state': 'done' is not one of 'claimed', 'queued'"),
    ],
)
def test_a_wrong_value_of_an_option_is_told_in_plain_words(tmp_path: Path, line: str, said: str) -> None:
    done = dropforge("--root", str(tmp_path), *line.split())
    assert done.returncode == 2
    assert said in done.stderr
    assert not any(words in done.stderr for words in ("Input should", "Value error"))


def test_a_file_in_place_of_a_root_and_a_settings_file_of_other_bytes_are_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "it is a file" in dropforge("--root", str(tmp_path / "file"), "init").stderr
    (tmp_path / "dropforge.toml").write_bytes(b"[lora]\n# \xff\n")
    assert "line 2 is not UTF-8 text" in dropforge("--root", str(tmp_path), "config", "check").stderr


def test_what_is_typed_next_names_the_root_where_it_would_not_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert typed(tmp_path, "run") == f"dropforge --root {tmp_path} run"
    assert typed(tmp_path / "a b", "run") == f"dropforge --root '{tmp_path}/a b' run"
    monkeypatch.setenv("DROPFORGE_ROOT", str(tmp_path))
    assert typed(tmp_path, "run") == "dropforge run"
