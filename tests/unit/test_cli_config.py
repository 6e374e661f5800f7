"""`dropforge config`: what is in effect, where it comes from, and one setting changed without touching the rest."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from daemon import config
from daemon.cli.init import init, sections, toml_value
from daemon.cli.settings_file import EffectiveSetting, effective_settings, set_values, unset_values, with_value
from daemon.config import CONFIG_NAME, Settings
from daemon.errors import ConfigError, NotFound
from daemon.recipe import Section
from tests.support.root import dropforge

OWN = """\
# mine
[training]
seed = 7 # lucky
learning_rate = 0.5

[data.columns]
prompt = "q"
completion = "a"
"""


def write(root: Path, text: str) -> Path:
    (root / CONFIG_NAME).write_text(text)
    return root


def by_key(root: Path) -> dict[str, EffectiveSetting]:
    return {item.key: item for item in effective_settings(root)}


def test_every_setting_is_listed_once_with_the_value_in_effect(tmp_path: Path) -> None:
    found = effective_settings(write(tmp_path, OWN))
    expected = {
        f"{name}.{key}"
        for name, section in sections(Settings)
        for key, field in section.model_fields.items()
        if not isinstance(field.default, Section)
    }
    assert sorted(item.key for item in found) == sorted(expected)
    assert {item.value for item in found if item.key == "training.seed"} == {config.load(tmp_path).training.seed}


@pytest.mark.parametrize(
    ("text", "key", "place"),
    [
        (OWN, "training.seed", "dropforge.toml:3"),
        (OWN, "data.columns.prompt", "dropforge.toml:7"),
        (OWN, "training.max_steps", "default"),
        ("training.seed = 1\n", "training.seed", "dropforge.toml:1"),
        ("\n[data]\ncolumns.prompt = 'q'\ncolumns.completion = 'a'\n", "data.columns.prompt", "dropforge.toml:3"),
        ("\ntraining = { seed = 42 }\n", "training.seed", "dropforge.toml:2"),
        ("[training]\n'seed' = 1\n", "training.seed", "dropforge.toml:1"),
    ],
)
def test_a_setting_names_its_line(tmp_path: Path, text: str, key: str, place: str) -> None:
    """Also where the file writes its default, and that of the table when the key has none of its own."""
    assert by_key(write(tmp_path, text))[key].place == place


def test_a_variable_outweighs_the_file_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPFORGE_TRAINING__SEED", "9")
    monkeypatch.setenv("DROPFORGE_LORA", '{"r": 4}')
    found = by_key(write(tmp_path, OWN))
    assert (found["training.seed"].value, found["training.seed"].place) == (9, "DROPFORGE_TRAINING__SEED")
    assert (found["lora.r"].value, found["lora.r"].place) == (4, "DROPFORGE_LORA")
    assert found["training.learning_rate"].place == "dropforge.toml:4"


def test_a_root_without_a_file_has_the_defaults(tmp_path: Path) -> None:
    assert {item.source for item in effective_settings(tmp_path)} == {"default"}


def test_setting_a_value_changes_its_line_alone(tmp_path: Path) -> None:
    text = with_value(OWN, "training.seed", "8")
    assert text == OWN.replace("seed = 7 # lucky", "seed = 8 # lucky")


def test_a_key_that_init_wrote_as_a_comment_is_set_in_its_place(tmp_path: Path) -> None:
    init(tmp_path)
    before = (tmp_path / CONFIG_NAME).read_text().splitlines()
    set_values(tmp_path, [("training.learning_rate", "1e-4")])
    after = (tmp_path / CONFIG_NAME).read_text().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert [new.split() for _, new in changed] == [["learning_rate", "=", "1e-4", "#", "Peak", "learning", "rate."]]
    assert changed[0][0].startswith("# learning_rate = ")
    assert config.load(tmp_path).training.learning_rate == 1e-4


def every_default() -> list[tuple[str, str]]:
    return [
        (f"{name}.{key}", toml_value(field.default))
        for name, section in sections(Settings)
        for key, field in section.model_fields.items()
        if not isinstance(field.default, Section) and not key.startswith("held_out") and name != "data.columns"
    ]


def test_every_key_that_init_wrote_can_be_set(tmp_path: Path) -> None:
    """Each in the place of its comment, whatever stands in the comment: no line is added."""
    init(tmp_path)
    text = (tmp_path / CONFIG_NAME).read_text()
    for key, literal in every_default():
        changed = with_value(text, key, literal)
        assert len(changed.splitlines()) == len(text.splitlines()), key
        text = changed
    config.load(tmp_path, text=text.encode())


@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [
        ("training.max_steps", "-1", -1),
        ("training.learning_rate", "1e-4", 1e-4),
        ("model.revision", "2024-01-01", "2024-01-01"),
        ("model.revision", "123", "123"),
        ("model.model_name_or_path", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("model.model_name_or_path", "'quoted'", "quoted"),
        ("model.model_name_or_path", "a\nb = 1", "a\nb = 1"),
        ("inbox.take_on_close", "false", False),
        ("hooks.on_hold", '["/bin/a", "b # c"]', ("/bin/a", "b # c")),
        ("guard.key_file", "", None),
        ("max_grad_norm", "2", 2.0),
    ],
)
def test_a_value_is_toml_or_text(tmp_path: Path, key: str, typed: str, value: object) -> None:
    (change,) = set_values(write(tmp_path, OWN), [(key, typed)])
    assert change.setting.value == value
    assert change.setting.source == "file"
    kept = [line for line in OWN.splitlines() if line and key.rpartition(".")[2] not in line]
    assert [line for line in (tmp_path / CONFIG_NAME).read_text().splitlines() if line in kept] == kept


@pytest.mark.parametrize(
    ("key", "typed", "said"),
    [
        ("training.learning_rate", "abc", "is a number"),
        ("training.learning_rate", "-1", "more than 0"),
        ("training.lr", "1", "[training] learning_rate is meant"),
        ("min_free_bytes", "3", "[queue] min_free_bytes or [gpu] min_free_bytes"),
        ("quux", "3", "`dropforge config` lists"),
        ("training.report_to", "tensorboard", "a list, in brackets"),
    ],
)
def test_what_is_not_valid_is_not_written(tmp_path: Path, key: str, typed: str, said: str) -> None:
    write(tmp_path, OWN)
    with pytest.raises(ConfigError) as caught:
        set_values(tmp_path, [(key, typed)])
    assert said in str(caught.value)
    assert (tmp_path / CONFIG_NAME).read_text() == OWN


def test_mode_line_ends_and_a_link_are_kept(tmp_path: Path) -> None:
    real = tmp_path / "real.toml"
    real.write_bytes(OWN.replace("\n", "\r\n").encode())
    real.chmod(0o662)
    root = tmp_path / "root"
    root.mkdir()
    (root / CONFIG_NAME).symlink_to(real)
    set_values(root, [("training.seed", "8")])
    assert (root / CONFIG_NAME).is_symlink()
    assert real.read_bytes() == OWN.replace("seed = 7", "seed = 8").replace("\n", "\r\n").encode()
    assert real.stat().st_mode & 0o777 == 0o662


def test_a_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="dropforge init"):
        set_values(tmp_path, [("training.seed", "8")])
    assert list(tmp_path.iterdir()) == []


def test_the_commands_print_check_and_set(tmp_path: Path) -> None:
    write(tmp_path, OWN)
    listed = json.loads(dropforge("--root", str(tmp_path), "config", "--json").stdout)
    seed = next(item for item in listed["settings"] if item["key"] == "training.seed")
    assert (seed["value"], seed["source"], seed["line"]) == (7, "file", 3)
    assert "training.seed = 7" in dropforge("--root", str(tmp_path), "config").stdout
    assert dropforge("--root", str(tmp_path), "config", "set", "training.max_steps", "-1").returncode == 0
    assert "are valid: 5 settings" in dropforge("--root", str(tmp_path), "config", "check").stdout
    write(tmp_path, "[training]\nlr = 1\n[lora]\nr = 0\n")
    checked = dropforge("--root", str(tmp_path), "config", "check")
    assert checked.returncode == 2
    assert "line 2: unknown key [training] lr" in checked.stderr
    assert "line 4: [lora] r is at least 1" in checked.stderr


def test_run_makes_no_root_of_a_folder_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And touches nothing there, also with the variable that a unit sets; the hint, followed, makes it one."""
    monkeypatch.setenv("DROPFORGE_LOGGING__FOLDER", str(tmp_path.with_name("logs")))
    (tmp_path / "thesis.tex").write_text("mine")
    done = dropforge("--root", str(tmp_path), "run", "--once")
    assert done.returncode == 2
    assert "it is no root" in done.stderr
    assert "`dropforge init`" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert dropforge("--root", str(tmp_path), "init").returncode == 0
    assert dropforge("--root", str(tmp_path), "run", "--once").returncode == 0


