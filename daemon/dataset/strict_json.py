"""One line of JSON, parsed strictly, with the column of what is wrong.

Python's own parser accepts NaN, lone surrogates and unlimited nesting; everything here refuses them, because a row that
half of the tools downstream read differently is not a row. Columns count characters from 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from json.decoder import scanstring  # type: ignore[attr-defined]  # the C scanner; typeshed leaves it out
from typing import Any, NoReturn

MAX_DEPTH = 100  # brackets open at once; real rows need about ten
MAX_DIGITS = 4300  # Python's own limit on integers in decimal, which msgspec shares
EXCERPT_CHARS = 60

Path = Sequence[str | int]

_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_BRACKETS = re.compile(_STRING + r"|[\[\]{}]", re.DOTALL)
_KEYS = re.compile(f"({_STRING})(?=[ \\t\\r\\n]*:)|{_STRING}|[\\[\\]{{}}]", re.DOTALL)
_NO_STRUCTURE = bytes(set(range(256)) - set(b'[]{}"'))
_CONSTANTS = re.compile(_STRING + r"|(NaN|-?Infinity)", re.DOTALL)
_NUMBERS = re.compile(_STRING + r"|(-?\d[\d.eE+-]*)", re.DOTALL)
_SURROGATE_HINT = re.compile(r"\\u[dD][89A-Fa-f]")
_ESCAPES = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_SPACE = re.compile(r"[ \t\r\n]*")
_KINDS: Mapping[type, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


class LineError(Exception):
    """What is wrong with one line: its column (1-based, in characters), the reason, and where known what to do."""

    def __init__(self, column: int, reason: str, hint: str = "") -> None:
        super().__init__(column, reason, hint)  # all, so that it travels whole between processes
        self.column = column
        self.reason = reason
        self.hint = hint

    def __str__(self) -> str:
        return self.reason


def kind_of(value: object) -> str:
    """A JSON value's type, with its article."""
    return _KINDS.get(type(value), type(value).__name__)


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object on `line` (without byte order mark; surrounding white space is allowed).

    A key that stands twice in one object is refused: parsers differ in which of its values counts. Raises LineError.
    """
    text = decode_utf8(line).rstrip("\r\n")  # a column beyond the last character is one beyond, not on the next line
    if text.startswith("\ufeff"):
        raise LineError(1, "a byte order mark inside the file")
    _refuse_depth(text)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:  # a control character among what it refuses
        raise _control_character(text) or _in_words(error, text) from error
    except _Constant as error:
        _raise_at(_CONSTANTS, text, f"{error}, which is not JSON", hint="write null, or leave the key out")
    except _Number as error:
        _raise_at(_NUMBERS, text, str(error), _bad_number)
    except _Repeated:
        raise _repeated(text) from None
    if not isinstance(value, dict):
        raise LineError(_skip_space(text, 0) + 1, f"expected an object, found {kind_of(value)}")
    _refuse_surrogates(text)
    return value


def decode_utf8(line: bytes) -> str:
    """The line as text. Raises LineError."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode("utf-8")) + 1
        raise LineError(column, f"byte 0x{line[error.start]:02x} is not UTF-8") from None


def column_of(line: bytes, path: Path) -> int:
    """Column of the value at `path` in a line that `parse_object` accepts; of its nearest parent when it is missing."""
    text = line.decode("utf-8")
    position = _skip_space(text, 0)
    for step in path:
        found = _child(text, position, step)
        if found is None:
            break
        position = found
    return position + 1


def excerpt(line: bytes, column: int) -> str:
    """A short piece of the line around `column`, safe on any terminal: control and odd characters are escaped."""
    # At most four bytes a character: enough of a line of any length to show what is around the column.
    text = line[: 4 * (column + EXCERPT_CHARS)].decode("utf-8", "backslashreplace").strip("\r\n")
    start = max(0, min(column - 1 - EXCERPT_CHARS // 2, len(text) - EXCERPT_CHARS))
    piece = text[start : start + EXCERPT_CHARS]
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in piece)
    return f"{'…' if start else ''}{shown}{'…' if start + EXCERPT_CHARS < len(text) else ''}"


class _Constant(Exception):
    pass


class _Number(Exception):
    pass


class _Repeated(Exception):
    pass


def _refuse_constant(name: str) -> NoReturn:
    raise _Constant(name)


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _Number(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise _Number("a number that is out of range")
    return value


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(members)
    if len(found) != len(members):
        raise _Repeated
    return found


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_refuse_constant, parse_int=_integer, parse_float=_finite
)


def _bad_number(token: str) -> bool:
    try:
        _finite(token) if set(token) & set(".eE") else _integer(token)
    except _Number:
        return True
    except ValueError:
        return False
    return False


def _raise_at(
    pattern: re.Pattern[str], text: str, reason: str, accept: Callable[[str], bool] = bool, hint: str = ""
) -> NoReturn:
    for match in pattern.finditer(text):
        if match.group(1) and accept(match.group(1)):
            raise LineError(match.start() + 1, reason, hint)
    raise LineError(1, reason, hint)


def _refuse_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    # The brackets outside of strings, by a few passes in C, where the matches below would cost ten times as much. Two quotes
    # side by side end and begin a string, or hold none of what is left; so those that stay hold brackets.
    # Where the text is no JSON, both ways are right up to where the parser stops.
    encoded = text.replace("\\\\", "").replace('\\"', "").encode("utf-8", "replace")
    structure = encoded.translate(None, _NO_STRUCTURE).replace(b'""', b"")
    brackets = b"".join(structure.split(b'"')[::2])
    left = brackets
    for _ in range(MAX_DEPTH):  # each round takes the innermost level away
        left = left.replace(b"{}", b"").replace(b"[]", b"")
        if not left:
            return
    if max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0) <= MAX_DEPTH:
        return
    depth = 0
    for match in _BRACKETS.finditer(text):
        first = match.group()[0]
        if first in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise LineError(match.start() + 1, f"nested deeper than {MAX_DEPTH} levels")
        elif first in "]}":
            depth -= 1


