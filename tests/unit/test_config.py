"""Settings: file, environment and flags, checked once, each fault named by table and key."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from daemon import config
from daemon.cli.init import init, render_config
from daemon.errors import ConfigError
from daemon.recipe import Recipe, TrainingSettings


def write(root: Path, text: str) -> Path:
    (root / config.CONFIG_NAME).write_text(text)
    return root


def test_flags_outweigh_the_environment_which_outweighs_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "[training]\nseed = 1\nlearning_rate = 0.1\nnum_train_epochs = 9\n")
    monkeypatch.setenv("DROPFORGE_TRAINING__SEED", "2")
    monkeypatch.setenv("DROPFORGE_TRAINING__LEARNING_RATE", "0.2")
    training = config.load(tmp_path, {"training": {"seed": 3}}).training
    assert (training.seed, training.learning_rate, training.num_train_epochs) == (3, 0.2, 9)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[training]\nlr = 1\n", "unknown key [training] lr"),
        ("[trainig]\n", "unknown key trainig"),
        ("[training]\nlearning_rate = -1\n", "[training] learning_rate"),
        ("[training]\nlearning_rate = nan\n", "[training] learning_rate"),
        ("[lora]\nr = 'eight'\n", "[lora] r"),
        ("[training\n", "line 1"),
        ("root = '/'\n", "unknown key root"),
    ],
)
def test_a_fault_is_named_by_table_and_key(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(write(tmp_path, text))
    assert named in str(caught.value)
    assert "hint:" in str(caught.value)
    assert caught.value.exit_code == 2


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(write(tmp_path, "[training]\nseed = -1\n[lora]\nr = 0\n"))
    assert "[training] seed" in str(caught.value)
    assert "[lora] r" in str(caught.value)


def test_a_misspelt_variable_is_not_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPFORGE_TRAINING__LR", "1")
    with pytest.raises(ConfigError, match="DROPFORGE_TRAINING__LR"):
        config.load(tmp_path)


def test_the_written_file_reads_back_as_the_defaults(tmp_path: Path) -> None:
    """What `dropforge init` writes explains every key; with every # removed it still says the same."""
    text = render_config({})
    everything = "\n".join(line.removeprefix("# ") if " = " in line else line for line in text.splitlines())
    assert tomllib.loads(everything)
    written = config.load(write(tmp_path, everything))
    assert written == config.Settings(root=tmp_path)


def test_init_never_overwrites_a_configuration(tmp_path: Path) -> None:
    init(tmp_path)
    before = (tmp_path / config.CONFIG_NAME).read_bytes()
    with pytest.raises(ConfigError, match="already"):
        init(tmp_path)
    assert (tmp_path / config.CONFIG_NAME).read_bytes() == before


@pytest.mark.parametrize("table", ["model", "paths", "executor", "guard", "queue", "inbox"])
def test_a_sidecar_reaches_only_the_recipe(table: str) -> None:
    with pytest.raises(ConfigError, match=rf"\[{table}\]"):
        Recipe().with_overrides({table: {"anything": 1}})


def test_a_sidecar_changes_what_it_names_and_nothing_else() -> None:
    recipe = Recipe(training=TrainingSettings(seed=7)).with_overrides({"training": {"learning_rate": 1e-5}})
    assert (recipe.training.seed, recipe.training.learning_rate) == (7, 1e-5)


def test_a_base_model_in_a_folder_of_the_root_is_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path, "[model]\nmodel_name_or_path = 'base'\n")
    assert config.load(tmp_path).recipe.model.model_name_or_path == str(tmp_path / "base")


def test_home_and_variables_are_spelled_out_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a command only the program: its arguments may be for a shell."""
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("DISK", "/mnt/disk")
    text = """
