"""What a base model can be given, and rows that it cannot take: told before anything is cleared or loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from daemon.base_identity import BaseModel
from daemon.job import FailureKind
from daemon.trainer.collate import Examples
from daemon.trainer.errors import RunFailure
from daemon.trainer.model import build_without_weights, report_load_errors


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What a base model can be given."""

    tokens: int  # ids from 0 to this, exclusive
    positions: int | None  # the longest row that it was made for; None: it does not say
    ends: bool  # beyond them there is nothing, as in GPT-2; rotary embeddings go on, worse and worse


def capacity_of(base: BaseModel) -> Capacity:
    """From the architecture, without weights. Raises RunFailure(CONFIG)."""
    with report_load_errors(base):
        network = build_without_weights(base, "eager")
    positions = getattr(network.config, "max_position_embeddings", None)
    return Capacity(
        tokens=int(network.get_input_embeddings().weight.shape[0]),
        positions=positions if isinstance(positions, int) and positions > 0 else None,
        ends=not getattr(network.config, "rope_parameters", None),
    )


def refuse_what_does_not_fit(examples: Examples, tokenizer: Any, capacity: Capacity) -> None:
    """Raise RunFailure(CONFIG) for a token or a position that the base model does not have.

    A GPU would only say that it failed, and after checkpoints were cleared.
    """
    for example in (*examples.trained, *examples.held_out):
        if (highest := max(example.input_ids, default=0)) >= capacity.tokens:
            raise RunFailure(
                FailureKind.CONFIG,
                f"line {example.line}: the tokenizer makes token {highest}, {tokenizer.convert_ids_to_tokens(highest)!r},"
                f" of it, and the base model knows {capacity.tokens} tokens, from 0",
                hint="take tokenizer and weights from the same model, or resize its embeddings and save it again",
            )
        if capacity.ends and capacity.positions is not None and len(example.input_ids) > capacity.positions:
            raise RunFailure(
                FailureKind.CONFIG,
                f"line {example.line} has {len(example.input_ids)} tokens, and the base model no more than"
                f" {capacity.positions} positions",
                hint=f"set max_length = {capacity.positions} or less under [data]",
            )


def padding_token(tokenizer: Any, known: int) -> int:
    """A token id to pad with, which is neither attended to nor learned: the model's own where it has an embedding."""
    return next((id_ for id_ in (tokenizer.pad_token_id, tokenizer.eos_token_id) if id_ is not None and id_ < known), 0)
