"""Sidecars: `x.job.toml` beside `x.jsonl` overrides priority and parts of the recipe for that one dataset.

Who may drop a file may drop a sidecar, so it can neither name paths or programs nor lift a limit that protects the
daemon, and whatever its text does to a parser it does in the process that reads rows.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.dataset.source import SourceError, open_regular
from daemon.errors import ConfigError, RejectedData
from daemon.job import Priority
from daemon.limits import SIDECAR_KEYS, LimitSettings, refusal
from daemon.recipe import SIDECAR_CONTENT, SIDECAR_TABLES, Recipe
from daemon.text import escape

MAX_SIDECAR_BYTES = 64 * 1024
MAX_KEY_PARTS = 4  # [data.columns] prompt has three
MAX_DIGITS = 64
MAX_DEPTH, MAX_VALUES = 8, 10_000
READ_SECONDS = 2.0  # whatever the text does to the parser; a sound one takes milliseconds

# Every character belongs to one match, so that it takes time in proportion to the text; the dots of a string are text.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"?|\'[^\']*\'?|[\w-]+|[ \t]+|.')


class RejectedSidecar(RejectedData):
    """A sidecar that cannot be used: its file is rejected, rather than trained without it."""


class ForeignSidecar(Exception):
    """A sidecar of somebody who has no say in the dataset: it is not used, and the file is taken without it."""


class _Unusable(Exception):
    """Why a sidecar cannot be used, as a sentence."""


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The settings of one sidecar."""

    priority: Priority | None = None
    force: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)


def may_speak_for(owner: int, data_owner: int) -> bool:
    """Whether a sidecar of this user (by number) counts for a dataset of that one."""
    return owner in (data_owner, 0, os.geteuid())


def foreign_sentence(name: str, owner: int, data_owner: int) -> str:
    """Say that a sidecar is not used because of whose it is."""
    return (
        f"{escape(name)} was not used: it belongs to user {owner} and its dataset to user {data_owner}; a sidecar counts"
        " when one user dropped both"
    )


def read_sidecar(path: Path, recipe: Recipe, limits: LimitSettings, *, data_owner: int) -> Sidecar:
    """Read and check a sidecar against the recipe that it would change and the limits of what it may ask for.

    Bounded in bytes, time, digits, depth and number of values. Raises ForeignSidecar when its owner has no say in a
    dataset of `data_owner`, and RejectedSidecar whatever else the file holds.
    """
    try:
        with _time_limit(READ_SECONDS):
            return _checked(_parse(_read(path, data_owner)), recipe, limits)
    except ForeignSidecar:
        raise
    except SourceError as error:
        cause = error.reason
    except ConfigError as error:
        cause = error.cause
    except _Unusable as error:
        cause = str(error)
    except OSError as error:
        cause = f"it cannot be read: {error.strerror or type(error).__name__}"
    except (RecursionError, MemoryError) as error:
        cause = f"it is nested too deeply or too large ({type(error).__name__})"
    except Exception as error:  # whatever a parser makes of hostile text is that text's fault
        cause = f"it is not sound TOML: {escape(str(error), most=300)}"
    raise _rejected(path, cause)


def _read(path: Path, data_owner: int) -> str:
    if not may_speak_for(owner := path.lstat().st_uid, data_owner):  # whatever it is: a link of theirs is no fault here
        raise ForeignSidecar(foreign_sentence(path.name, owner, data_owner))
    descriptor = open_regular(path)
    try:
        if not may_speak_for(owner := os.fstat(descriptor).st_uid, data_owner):
            raise ForeignSidecar(foreign_sentence(path.name, owner, data_owner))
        data = os.read(descriptor, MAX_SIDECAR_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > MAX_SIDECAR_BYTES:
        raise _Unusable(f"it is larger than {MAX_SIDECAR_BYTES} bytes")
    return data.decode("utf-8")


def _parse(text: str) -> dict[str, Any]:
    """The text as plain data of bounded size. Raises _Unusable, ValueError, RecursionError."""
    for number, line in enumerate(text.split("\n"), 1):
        _bound_tokens(number, line)
    table = tomllib.loads(text)
    values = 0
    level: list[Any] = [table]
    for _ in range(MAX_DEPTH):
        level = [item for found in level for item in _items(found)]
        values += len(level)
    if level:
        raise _Unusable(f"it is nested more than {MAX_DEPTH} deep")
    if values > MAX_VALUES:
        raise _Unusable(f"it holds more than {MAX_VALUES} values")
    return table


def _bound_tokens(number: int, line: str) -> None:
    """Refuse what would take the parser the square of its length: a key of many parts, a number of many digits."""
    dots = 0
    for match in _TOKEN.finditer(line):
        token = match.group()
        if token == ".":
            dots += 1
            if dots >= MAX_KEY_PARTS:
                raise _Unusable(f"line {number} has a key of more than {MAX_KEY_PARTS} parts")
        elif not token.isspace() and not (token[0] in "\"'-_" or token[0].isalnum()):
            dots = 0
        elif len(token) > MAX_DIGITS and token.lstrip("-")[:1].isdigit():
            raise _Unusable(f"line {number} has a number of more than {MAX_DIGITS} digits")


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value
    elif isinstance(value, int) and value.bit_length() > 63:
        raise _Unusable("a number does not fit 64 bits")


def _checked(table: Mapping[str, Any], recipe: Recipe, limits: LimitSettings) -> Sidecar:
    """Raises _Unusable, ConfigError."""
    overrides = {}
    for key, value in table.items():
        if key in SIDECAR_TABLES:
            if not isinstance(value, dict):
                raise _Unusable(f"{key} is a table: write [{key}]")
            overrides[key] = value
        elif key not in SIDECAR_KEYS:
            raise _Unusable(f"unknown or forbidden key {escape(key, most=80)}")
    priority, force = table.get("priority"), table.get("force", False)
    if priority is not None and priority not in list(Priority):
        raise _Unusable(f"priority is high, normal or low (got {escape(repr(priority), most=80)})")
    if not isinstance(force, bool):
        raise _Unusable(f"force is true or false (got {escape(repr(force), most=80)})")
    asked = recipe.with_overrides(overrides)
    if beyond := refusal(overrides, frozenset(table).difference(SIDECAR_TABLES), asked, limits):
        raise _Unusable(beyond)
    return Sidecar(priority=Priority(priority) if priority else None, force=force, overrides=overrides)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _Unusable in the block when it takes longer. In a process's main thread alone: else there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(number: int, frame: object) -> None:
        raise _Unusable(f"reading it took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _rejected(path: Path, cause: str) -> RejectedSidecar:
    return RejectedSidecar(
        operation="use the sidecar",
        subject=escape(path.name),
        cause=cause,
        hint=f"a sidecar may hold {SIDECAR_CONTENT}",
    )
