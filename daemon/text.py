"""Untrusted text made safe to print: in a log, on a terminal, in a report."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

HOLD_CHARACTERS = 1000  # of a sentence with both identities and the ways out


def escape(text: str, *, most: int = 200) -> str:
    """`text` on one line, without control, bidirectional or undecodable characters, cut to `most` characters.

    What is replaced stays readable: a newline is shown as \\n, an odd byte as \\xff.
    """
    shown = "".join(_visible(character) for character in text)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def escape_block(text: str) -> str:
    """The same for text of several lines, which keeps its newlines and tabs, and its length."""
    return "".join(character if character in "\n\t" else _visible(character, backslash="\\") for character in text)


def printable(text: str, *, most: int = 200) -> str:
    """Text that was escaped when it was written (a status file's), made safe to print all the same: its backslashes stay."""
    shown = "".join(character if character == "\\" else _visible(character) for character in text)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def format_bytes(size: int) -> str:
    """Return `3.2 GiB`, for people."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity, for which JSON has no word, as None."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
    return value


def _visible(character: str, *, backslash: str = "\\\\") -> str:
    if character == "\\":
        return backslash
    if 0xDC80 <= ord(character) <= 0xDCFF:  # a byte that is not UTF-8, kept by surrogateescape
        return f"\\x{ord(character) - 0xDC00:02x}"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return character.encode("unicode_escape").decode("ascii")
    return character


LIMITS_HINT = "ask for less, or have its administrator raise the limit in dropforge.toml"


def beyond_limit(wish: str, name: str, limit: float) -> str:
    """Say what was asked for, what the administrator allows, and where: one sentence for every limit."""
    return f"{wish}, but [limits] {name} = {limit:.12g} allows no more"


def plain_characters(error: UnicodeError) -> tuple[str, int]:
    """Replace what a terminal cannot show: an arrow by two characters, all else by its escape. For codecs.register_error.

    Raises `error` when it is about something else than writing.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return "".join("->" if char == "→" else ascii(char)[1:-1] for char in wrong), error.end
