"""One row to token ids and labels, as lists."""

from __future__ import annotations

from typing import Any

from daemon.dataset.rows import Row
from daemon.recipe import DataSettings
from daemon.trainer.collate import IGNORE, Example
from daemon.trainer.encode import Encoder, Tokens, truncate


def encode(row: Row, tokenizer: Any, data: DataSettings) -> tuple[list[int], list[int]]:
    """What the product makes of a row, before truncation."""
    return ids_and_labels(*Encoder(tokenizer, data).encode([row]))


def itself(row: Row) -> Row:
    """What `tokenise` reads where rows are rows already."""
    return row


def encode_cut(row: Row, tokenizer: Any, data: DataSettings) -> tuple[list[int], list[int]]:
    """The same within `max_length`."""
    [whole] = Encoder(tokenizer, data).encode([row])
    return ids_and_labels(truncate(whole, data.max_length, tokenizer.bos_token_id))


def ids_and_labels(tokens: Tokens) -> tuple[list[int], list[int]]:
    """Labels are the token itself where it is learned, else IGNORE."""
    example = Example(input_ids=list(tokens.ids), learned=tokens.learned, line=0, content_digest="")
    return list(tokens.ids), example.labels


def learned(ids: list[int], labels: list[int], tokenizer: Any) -> str:
    """The text of the learned tokens."""
    assert len(ids) == len(labels)
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    return str(tokenizer.decode([label for label in labels if label != IGNORE]))
