"""Where each setting comes from, and one setting changed in `dropforge.toml` without touching the rest."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from daemon import config
from daemon.cli.account import as_account
from daemon.cli.init import sections
from daemon.config import CONFIG_NAME, Settings
from daemon.errors import ConfigError, DropforgeError, NotFound
from daemon.processes import account_name
from daemon.recipe import Section
from daemon.setting_names import line_of, nearest, place
from daemon.text import escape
from guard.atomic import write_atomic


class Source(StrEnum):
    """What decides a setting's value."""

    DEFAULT = "default"
    FILE = "file"
    ENVIRONMENT = "environment"


@dataclass(frozen=True, kw_only=True)
class EffectiveSetting:
    """One setting as a daemon that starts now would use it."""

    key: str  # table.key
    value: Any
    default: Any
    source: Source
    line: int | None = None  # of dropforge.toml
    variable: str = ""

    @property
    def place(self) -> str:
        """`dropforge.toml:12`, the variable's name, or `default`."""
        match self.source:
            case Source.FILE:
                return CONFIG_NAME if self.line is None else f"{CONFIG_NAME}:{self.line}"
            case Source.ENVIRONMENT:
                return self.variable
        return self.source


def effective_settings(root: Path) -> list[EffectiveSetting]:
    """Return every setting of `root` in the order of the documentation. Raises ConfigError with every fault."""
    written = _read(root / CONFIG_NAME)
    settings = config.load(root) if written is None else config.load(root, text=written)
    text = (written or b"").decode()
    table, variables = tomllib.loads(text), config.from_environment()
    found = []
    for name, section in sections(Settings):
        for key, field in section.model_fields.items():
            if isinstance(field.default, Section):
                continue
            full = f"{name}.{key}"
            source, line = Source.DEFAULT, None
            if variable := config.variable_of(variables, full):
                source = Source.ENVIRONMENT
            elif config.holds(table, full):
                source, line = Source.FILE, _nearest_line(text, full)
            value = _value(settings, full)
            if full in config.SECRET_SETTINGS and value:
                value = tuple("(not shown)" for _ in value)
            found.append(
                EffectiveSetting(
                    key=full, value=value, default=field.default, source=source, line=line, variable=variable
                )
            )
    return found


@dataclass(frozen=True, kw_only=True)
class Change:
    """A setting that was written."""

    key: str
    setting: EffectiveSetting | None  # as it is in effect: a variable outweighs the file; None: it is none
    written: str  # the value, as the file has it
    needs_restart: bool


def set_values(root: Path, wishes: Sequence[tuple[str, str]]) -> list[Change]:
    """Write each `key = value` into `dropforge.toml`, its comments and order kept, when the file is valid with all of them.

    A value is TOML, or text where it is none. Raises ConfigError when there is no such setting or a value is none for it,
    NotFound when there is no file.
    """
    path, before, owner = _open_for_change(root, "set", wishes[0][0])
    names = [_known_key(key) for key, _ in wishes]
    literals, after = _first_valid(root, before, names, [_literals(value) for _, value in wishes])
    _replace(path, after, owner)
    in_effect = {item.key: item for item in effective_settings(root)}
    return [
        Change(key=name, setting=in_effect[name], written=literal, needs_restart=_needs_restart(name))
        for name, literal in zip(names, literals, strict=True)
    ]


def unset_values(root: Path, keys: Sequence[str]) -> list[Change]:
    """Take settings out of `dropforge.toml`, so that they have their defaults, when the file is valid without them all.

    Returns those that stood there; `written` is empty. Raises as `set_values` does.
    """
    path, before, owner = _open_for_change(root, "unset", keys[0])
    table = _parsed(before, path)
    names = [key if config.holds(table, key) else _known_key(key) for key in keys]  # also one that is none
    standing = [name for name in dict.fromkeys(names) if config.holds(table, name)]
    after = before
    for name in standing:
        after = without_value(after, name)
    try:
        config.load(root, text=after.encode())
    except ConfigError as error:
        raise ConfigError(
            operation="unset",
            subject=", ".join(standing),
            cause=error.cause,
            hint=f"nothing was written to {root / CONFIG_NAME}",
        ) from error
    if standing:
        _replace(path, after, owner)
    in_effect = {item.key: item for item in effective_settings(root)}
    return [
        Change(setting=in_effect.get(name), key=name, written="", needs_restart=_needs_restart(name))
        for name in standing
    ]


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(operation="read", subject=path, cause=str(error), hint="mend that line first") from error


def _needs_restart(name: str) -> bool:
    return name.partition(".")[0] in config.RESTART_TABLES


def _open_for_change(root: Path, operation: str, key: str) -> tuple[Path, str, os.stat_result]:
    """Return the file, its text and whose it is. Raises NotFound, and ConfigError for a file of another account's."""
    path = (root / CONFIG_NAME).resolve()  # of a link, what it names is written
    before = _read(path)
    if before is None:
        raise NotFound(
            operation=operation,
            subject=escape(key),
            cause=f"{root} has no {CONFIG_NAME}",
            hint="`dropforge init` writes one, or --root names the root",
        )
    owner = path.stat()
    if owner.st_uid != os.geteuid():
        raise ConfigError(
            operation="write",
            subject=path,
            cause=f"it belongs to {account_name(owner.st_uid)}, and this is {account_name(os.geteuid())}",
            hint=f"`{as_account(owner.st_uid)} --root {root} config {operation} ...`",
        )
    return path, before.decode(), owner


