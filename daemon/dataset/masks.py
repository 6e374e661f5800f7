"""Which of the assistant's turns are learned: masks of turns, and masks of a whole row.

Whatever their name, they become `weight`, 0 or 1, of the assistant's messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from daemon.dataset.keys import MASK_KEYS, ROW_MASK_KEYS, is_given, is_number
from daemon.dataset.values import JsonPath, RowError, UnusedKeys

_TEXTS = {"0": 0, "1": 1, "false": 0, "true": 1}
_NOTES = frozenset(("train", "training", "loss"))  # whose text is a note, as `train = "2024"`


def turn_weight(turn: Mapping[str, Any], role: str, path: JsonPath) -> int | None:
    """1 or 0 where a turn says whether it is learned. Raises RowError."""
    weights: dict[str, int] = {}
    for key in MASK_KEYS:
        value = turn.get(key)
        if not is_given(value):
            continue
        if not is_binary(value):
            raise _not_binary((*path, key))
        weights[key] = weight_of(value)
        if weights[key] and role != "assistant":
            raise _only_answers((*path, key))
    if len(set(weights.values())) > 1:
        raise RowError((*path, list(weights)[-1]), f"{' and '.join(weights)} contradict each other")
    return next(iter(weights.values())) if weights and role == "assistant" else None


def apply_row_masks(row: Mapping[str, Any], messages: list[dict[str, Any]], unused: UnusedKeys) -> None:
    """A row's own masks: a list with a value for each turn or each answer, or one value for all answers."""
    for key in ROW_MASK_KEYS:
        if not is_given(row.get(key)):
            continue
        value, path = row[key], (key,)
        answers = [message for message in messages if message["role"] == "assistant"]
        if isinstance(value, list):
            if len(value) not in (len(messages), len(answers)):
                raise RowError(
                    path,
                    f"{len(value)} values for {len(messages)} turns, {len(answers)} of them the assistant's",
                    'give one 0 or 1 for each turn, or a "weight" in each of the assistant\'s turns',
                )
            masked = messages if len(value) == len(messages) else answers
            for index, (message, one) in enumerate(zip(masked, value, strict=True)):
                _set_weight(message, one, (key, index))
        elif is_mask(key, value) and is_binary(value):
            if not weight_of(value):
                for message in answers:
                    _set_weight(message, value, path)
        elif is_mask(key, value):
            raise _not_binary(path)
        else:
            unused[key] = None


def is_mask(key: str, value: Any) -> bool:
    """Whether a row's own value means a mask; a number called loss, or a word called train, is the writer's note."""
    if isinstance(value, str):
        return is_binary(value) or (key not in _NOTES and value.strip().casefold() != "default")
    return isinstance(value, list) or is_binary(value) or (is_number(value) and key != "loss")


def is_binary(value: Any) -> bool:
    """Whether a mask's value is one: 0, 1, false or true; also as text, as tables have them."""
    if isinstance(value, str):
        return value.strip().casefold() in _TEXTS
    return isinstance(value, bool) or (is_number(value) and value in (0, 1))


def weight_of(value: Any) -> int:
    """The weight that a binary value says."""
    return _TEXTS[value.strip().casefold()] if isinstance(value, str) else int(value)


def _set_weight(message: dict[str, Any], value: Any, path: JsonPath) -> None:
    if value is None:
        return
    if not is_binary(value):
        raise _not_binary(path)
    if message["role"] == "assistant":
        weight = weight_of(value)
        if message.setdefault("weight", weight) != weight:
            raise RowError(path, "it contradicts what the turn itself says")
    elif weight_of(value):
        raise _only_answers(path)


def _not_binary(path: JsonPath) -> RowError:
    return RowError(
        path,
        "a weight is 0 or 1, or false or true; part of a turn's loss is not supported",
        "give the turns to learn a weight of 1 and the others 0, or remove the key",
    )


def _only_answers(path: JsonPath) -> RowError:
    return RowError(
        path,
        "only the assistant's turns can be learned",
        'set it to 0 or remove it, or write the row as it is to be learned, as one "text"',
    )
