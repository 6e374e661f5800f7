"""What a row is, whatever its bytes: the same turns have the same digest in every format, spelling and setting.

JSON's spaces and order of keys, unused columns, the format, white space around a turn and Unicode's composed and decomposed
letters make no difference; neither do weights, which say what is learned of a row and not what it is.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from blake3 import blake3

ROW_DIGEST_BYTES = 16

_encoder = msgspec.json.Encoder(order="deterministic")


@dataclass(frozen=True, kw_only=True)
class RowIdentity:
    """Digests in hex, of ROW_DIGEST_BYTES each."""

    digest: str  # of the whole row
    prompt: str  # of what stands before its last answer; empty when nothing does


def identify(messages: Iterable[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> RowIdentity:
    """Return what a row of these turns is, and which question it answers. A text is one turn without a role."""
    turns = [_turn(message) for message in messages]
    answers = [at for at, turn in enumerate(turns) if turn["role"] == "assistant"]
    before = turns[: answers[-1]] if answers else []
    is_asked = any(turn["content"] for turn in before)
    return RowIdentity(digest=_digest(turns, tools), prompt=_digest(before, tools) if is_asked else "")


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a message that make up what it says."""
    said = {name: value for name, value in message.items() if name != "weight"}
    return {**said, "content": unicodedata.normalize("NFC", message["content"] or "").strip()}


def _digest(turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> str:
    return blake3(_encoder.encode([turns, tools or []])).hexdigest(length=ROW_DIGEST_BYTES)