def _replace(path: Path, text: str, owner: os.stat_result) -> None:
    """Write the file anew with the group and the mode it had. Raises DropforgeError."""
    try:
        write_atomic(path, text, mode=owner.st_mode & 0o7777)
        os.chown(path, -1, owner.st_gid)  # before the mode: it may be the group that a service reads it by
        path.chmod(owner.st_mode & 0o7777)  # which the umask has cut
    except OSError as error:
        raise DropforgeError(operation="write", subject=path, cause=error.strerror or str(error)) from error


def _first_valid(
    root: Path, before: str, names: Sequence[str], meanings: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], str]:
    """The first meanings of the values with which the whole file is valid, and its text. Raises ConfigError."""
    _parsed(before, root / CONFIG_NAME)
    fault: ConfigError | None = None
    for literals in product(*meanings):
        after = before
        for name, literal in zip(names, literals, strict=True):
            after = with_value(after, name, literal)
        try:
            config.load(root, text=after.encode())
        except ConfigError as error:
            fault = fault or error
        else:
            return literals, after
    raise ConfigError(
        operation="set",
        subject=", ".join(names),
        cause=fault.cause if fault else "",
        hint=f"nothing was written to {root / CONFIG_NAME}",
    ) from fault


def with_value(text: str, name: str, literal: str) -> str:
    """Return a TOML text in which the setting `name` (`table.key`) has the value that `literal` is.

    A key that stands there as a comment, as `dropforge init` writes them, is set in its place; else it is added to its table.
    """
    # Imported here: no other command needs it.
    import tomlkit
    from tomlkit.items import AbstractTable

    value = tomlkit.parse(f"value = {literal}\n")["value"]
    if not config.holds(tomllib.loads(text), name):
        text = _uncommented(text, name, literal)
    document = tomlkit.parse(text)
    *tables, key = name.split(".")
    at: Any = document
    for part in tables:
        if part not in at:
            at[part] = tomlkit.table() if isinstance(at, tomlkit.TOMLDocument | AbstractTable) else {}
        at = at[part]
    at[key] = value
    return tomlkit.dumps(document)


def without_value(text: str, name: str) -> str:
    """Return a TOML text in which the setting `name` (`table.key`), which stands there, does not; the rest as it is."""
    # Imported here: no other command needs it.
    import tomlkit

    document = tomlkit.parse(text)
    *tables, key = name.split(".")
    at: Any = document
    for part in tables:
        at = at[part]
    at.remove(key)
    return tomlkit.dumps(document)


def _uncommented(text: str, name: str, literal: str) -> str:
    """The text with the commented line of this key, under its own table's header, made a line that counts."""
    table, _, key = name.rpartition(".")
    lines = text.splitlines(keepends=True)
    header = line_of(text, table)
    for at in range(header or len(lines), len(lines)):
        if lines[at].lstrip().startswith("["):
            break
        if found := re.match(rf"#\s?{re.escape(key)}\s*=\s*(?P<rest>.*)", lines[at]):
            comment = re.search(r"\s*#[^\"']*$", found["rest"])
            end = lines[at][len(lines[at].rstrip("\r\n")) :]
            line = f"{key} = {literal}"
            tail = comment[0].strip() if comment else ""
            changed = "".join([*lines[:at], f"{line:<44}  {tail}".rstrip() + end, *lines[at + 1 :]])
            return changed if _parses(changed) else text
    return text


def _parses(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


def _literals(value: str) -> list[str]:
    """What the typed value may mean: TOML as it stands, and text."""
    import tomlkit

    as_text = tomlkit.item(value).as_string()
    try:
        is_toml = set(tomllib.loads(f"value = {value}")) == {"value"}
    except tomllib.TOMLDecodeError:
        is_toml = False
    return [value.strip(), as_text] if is_toml else [as_text]


def _known_key(key: str) -> str:
    """The full name of a setting, which may also be typed as its key alone. Raises ConfigError."""
    known = [
        f"{name}.{inner}"
        for name, section in sections(Settings)
        for inner, field in section.model_fields.items()
        if not isinstance(field.default, Section)
    ]
    if key in known:
        return key
    alike = [full for full in known if full.endswith(f".{key}")]
    if len(alike) == 1:
        return alike[0]
    right = " or ".join(map(place, alike)) or nearest(key, tuple(known))
    raise ConfigError(
        operation="set",
        subject=escape(key),
        cause="it stands in several tables" if alike else "there is no such setting",
        hint=f"{right} is meant? It is typed as TABLE.KEY, for example training.learning_rate"
        if right
        else "`dropforge config` lists every setting",
    )


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(operation="read", subject=path, cause=error.strerror or str(error)) from error


def _value(settings: BaseModel, name: str) -> Any:
    at: Any = settings
    for part in name.split("."):
        at = getattr(at, part)
    return at


def _nearest_line(text: str, name: str) -> int | None:
    """Its line, or that of the inline table that holds it."""
    while name:
        if (line := line_of(text, name)) is not None:
            return line
        name = name.rpartition(".")[0]
    return None
