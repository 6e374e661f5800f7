"""Typed decoders that recognise good rows at the parser's own speed.

`RowDecoder.decode` says "certainly good" or "look closer"; it never says "bad". A row that it takes is one that
`rows.check_row` takes too (a property that the tests hold): every key is named by the type, so that nothing is skipped
unread, and values that nobody uses are typed with bounded depth. What the types cannot express falls to the exact path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, defstruct

from daemon.dataset.conversation import RowError
from daemon.dataset.rows import RESERVED_KEYS, ColumnNames, Format, normalise
from daemon.dataset.strict_json import LineError, column_of, parse_object

MAX_EXTRA_KEYS = 64  # unused keys that the types learn; a row with further ones is read the exact way

MAX_SHAPE_KEYS = 16  # of an unused object whose keys are learned one by one
NOT_TAKEN = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # what `decode` raises for a line

# Values that nobody reads, of any shape down to a depth that is common. NaN, bad UTF-8 and lone surrogates inside them
# are refused because they are decoded like everything else.
_Scalar = None | bool | int | float | str
_Depth1 = _Scalar | list[_Scalar] | dict[str, _Scalar]
_Depth2 = _Scalar | list[_Depth1] | dict[str, _Depth1]
_Depth3 = _Scalar | list[_Depth2] | dict[str, _Depth2]
_Depth4 = _Scalar | list[_Depth3] | dict[str, _Depth3]
_Depth5 = _Scalar | list[_Depth4] | dict[str, _Depth4]
_Depth6 = _Scalar | list[_Depth5] | dict[str, _Depth5]
_Depth7 = _Scalar | list[_Depth6] | dict[str, _Depth6]

_Shape = tuple[str, ...] | None  # the keys of an unused object; None: any value
_OptionalText = str | None
_Weight = Literal[0, 1] | None


class _Part(Struct, gc=False, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


_Content = str | list[_Part]

_Field = tuple[str, Any, Any]  # key, type, default (`...`: required)

_CORE: dict[str, list[_Field]] = {
    "system": [("content", _Content, ...), ("name", _OptionalText, None)],
    "developer": [("content", _Content, ...), ("name", _OptionalText, None)],
    "user": [("content", _Content, ...), ("name", _OptionalText, None)],
    "tool": [("content", _Content, ...), ("name", _OptionalText, None), ("tool_call_id", _OptionalText, None)],
    "assistant": [
        ("content", _Content, ...),
        ("name", _OptionalText, None),
        ("weight", _Weight, None),
        ("reasoning_content", _OptionalText, None),
    ],
}
_MESSAGE_KEYS = {"role", "content", "name", "weight", "tool_calls", "tool_call_id", "reasoning_content"}
_ROW_KEYS: dict[Format, set[str]] = {
    Format.MESSAGES: {"messages", "tools"},
    Format.PROMPT_COMPLETION: {"prompt", "completion", "tools"},
    Format.TEXT: {"text"},
    Format.ALPACA: {"instruction", "input", "output", "system"},
    Format.SHAREGPT: {"conversations", "tools", "system"},
}


class RowDecoder:
    """Fast recognition of one file's good rows; it learns which unused keys the file has."""

    def __init__(self, format_: Format, columns: ColumnNames) -> None:
        self._format = format_
        self._columns = columns
        self._row_extras: dict[str, _Shape] = {}
        self._message_extras: dict[str, None] = {}  # an ordered set
        self._order: list[str] = []  # of the keys in the row that was learned from
        # Any object of bounded depth: rows with tools are checked in Python, but need not be parsed by Python.
        self._wide = msgspec.json.Decoder(dict[str, _Depth7]).decode
        self._build()

    @property
    def decode(self) -> Callable[[bytes], object]:
        """Decodes a good line, of which the result says nothing; raises for any other line, good ones among them."""
        return self._decode

    def examine(self, line: bytes) -> None:
        """The exact check of a line that `decode` did not take. Raises LineError when it is bad.

        A good one teaches the types the keys that it has, so that the next one like it is taken.
        """
        try:
            row = self._wide(line)
            normalise(row, self._format, self._columns)
        except (*NOT_TAKEN, RowError):
            row = parse_object(line)
            try:
                normalise(row, self._format, self._columns)
            except RowError as error:
                raise LineError(column_of(line, error.path), str(error)) from error
        self._learn(row)

    def _learn(self, row: dict[str, Any]) -> None:
        """Take up the keys of a good row that nobody reads, and the keys inside those that are objects."""
        known = _ROW_KEYS.get(self._format, set(self._used_columns()))
        rows, messages = dict(self._row_extras), dict(self._message_extras)
        for key in _learnable(row, known):
            rows[key] = _wider(rows[key], row[key]) if key in rows else _shape(row[key])
        if self._format is Format.MESSAGES:
            for message in row["messages"]:
                messages |= dict.fromkeys(_learnable(message, _MESSAGE_KEYS))
        if (rows, messages) == (self._row_extras, self._message_extras):
            return
        if len(messages) + sum(1 + len(shape or ()) for shape in rows.values()) <= MAX_EXTRA_KEYS:
            self._row_extras, self._message_extras = rows, messages
            self._order = list(row)
            self._build()

    def _used_columns(self) -> list[str]:
        if self._format is not Format.COLUMNS:
            return []
        names = self._columns
        wanted = [names.text] if names.text is not None else [names.prompt, names.completion]
        return [name for name in wanted if name is not None]

    def _build(self) -> None:
        core: list[_Field]
        extras: list[_Field] = [(name, _type_of(shape), None) for name, shape in self._row_extras.items()]
        match self._format:
            case Format.MESSAGES:
                message = _message_type(tuple(self._message_extras))
                core = [("messages", Annotated[list[message], Meta(min_length=1)], ...)]  # type: ignore[valid-type]
            case Format.SHAREGPT:
                turn = _turn_type()
                core = [
                    ("conversations", Annotated[list[turn], Meta(min_length=1)], ...),  # type: ignore[valid-type]
                    ("system", _OptionalText, None),
                ]
            case Format.ALPACA:
                core = [("instruction", str, ...), ("output", str, ...)]
                core += [(name, _OptionalText, None) for name in ("input", "system")]
            case Format.PROMPT_COMPLETION:
                core = [("prompt", str, ...), ("completion", str, ...)]
            case Format.TEXT:
                core = [("text", str, ...)]
            case Format.COLUMNS:
                core = [(name, str, ...) for name in self._used_columns()]
        self._decode = msgspec.json.Decoder(_struct("Row", core + extras, self._order)).decode


