"""One row to token ids and labels, as lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from daemon.dataset.rows import Row
from daemon.recipe import DataSettings
from daemon.trainer.collate import IGNORE, Example
from daemon.trainer.encode import EncodedRow, Encoder, RefusedRow, truncate
from daemon.trainer.text_tokens import Sample


def encode(row: Row, tokenizer: Any, data: DataSettings) -> tuple[list[int], list[int]]:
    """What the product makes of a row, before truncation."""
    return ids_and_labels(only_sample(row, tokenizer, data))


def samples(row: Row, tokenizer: Any, data: DataSettings) -> list[tuple[list[int], list[int]]]:
    """The same of a row that becomes several samples."""
    return [ids_and_labels(sample) for sample in encoded(row, tokenizer, data).samples]


def encoded(row: Row, tokenizer: Any, data: DataSettings) -> EncodedRow:
    """What the product makes of a row. Raises RunFailure where it refuses it."""
    [found] = Encoder(tokenizer, data).encode([row])
    if isinstance(found, RefusedRow):
        raise found.failure()
    return found


def samples_of(encoder: Encoder, rows: Sequence[Row]) -> list[Sample]:
    """All samples of rows of which none is refused."""
    found = encoder.encode(rows)
    assert not any(isinstance(row, RefusedRow) for row in found), found
    return [sample for row in found if isinstance(row, EncodedRow) for sample in row.samples]


def only_sample(row: Row, tokenizer: Any, data: DataSettings) -> Sample:
    """The one sample of a row, before truncation."""
    [sample] = encoded(row, tokenizer, data).samples
    return sample


def itself(row: Row) -> Row:
    """What `tokenise` reads where rows are rows already."""
    return row


def encode_cut(row: Row, tokenizer: Any, data: DataSettings) -> tuple[list[int], list[int]]:
    """The same within `max_length`."""
    return ids_and_labels(truncate(only_sample(row, tokenizer, data), data.max_length, tokenizer.bos_token_id))


def ids_and_labels(tokens: Sample) -> tuple[list[int], list[int]]:
    """Labels are the token itself where it is learned, else IGNORE."""
    example = Example(input_ids=list(tokens.ids), learned=tokens.learned, line=0, content_digest="")
    return list(tokens.ids), example.labels


def learned(ids: list[int], labels: list[int], tokenizer: Any) -> str:
    """The text of the learned tokens."""
    assert len(ids) == len(labels)
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    return str(tokenizer.decode([label for label in labels if label != IGNORE]))
