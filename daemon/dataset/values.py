"""Values of a row, each with its path in it: what they must be, and how a wrong one is told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from daemon.dataset.keys import Place, is_given, is_number, refuses
from daemon.dataset.strict_json import LineError, kind_of, parse_object

JsonPath = tuple[str | int, ...]


class RowError(Exception):
    """A row that is JSON, but not a row of this format: the value at `path` is wrong for `reason`."""

    def __init__(self, path: JsonPath, reason: str, hint: str = "") -> None:
        super().__init__(path, reason, hint)
        self.path = path
        self.reason = reason
        self.hint = hint

    def __str__(self) -> str:
        if len(self.path) == 1 and self.reason.startswith(f'"{self.path[0]}" '):
            return self.reason  # which names the place already
        shown = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.path).lstrip(".")
        return f"{shown}: {self.reason}" if shown else self.reason


class UnusedKeys(dict[str, None]):
    """Keys that nothing is made of, those of turns as `messages[].key`, in the order in which they were met."""

    def note(self, value: Mapping[str, Any], used: frozenset[str], path: JsonPath) -> None:
        """Add the keys of `value` that have a value and are not in `used`."""
        if value.keys() <= used:
            return
        for key in value.keys() - used:
            if is_given(value[key]):
                shown = "".join("[]" if isinstance(step, int) else f".{step}" for step in (*path, key))
                self[shown.lstrip(".")] = None


def required(row: Mapping[str, Any], key: str) -> Any:
    """A value that a row must have. Raises RowError."""
    if key not in row:
        raise RowError((), f"the key {key!r} is missing")
    return row[key]


def text_of(row: Mapping[str, Any], key: str, path: JsonPath = ()) -> str:
    """A string that the row, or the object at `path` in it, must have. Raises RowError."""
    value = required(row, key) if not path else row.get(key)
    if not isinstance(value, str):
        if key not in row:
            raise RowError(path, f"{key!r} is missing")
        hint = f"write it as text: {json.dumps(str(value))}" if is_number(value) else ""
        raise RowError((*path, key), f"expected a string, found {kind_of(value)}", hint)
    return value


def optional_text(row: Mapping[str, Any], key: str) -> str:
    """A string, empty when it is missing or null. Raises RowError."""
    value = row.get(key)
    return "" if value is None else text_of(row, key)


def embedded(text: str, path: JsonPath) -> Any:
    """JSON inside a string, as strict as a line. Raises RowError."""
    try:
        return parse_object(b'{"value":' + text.encode() + b"}")["value"]
    except LineError as error:
        hint = "write what is inside with json.dumps, not with str"
        raise RowError(path, f"a string that should hold JSON: {error.reason}", hint) from error


def without_nulls(value: Any) -> Any:
    """The value without the keys that are null, at every depth; lists keep theirs."""
    if not _holds_null(value):
        return value  # as nearly all do; to look costs less than a copy
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value]


def _holds_null(value: Any) -> bool:
    """Whether an object somewhere in the value has a key that is null."""
    kind = type(value)
    if kind is dict:
        return None in value.values() or any(map(_holds_null, value.values()))
    return kind is list and any(map(_holds_null, value))


def single_key(value: Mapping[str, Any], keys: Sequence[str], path: JsonPath, *, same: bool = True) -> str | None:
    """The key among `keys` that has a value; None when none has. Raises RowError when two have different ones."""
    found: str | None = None
    for key in keys:
        if key not in value or not is_given(value[key]):
            continue
        if found is None:
            found = key
        elif not same or value[key] != value[found]:
            raise RowError((*path, key), f"{found} and {key} contradict each other")
    return found


def first_present(value: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """The first of `keys` that is there, with a value or without."""
    return next((key for key in keys if key in value), None)


def refuse_keys(value: Mapping[str, Any], path: JsonPath, *, is_answer: bool = True) -> None:
    """Raise RowError for a key of a turn, or of a part of one, that changes what the row means."""
    for key, inner in value.items():
        group = refuses(key, inner, Place.TURN, answers=True)
        if group is not None and (is_answer or not group.of_answers):
            raise RowError((*path, key), group.reason(key), group.advice)
