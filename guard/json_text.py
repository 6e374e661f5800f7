"""JSON from files that a crash, another program or somebody else may have written."""

from __future__ import annotations

import json
from typing import Any, Final

MAX_DEPTH: Final = 100  # brackets open at once: what is bounded here can be walked, compared and written by recursion


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError whatever is wrong with it, nesting beyond MAX_DEPTH included."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    opened = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    if opened > MAX_DEPTH and _is_deep(value):
        raise ValueError("nested too deeply")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for found in level
            if isinstance(found, dict | list)
            for item in (found.values() if isinstance(found, dict) else found)
        ]
    return bool(level)