def _refuse_surrogates(text: str) -> None:
    if "\\u" not in text or not _SURROGATE_HINT.search(text):
        return
    high: re.Match[str] | None = None
    for match in _ESCAPES.finditer(text):
        code = int(match.group(1), 16) if match.group(1) else 0
        paired = high is not None and high.end() == match.start() and 0xDC00 <= code <= 0xDFFF
        if high is not None and not paired:
            break
        if high is None and 0xDC00 <= code <= 0xDFFF:
            high = match
            break
        high = match if not paired and 0xD800 <= code <= 0xDBFF else None
    if high is not None:
        raise LineError(high.start() + 1, f"{high.group()} is half of a surrogate pair")


def _repeated(text: str) -> LineError:
    """The first key that stands twice in one object."""
    open_objects: list[set[str] | None] = []  # the keys so far, None for an array
    for match in _KEYS.finditer(text):
        if match.group(1) is not None:
            key, keys = json.loads(match.group(1)), open_objects[-1]
            if keys is not None and key in keys:
                return LineError(match.start() + 1, f"the key {json.dumps(key)} for the second time in one object")
            if keys is not None:
                keys.add(key)
        elif match.group()[0] in "[{":
            open_objects.append(set() if match.group() == "{" else None)
        elif match.group()[0] in "]}":
            open_objects.pop()
    return LineError(1, "a key for the second time in one object")


def _control_character(text: str) -> LineError | None:
    """The first control character, which is what is wrong then, whatever the parser stumbled over."""
    control = _CONTROL.search(text)
    if control is None:
        return None
    name = "NUL" if control.group() == "\0" else f"control character U+{ord(control.group()):04X}"
    return LineError(control.start() + 1, f"{name}, which JSON allows only as an escape")


def _in_words(error: json.JSONDecodeError, text: str) -> LineError:
    """What the parser stumbled over, in words of our own: told from the text, not from the parser's message."""
    at = error.pos
    rest = text[at:].lstrip()
    before = text[:at].rstrip()
    if error.msg == "Extra data":
        return LineError(at + 1, _extra(text[at:]))
    if error.msg.startswith("Unterminated string") or not rest:
        return LineError((at if rest else len(text)) + 1, "the line ends inside the JSON value")
    if error.msg.startswith("Invalid \\u"):
        return LineError(at + 1, "\\u without four hexadecimal digits behind it")
    if error.msg.startswith("Invalid \\"):
        return LineError(at + 1, f"{text[at : at + 2]} is an escape that JSON does not have")
    if error.msg.startswith("Invalid control"):
        return LineError(at + 1, "a control character, which JSON allows only as an escape")
    column = len(text) - len(rest) + 1
    if error.msg.startswith("Illegal trailing comma"):
        return LineError(column, "a comma with nothing behind it")
    if rest[0] in "}]" and before.endswith(","):
        return LineError(len(before), "a comma with nothing behind it")
    if rest[0] == "'":
        return LineError(column, "a string in single quotes; JSON has double quotes only")
    if rest.startswith(("//", "/*", "#")):
        return LineError(column, "a comment, which JSON does not have")
    if name := _OTHER_NAMES.match(rest):
        language = "JavaScript" if name.group() == "undefined" else "Python"
        return LineError(column, f"{name.group()}, which is {language}; JSON has {_IN_JSON[name.group()]}")
    if rest[0] in "\u201c\u201d\u2018\u2019":
        return LineError(column, f"a typographic quote, {rest[0]}; JSON has straight double quotes only")
    if rest[0].isdigit() and before.endswith("0"):
        return LineError(column, "a number that begins with 0")
    wanted = _WANTED.get(error.msg.partition(" enclosed")[0], "something else")
    return LineError(column, f"{wanted} is missing here, in place of {rest[0]}")


_OTHER_NAMES = re.compile(r"(?:None|True|False|undefined|nan|inf)\b")
_IN_JSON = {"None": "null", "True": "true", "False": "false", "undefined": "null", "nan": "null", "inf": "null"}
_WANTED = {  # the parser's message -> what JSON needs there
    "Expecting value": "a value",
    "Expecting property name": "a key in double quotes",
    "Expecting ':' delimiter": "a colon",
    "Expecting ',' delimiter": "a comma",
    "Illegal trailing comma before end of object": "a key in double quotes",
    "Illegal trailing comma before end of array": "a value",
}


def _extra(rest: str) -> str:
    """What stands behind a whole value."""
    stripped = rest.strip()
    if stripped == ",":
        return "a comma behind the object; lines are not separated by commas"
    if rest.startswith("\r") or "\r{" in rest:
        return "a second value on the same line: its lines end with a carriage return only, as old Macs wrote them"
    return "a second value on the same line" if stripped[:1] in tuple('{["') else "more text after the object"


def _skip_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _child(text: str, position: int, step: str | int) -> int | None:
    """Where the member `step` of the object or array at `position` begins."""
    opened = text[position]
    if (opened == "{") is not isinstance(step, str) or opened not in "[{":
        return None
    index = 0
    position = _skip_space(text, position + 1)
    while text[position] not in "]}":
        key: str | int = index
        if opened == "{":
            key, position = scanstring(text, position + 1, True)
            position = _skip_space(text, _skip_space(text, position) + 1)
        if key == step:
            return position
        _, position = _DECODER.raw_decode(text, position)
        position = _skip_space(text, position)
        if text[position] == ",":
            position = _skip_space(text, position + 1)
        index += 1
    return None
