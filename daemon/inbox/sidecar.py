"""Sidecars: `x.job.toml` beside `x.jsonl` overrides priority and parts of the recipe for that one dataset.

Who may drop a file may drop a sidecar, so it can neither name paths or programs nor lift a limit that protects the
daemon.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.dataset.source import SourceError, open_regular
from daemon.errors import ConfigError, RejectedData
from daemon.job import Priority
from daemon.recipe import SIDECAR_CONTENT, SIDECAR_TABLES, Recipe
from daemon.text import escape

MAX_SIDECAR_BYTES = 64 * 1024


class RejectedSidecar(RejectedData):
    """A sidecar that cannot be used: its file is rejected, rather than trained without it."""


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The settings of one sidecar."""

    priority: Priority | None = None
    force: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)


def read_sidecar(path: Path, recipe: Recipe) -> Sidecar:
    """Read and check a sidecar against the recipe that it would change. Raises RejectedSidecar."""
    try:
        text = _read(path).decode("utf-8")
        table = tomllib.loads(text)
    except SourceError as error:
        raise _rejected(path, error.reason) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise _rejected(path, f"it is not sound TOML: {error}") from error
    overrides = {}
    for key, value in table.items():
        if key in SIDECAR_TABLES:
            if not isinstance(value, dict):
                raise _rejected(path, f"{key} is a table: write [{key}]")
            overrides[key] = value
        elif key not in ("priority", "force"):
            raise _rejected(path, f"unknown or forbidden key {escape(key)}")
    priority, force = table.get("priority"), table.get("force", False)
    if priority is not None and priority not in list(Priority):
        raise _rejected(path, f"priority is high, normal or low (got {escape(repr(priority))})")
    if not isinstance(force, bool):
        raise _rejected(path, f"force is true or false (got {escape(repr(force))})")
    try:
        recipe.with_overrides(overrides)
    except ConfigError as error:
        raise _rejected(path, error.cause) from error
    return Sidecar(priority=Priority(priority) if priority else None, force=force, overrides=overrides)


def _read(path: Path) -> bytes:
    descriptor = open_regular(path)
    try:
        data = os.read(descriptor, MAX_SIDECAR_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > MAX_SIDECAR_BYTES:
        raise SourceError(f"it is larger than {MAX_SIDECAR_BYTES} bytes")
    return data


def _rejected(path: Path, cause: str) -> RejectedSidecar:
    return RejectedSidecar(
        operation="use the sidecar",
        subject=escape(path.name),
        cause=cause,
        hint=f"a sidecar may hold {SIDECAR_CONTENT}",
    )