@pytest.mark.parametrize("asked", ["inbox", "variable"])
def test_run_serves_a_folder_that_is_meant_as_a_root(
    tmp_path: Path, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container may hold a mounted inbox and variables, and no file of settings."""
    if asked == "inbox":
        (tmp_path / "inbox").mkdir()
    else:
        monkeypatch.setenv("DROPFORGE_MODEL__MODEL_NAME_OR_PATH", "some/model")
    assert dropforge("--root", str(tmp_path), "run", "--once").returncode == 0
    assert (tmp_path / "state" / "status.json").exists()


def test_settings_that_go_together_are_set_together(tmp_path: Path) -> None:
    """One without the other is refused, and so is a key without a value; nothing is written then."""
    write(tmp_path, "[data]\n")
    arguments = ("--root", str(tmp_path), "config", "set", "data.columns.prompt", "q")
    assert dropforge(*arguments).returncode == 2
    assert dropforge(*arguments, "data.columns.completion").returncode == 2
    assert (tmp_path / CONFIG_NAME).read_text() == "[data]\n"
    done = dropforge(*arguments, "data.columns.completion", "a")
    assert done.returncode == 0, done.stderr
    columns = config.load(tmp_path).data.columns
    assert (columns.prompt, columns.completion) == ("q", "a")


def test_unsetting_takes_the_line_away_and_leaves_the_rest(tmp_path: Path) -> None:
    write(tmp_path, "# mine\n[training]\nlearning_rate = 1e-3  # high\nseed = 7\n[inbox]\nsettle_seconds = 9\n")
    changes = unset_values(tmp_path, ["learning_rate", "training.seed", "lora.r"])
    assert [(change.key, change.setting and change.setting.value) for change in changes] == [
        ("training.learning_rate", 0.0002),
        ("training.seed", 42),
    ]
    text = (tmp_path / CONFIG_NAME).read_text()
    assert tomllib.loads(text) == {"training": {}, "inbox": {"settle_seconds": 9}}
    assert text.startswith("# mine\n")
    assert unset_values(tmp_path, ["training.seed"]) == []


def test_the_fault_itself_can_be_set_or_unset_and_another_keeps_the_file_as_it_is(tmp_path: Path) -> None:
    text = "[lora]\nr = 0\n[training]\nlearning_rat = 1\n"
    write(tmp_path, text)
    with pytest.raises(ConfigError, match="unknown key"):
        unset_values(tmp_path, ["lora.r"])
    with pytest.raises(ConfigError, match="there is no such setting"):
        unset_values(tmp_path, ["training.sed"])
    assert (tmp_path / CONFIG_NAME).read_text() == text
    write(tmp_path, "[lora]\nr = 0\n")
    set_values(tmp_path, [("lora.r", "8")])
    write(tmp_path, "[training]\nlearning_rat = 1\n")
    [change] = unset_values(tmp_path, ["training.learning_rat"])
    assert (change.key, change.setting) == ("training.learning_rat", None)
    write(tmp_path, "[training\n")
    with pytest.raises(ConfigError, match="line"):
        unset_values(tmp_path, ["training.seed"])


def test_check_says_every_fault_as_json(tmp_path: Path) -> None:
    write(tmp_path, "[training]\nseed = 1\n")
    done = dropforge("--root", str(tmp_path), "config", "check", "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["valid"], told["faults"], told["not_default"]) == (0, True, [], ["training.seed"])
    write(tmp_path, "[lora]\nr = 0\n[training]\nlearning_rat = 1\n")
    done = dropforge("--root", str(tmp_path), "config", "check", "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["valid"], len(told["faults"])) == (2, False, 2)
    assert told["file"] == str(tmp_path / CONFIG_NAME)
    assert dropforge("--root", str(tmp_path), "config", "unset", "lora.r").returncode == 2  # the other fault is left
