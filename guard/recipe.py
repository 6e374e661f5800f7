"""Fingerprints for the command line: from a dataset file, a recipe file, and what the metadata recorded."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from .atomic import PathLike
from .errors import UsageError, explain_os_error
from .fingerprint import DatasetMode, Fingerprint, fingerprint_dataset
from .json_text import parse_json
from .metadata import MetadataReading


def read_recipe(path: PathLike) -> dict[str, Any]:
    """Read components from JSON or TOML, with dotted names or sections.

    Raises UsageError.
    `{"lora": {"r": 8}}` and `{"lora.r": 8}` are the same recipe.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        value = tomllib.loads(text) if file.suffix == ".toml" else parse_json(text)
    except OSError as exc:
        raise _unusable(path, explain_os_error(exc)) from exc
    except ValueError as exc:
        raise _unusable(path, str(exc)) from exc
    except RecursionError as exc:  # tomllib's
        raise _unusable(path, "nested too deeply") from exc
    if not isinstance(value, dict):
        raise _unusable(path, "it is not an object of components")
    components: dict[str, Any] = {}
    for name, item in value.items():
        if "." not in name and isinstance(item, dict):
            components.update({f"{name}.{field}": inner for field, inner in item.items()})
        else:
            components[name] = item
    try:
        return dict(Fingerprint(components).components)
    except (ValueError, TypeError) as exc:
        raise _unusable(path, str(exc)) from exc


def _unusable(path: PathLike, cause: str) -> UsageError:
    hint = 'a recipe is JSON or TOML: {"lora": {"r": 8}, "training": {"learning_rate": 1e-4}}'
    return UsageError(operation="use the recipe", path=path, cause=cause, hint=hint)


def proposed_run(
    *, dataset: PathLike, recipe: PathLike | None, metadata: MetadataReading, mode: DatasetMode = "content"
) -> Fingerprint:
    """Fingerprint a run over `dataset` with `recipe`, or with the recorded one.

    What a file cannot tell (how many rows were kept) is taken from the metadata when the dataset is the same.
    """
    recorded = metadata.run.fingerprint.components if metadata.run and metadata.run.fingerprint else {}
    known = fingerprint_dataset(dataset, mode=mode).components()
    components: dict[str, Any] = {**known, "dataset.path": str(Path(dataset).absolute())}
    if recorded.get("dataset.digest") == known["dataset.digest"]:
        components = {**{n: v for n, v in recorded.items() if n.startswith("dataset.")}, **components}
    if recipe is not None:
        chosen = read_recipe(recipe)
    else:
        chosen = {name: value for name, value in recorded.items() if not name.startswith("dataset.")}
    return Fingerprint({**components, **chosen})