def _learnable(value: dict[str, Any], known: Iterable[str]) -> list[str]:
    return [key for key in value if key not in known and key not in RESERVED_KEYS]


def _shape(value: Any) -> _Shape:
    return tuple(value) if isinstance(value, dict) and len(value) <= MAX_SHAPE_KEYS else None


def _wider(shape: _Shape, value: Any) -> _Shape:
    """A shape for what was seen before and for `value`; scalars and lists fit every shape."""
    if shape is None or not isinstance(value, dict):
        return shape
    keys = tuple(dict.fromkeys((*shape, *value)))
    return keys if len(keys) <= MAX_SHAPE_KEYS else None


def _type_of(shape: _Shape) -> Any:
    """An unused value: an object with known keys decodes faster as a Struct than as a dict."""
    if shape is None:
        return _Depth3
    return _Scalar | list[_Depth2] | _struct("Unused", [(key, _Depth2, None) for key in shape])


def _message_type(extras: tuple[str, ...]) -> Any:
    """A union over the roles; the key `role` chooses."""
    union: Any = None
    for role, fields in _CORE.items():
        named = {name for name, _, _ in fields}
        # A key that one role uses may stand, unused, in another one's message.
        unused: list[_Field] = [(name, _Depth3, None) for name in extras if name not in named]
        made = _struct(role.capitalize(), fields + unused, tag_field="role", tag=role)
        union = made if union is None else union | made
    return union


def _turn_type() -> Any:
    union: Any = None
    for speaker in ("human", "user", "gpt", "assistant", "system", "observation", "tool"):
        made = _struct(speaker.capitalize(), [("value", str, ...)], tag_field="from", tag=speaker)
        union = made if union is None else union | made
    return union


_ESCAPED = re.compile(r'[\x00-\x1f"\\]')


def _struct(name: str, fields: list[_Field], order: Sequence[str] = (), **options: Any) -> Any:
    """A Struct type with these keys; it is fastest where keys come in `order`.

    A key that JSON has to escape cannot be a field of one; it is left out, and a row that has it goes the exact way.
    """
    fields = [field for field in fields if _ESCAPED.search(field[0]) is None]
    place = {key: index for index, key in enumerate(order)}
    rename = {}
    members: list[tuple[str, Any] | _Field] = []
    for index, (key, kind, default) in enumerate(sorted(fields, key=lambda field: place.get(field[0], len(place)))):
        attribute = f"key{index}"
        rename[attribute] = key
        members.append((attribute, kind) if default is ... else (attribute, kind, default))
    return defstruct(name, members, rename=rename, gc=False, kw_only=True, forbid_unknown_fields=True, **options)
