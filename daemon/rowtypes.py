"""Typed decoders that recognise good rows at the parser's own speed.

`RowDecoder.decode` says "certainly good" or "look closer"; it never says "bad". A row that it takes is one that
`rows.check_row` takes too (a property that the tests hold): every key is named by the type, so that nothing is skipped
unread, and values that nobody uses are typed with bounded depth. What the types cannot express falls to the exact path.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, defstruct

from daemon.jsonline import LineFault, column_of, parse_object
from daemon.rows import STEERING_KEYS, ColumnNames, Format, RowFault, normalise

MAX_EXTRA_KEYS = 64  # unused keys that the types learn; a row with further ones is read the exact way

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
        self._row_extras: dict[str, None] = {}  # ordered sets
        self._message_extras: dict[str, None] = {}
        # Any object of bounded depth: rows with tools are checked in Python, but need not be parsed by Python.
        self._wide = msgspec.json.Decoder(dict[str, _Depth7]).decode
        self._build()

    @property
    def decode(self) -> Callable[[bytes], object]:
        """Decodes a good line, of which the result says nothing; raises for any other line, good ones among them."""
        return self._decode

    def examine(self, line: bytes) -> None:
        """The exact check of a line that `decode` did not take. Raises LineFault when it is bad.

        A good one teaches the types the keys that it has, so that the next one like it is taken.
        """
        try:
            row = self._wide(line)
            normalise(row, self._format, self._columns)
        except (*NOT_TAKEN, RowFault):
            row = parse_object(line)
            try:
                normalise(row, self._format, self._columns)
            except RowFault as fault:
                raise LineFault(column_of(line, fault.path), str(fault)) from fault
        self._learn(row)

    def _learn(self, row: dict[str, Any]) -> None:
        known = _ROW_KEYS.get(self._format, set(self._used_columns()))
        found = _learnable(row, known)
        inner: dict[str, None] = {}
        if self._format is Format.MESSAGES:
            for message in row["messages"]:
                inner |= _learnable(message, _MESSAGE_KEYS)
        if found.keys() <= self._row_extras.keys() and inner.keys() <= self._message_extras.keys():
            return
        rows, messages = self._row_extras | found, self._message_extras | inner
        if len(rows) + len(messages) <= MAX_EXTRA_KEYS:
            self._row_extras, self._message_extras = rows, messages
            self._build()

    def _used_columns(self) -> list[str]:
        if self._format is not Format.COLUMNS:
            return []
        names = self._columns
        wanted = [names.text] if names.text is not None else [names.prompt, names.completion]
        return [name for name in wanted if name is not None]

    def _build(self) -> None:
        core: list[_Field]
        extras: list[_Field] = [(name, _Depth3, None) for name in self._row_extras]
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
        self._decode = msgspec.json.Decoder(_struct("Row", core + extras)).decode


def _learnable(value: dict[str, Any], known: Iterable[str]) -> dict[str, None]:
    return {key: None for key in value if key not in known and key not in STEERING_KEYS}


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


def _struct(name: str, fields: list[_Field], **options: Any) -> Any:
    """A Struct type whose keys may be any strings."""
    rename = {}
    members: list[tuple[str, Any] | _Field] = []
    for index, (key, kind, default) in enumerate(sorted(fields, key=lambda field: field[2] is not ...)):
        attribute = key if key.isidentifier() and not keyword.iskeyword(key) and key[0] != "_" else f"x{index}"
        while attribute in {member[0] for member in members}:
            attribute += "x"
        rename[attribute] = key
        members.append((attribute, kind) if default is ... else (attribute, kind, default))
    return defstruct(name, members, rename=rename, gc=False, forbid_unknown_fields=True, **options)
