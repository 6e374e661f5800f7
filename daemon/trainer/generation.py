"""The generation configuration of what was trained: where its reader has to stop.

A model that has learned to end its turns with a token of the chat template's writes on and on where the reader waits for the
tokenizer's EOS alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GENERATION_CONFIG = "generation_config.json"


def generation_config(
    base: Path, parent: Path | None, *, eos: int | None, learned: Iterable[int]
) -> dict[str, Any] | None:
    """The base's generation configuration with every end that it, `parent` and this run know; None where nothing is new.

    `base` and `parent` are folders, of the base model and of the version that the run went on from.
    """
    own = _read(base / GENERATION_CONFIG)
    known = _ends(own) or _ends(_read(base / "config.json"))
    earlier = _ends(_read(parent / GENERATION_CONFIG)) if parent else []
    ends = [*known, *([eos] if eos is not None else []), *earlier, *sorted(learned)]
    if set(ends) <= {eos} and set(ends) <= set(known):
        return None
    return {**own, "eos_token_id": list(dict.fromkeys(ends))}


def ends_of(base: Path, parent: Path | None, *, eos: int | None, learned: Iterable[int] = ()) -> list[int]:
    """The tokens that an answer ends with, as `generation_config` names them; empty where nothing is known to end it."""
    own = _ends(_read(base / GENERATION_CONFIG)) or _ends(_read(base / "config.json"))
    earlier = end_ids(parent) if parent else []
    return sorted({*own, *([] if eos is None else [eos]), *earlier, *learned})


def write_generation_config(folder: Path, config: dict[str, Any] | None) -> None:
    """Write it where there is one."""
    if config is not None:
        (folder / GENERATION_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def end_ids(folder: Path) -> list[int]:
    """The ends that a folder's generation configuration names; empty without one."""
    return _ends(_read(folder / GENERATION_CONFIG))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    return found if isinstance(found, dict) else {}


def _ends(config: dict[str, Any]) -> list[int]:
    ends = config.get("eos_token_id")
    return [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]
