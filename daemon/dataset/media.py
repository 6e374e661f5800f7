"""Placeholders of pictures, video and sound in text: `<image>`, `<|image_pad|>` and their like.

Trainers put the picture in their place. Where the row holds none, the answer tells of something that nobody sees. Texts about
markup hold the same words, so where a placeholder stands decides: apart from the words, as trainers' rows have it, or
among them.
"""

from __future__ import annotations

import re

_ONE = (
    r"(?:<\|?(?:start_of_)?(?:image|img|video|audio|speech|vision)"
    r"(?:[_ ]?(?:\d+|pad|start|bos|token|soft_token|placeholder|context))?\|?>|\[IMG\])"
)
_PLACEHOLDER = re.compile(_ONE, re.IGNORECASE)
_APART = re.compile(
    rf"\A\s*({_ONE})|({_ONE})\s*\Z|^[^\S\n]*({_ONE})(?:\s*{_ONE})*[^\S\n]*$", re.IGNORECASE | re.MULTILINE
)
_ELEMENT = re.compile(r"</(?:image|video|audio)>", re.IGNORECASE)


def placeholder_in(text: str) -> str | None:
    """The first placeholder anywhere in a text that holds no element of that name; None when there is none."""
    return _find(_PLACEHOLDER, text)


def placeholder_apart(text: str) -> str | None:
    """The same of one that begins or ends the text, or stands on a line of its own."""
    return _find(_APART, text)


def _find(pattern: re.Pattern[str], text: str) -> str | None:
    if "<" not in text and "[" not in text:
        return None
    found = pattern.search(text)
    if found is None or _ELEMENT.search(text):
        return None
    return next((group for group in found.groups() if group), found.group())