[model]
model_name_or_path = "${DISK}/base"
[paths]
state = "~/forge/state"
inbox = "$DISK/in$$box"
current_model = "mo$1del"
[guard]
key_file = "$HOME/key"
[executor]
gpu_lock = "~/lock"
command = ["~/bin/python", "-c", "$HOME ~"]
[logging]
folder = "$DISK"
[hooks]
on_hold = ["$HOME/hook", "$UNKNOWN"]
"""
    settings = config.load(write(tmp_path, text))
    assert settings.recipe.model.model_name_or_path == "/mnt/disk/base"
    assert settings.state_dir == Path("/home/ada/forge/state")
    assert settings.inbox_dir == Path("/mnt/disk/in$box")
    assert settings.model_dir == tmp_path / "mo$1del"
    assert settings.guard.key_file == Path("/home/ada/key")
    assert settings.executor.gpu_lock == Path("/home/ada/lock")
    assert settings.executor.command == ("/home/ada/bin/python", "-c", "$HOME ~")
    assert settings.log_path.parent == Path("/mnt/disk")
    assert settings.hooks.on_hold == ("/home/ada/hook", "$UNKNOWN")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[paths]\nstate = '$NOT_SET_AT_ALL/x'",
            "line 2: [paths] state: the environment variable NOT_SET_AT_ALL is not set",
        ),
        (
            "[guard]\nkey_file = '${NOT_SET_AT_ALL}'",
            "line 2: [guard] key_file: the environment variable NOT_SET_AT_ALL",
        ),
        ("[hooks]\non_hold = ['$NOT_SET_AT_ALL']", "line 2: [hooks] on_hold: the environment variable NOT_SET_AT_ALL"),
        ("[model]\nmodel_name_or_path = '$NOT_SET_AT_ALL'", "line 2: [model] model_name_or_path: the environment"),
        ("[paths]\ninbox = '~nobody-at-all/in'", "line 2: [paths] inbox: no account has that home"),
        ("[paths]\ninbox = 3", "line 2: [paths] inbox is a path, in quotes (got 3)"),
        ("[hooks]\non_hold = [3]", "[hooks] on_hold is text, in quotes (got 3)"),
        ("[hooks]\non_hold = 'x'", "[hooks] on_hold is a list, in brackets"),
    ],
)
def test_a_path_that_cannot_be_spelled_out_is_an_error(tmp_path: Path, text: str, said: str) -> None:
    """And no folder named `$NAME` or `~`."""
    with pytest.raises(ConfigError) as caught:
        config.load(write(tmp_path, text))
    assert said in str(caught.value)


def test_a_base_in_a_root_with_a_dollar_in_its_name_is_used(tmp_path: Path) -> None:
    """Only what a person wrote is spelled out, not the root that stands before it."""
    root = tmp_path / "a$NOT_SET_AT_ALL"
    (root / "base").mkdir(parents=True)
    settings = config.load(write(root, "[model]\nmodel_name_or_path = 'base'\n"))
    recipe = Recipe.model_validate(settings.recipe.model_dump(mode="json"))
    assert recipe.model.model_name_or_path == str(root / "base")


def test_a_root_that_is_named_outweighs_that_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when another variable is set, and all of them are read."""
    monkeypatch.setenv("DROPFORGE_ROOT", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("DROPFORGE_TRAINING__SEED", "1")
    settings = config.load(config.find_root(tmp_path))
    assert (settings.root, settings.training.seed) == (tmp_path, 1)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("DROPFORGE_TRAINING__SEED", "abc", "DROPFORGE_TRAINING__SEED: [training] seed is a whole number"),
        ("DROPFORGE_TRAINING", '{"seed": -4}', "DROPFORGE_TRAINING: [training] seed is at least 0"),
        ("dropforge_lora__r", "0", "dropforge_lora__r: [lora] r is at least 1"),
        ("DROPFORGE_TRAINING", '{"seed"', "the environment variable DROPFORGE_TRAINING: it is no JSON object"),
        ("DROPFORGE_MODEL", "3", "DROPFORGE_MODEL: [model] is a table"),
    ],
)
def test_a_fault_in_a_variable_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    """And not the line of the file that it outweighs."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        config.load(write(tmp_path, "[training]\nseed = 1\n[lora]\nr = 8\n"))
    assert said in str(caught.value)
    assert "line" not in str(caught.value).splitlines()[0]
