"""`dropforge init`: a root with its folders and a dropforge.toml that explains itself."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from daemon import root_identity
from daemon.config import CONFIG_NAME, Settings
from daemon.errors import ConfigError, DropforgeError
from daemon.recipe import Section
from guard.atomic import make_folder_durable, write_atomic

TINY_FOLDER = "base_model"
# What suits a model of 3 million random parameters, on a CPU, over a few hundred rows.
TINY_TABLES: Mapping[str, Mapping[str, Any]] = {
    "model": {"model_name_or_path": TINY_FOLDER},
    "training": {"learning_rate": 0.003, "save_steps": 10, "logging_steps": 5, "num_train_epochs": 2.0},
    "data": {"max_length": 512, "held_out_fraction": 0.05},
}


def init(root: Path, *, tiny: bool = False, tables: Mapping[str, Mapping[str, Any]] | None = None) -> Settings:
    """Make `root` a Dropforge root; with `tiny`, with a base model of its own.

    `tables` are settings to write besides. Raises ConfigError when the root has a dropforge.toml already.
    """
    path = root / CONFIG_NAME
    if path.exists():
        raise ConfigError(
            operation="initialise",
            subject=root,
            cause=f"it has a {CONFIG_NAME} already",
            hint="edit that one, or choose another folder with --root",
        )
    make_folder_durable(root)
    chosen: dict[str, dict[str, Any]] = {name: dict(values) for name, values in (TINY_TABLES if tiny else {}).items()}
    for name, values in (tables or {}).items():
        chosen.setdefault(name, {}).update(values)
    settings = Settings.model_validate({"root": root, **chosen})
    root_identity.establish(settings)
    if tiny:
        build_tiny_in_child(root / TINY_FOLDER)
    write_atomic(path, render_config(chosen))  # last: a root with this file is complete
    return settings


def build_tiny_in_child(folder: Path) -> None:
    """Build the tiny base model in a process of its own: only the trainer package imports torch."""
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "daemon.trainer.tiny_model",
            str(folder),
            *map(str, sorted(examples_dir().glob("*.jsonl"))),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DropforgeError(
            operation="build the tiny model in",
            subject=folder,
            cause=(done.stderr.strip().splitlines() or ["it ended without a word"])[-1],
            hint="the training packages are needed: `pip install 'dropforge[train]'`",
        )


def examples_dir() -> Path:
    """The example datasets: beside the packages in a checkout, among the environment's shared files when installed."""
    installed = Path(sysconfig.get_path("data")) / "share" / "dropforge" / "examples"
    for folder in (Path(__file__).resolve().parents[2] / "examples", installed):
        if (folder / "gsm8k_messages.jsonl").is_file():
            return folder
    raise DropforgeError(
        operation="find the examples", cause="they were not installed", hint="reinstall, or work from a checkout"
    )


def render_config(chosen: Mapping[str, Mapping[str, Any]]) -> str:
    """A dropforge.toml with every key: set where `chosen` has it, else commented out at its default."""
    lines = [
        "# Dropforge. Every key with its default; remove the # to change one. `dropforge check FILE` tries a dataset."
    ]
    for name, section in sections(Settings):
        values: Any = chosen
        for part in name.split("."):
            values = values.get(part, {})
        lines += ["", f"[{name}]"]
        for key, field in section.model_fields.items():
            if isinstance(field.default, Section):
                continue
            mark = "" if key in values else "# "
            line = f"{mark}{key} = {toml_value(values.get(key, field.default))}"
            lines.append(f"{line:<44}  # {field.description}")
    return "\n".join(lines) + "\n"


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Every table of the settings with its dotted name, in order; a table's own tables follow it."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield prefix + name, info.annotation
            yield from sections(info.annotation, f"{prefix}{name}.")


def toml_value(value: Any) -> str:
    """A setting as TOML; None, which TOML lacks, as an empty string."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case tuple() | list():
            return "[" + ", ".join(toml_value(item) for item in value) + "]"
        case None:
            return '""'
    return json.dumps(str(value), ensure_ascii=False)
