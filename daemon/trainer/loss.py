"""The loss of a pass, with the vocabulary scored only where something is learned.

What a model says about a token without a label has no part in the loss, yet its logits cost as much as any others: they are
the largest tensors of a run, and where prompts are long they are most of them. So only the hidden states of trained
positions reach the output embeddings. That is exact; it is tried on the model before it is believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from daemon.trainer.attention import computing, nearly_equal, probe_rows
from daemon.trainer.collate import IGNORE, Example, pad, with_targets

Pass = dict[str, Any]


class Objective:
    """Computes the losses of passes; one for each model, because it may change how the model's head is called."""

    def __init__(self) -> None:
        self.selects = False  # whether only trained positions are scored
        self._positions: torch.Tensor | None = None  # (N,) of the pass that is computed now; None: score them all
        self._hidden_states = 0  # how many there are in that pass

    def select_trained(self, model: Any, examples: Sequence[Example]) -> bool:
        """Score trained positions only, if `model` then says the same about them; else leave it as it was."""
        network = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = network.get_output_embeddings()
        if head is None:
            return False
        hook = head.register_forward_pre_hook(self._select)
        self.selects = self._says_the_same(network, probe_rows(examples))
        if not self.selects:
            hook.remove()
        return self.selects

    def loss(self, model: Any, one: Pass, *, over: Any, takes_count: bool = False) -> torch.Tensor:
        """The sum over this pass's trained tokens, divided by `over`, the trained tokens of the whole step.

        `takes_count`: the model itself divides by a number that it is given; others take the mean over a pass.
        """
        if self.selects:
            loss: torch.Tensor = self._selected(model, one, over).loss
            return loss
        plain = {name: value for name, value in one.items() if name not in {"trained_at", "targets"}}
        if takes_count:
            loss = model(**plain, num_items_in_batch=over).loss
        else:
            loss = model(**plain).loss * ((one["labels"][..., 1:] != IGNORE).sum() / over)
        return loss

    def _selected(self, model: Any, one: Pass, over: Any) -> Any:
        others = {name: value for name, value in one.items() if name not in {"labels", "trained_at", "targets"}}
        self._positions, self._hidden_states = one["trained_at"], one["input_ids"].numel()
        try:
            return model(**others, labels=one["targets"], shift_labels=one["targets"], num_items_in_batch=over)
        finally:
            self._positions = None

    def _select(self, head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._positions is None:
            return None
        hidden, *others = inputs  # (B, T, H)
        if hidden.shape[:-1].numel() != self._hidden_states:
            raise ValueError("the model's head is not given one hidden state a token")
        return hidden.flatten(0, -2).index_select(0, self._positions)[None], *others  # (1, N, H)

    def _says_the_same(self, network: Any, rows: list[Example]) -> bool:
        one = with_targets(pad(rows, 0))
        try:
            with computing(network) as device, torch.inference_mode():
                one = {name: value.to(device) for name, value in one.items()}
                expected = network(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits
                found = self._selected(network, one, 1)
                wanted = cross_entropy(found.logits[0].float(), one["targets"][0], reduction="sum")
                same_loss = abs(float(found.loss - wanted)) <= 1e-3 * abs(float(wanted))
                return same_loss and nearly_equal(found.logits[0], expected.flatten(0, 1)[one["trained_at"]])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # scoring all of them works with every model
