"""One row to token ids and labels, as lists."""

from __future__ import annotations

from typing import Any

from daemon.recipe import DataSettings
from daemon.rows import Row
from daemon.trainer.encode import IGNORE, Encoder, truncate


def encode(row: Row, tokenizer: Any, data: DataSettings) -> tuple[list[int], list[int]]:
    """What the product makes of a row, before truncation."""
    ids, labels = Encoder(tokenizer, data).encode(row)
    return list(ids), list(labels)


def encode_cut(row: Row, tokenizer: Any, data: DataSettings) -> tuple[list[int], list[int]]:
    """The same within `max_length`."""
    ids, labels = truncate(*Encoder(tokenizer, data).encode(row), data.max_length, tokenizer.bos_token_id)
    return list(ids), list(labels)


def learned(ids: list[int], labels: list[int], tokenizer: Any) -> str:
    """The text of the learned tokens."""
    assert len(ids) == len(labels)
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    return str(tokenizer.decode([label for label in labels if label != IGNORE]))
