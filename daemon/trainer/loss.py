"""The loss of a pass, with logits computed only at trained positions.

The logits of a token without a label have no part in the loss and cost as much as any others: they are the largest tensors
of a run, and with long prompts most of them. So only the hidden states of trained positions reach the output embeddings.
That is exact; each model is probed for it before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from daemon.trainer.attention import eval_mode, nearly_equal, probe_rows
from daemon.trainer.collate import IGNORE, Example, pad, with_targets

Pass = dict[str, Any]


class Objective:
    """Computes the losses of passes; one for each model, whose head it may hook."""

    def __init__(self) -> None:
        self.selects = False  # whether logits are computed at trained positions only
        self._positions: torch.Tensor | None = None  # (N,) of the pass being computed; None: all
        self._num_positions = 0  # of that pass

    def select_trained(self, model: Any, examples: Sequence[Example]) -> bool:
        """Compute logits at trained positions only, if `model` then gives the same; else leave it as it was."""
        network = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = network.get_output_embeddings()
        if head is None:
            return False
        hook = head.register_forward_pre_hook(self._select)
        self.selects = self._is_equivalent(network, probe_rows(examples))
        if not self.selects:
            hook.remove()
        return self.selects

    def loss(self, model: Any, one: Pass, *, over: Any, takes_count: bool = False) -> torch.Tensor:
        """Return the loss summed over this pass's trained tokens, divided by `over`, those of the whole step.

        `takes_count`: the model divides by a given number itself; others take the mean over a pass.
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

    def token_losses(self, model: Any, one: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each of this pass's `targets`, float32 (N,), and whether it was the likeliest token, bool (N,)."""
        others = {name: value for name, value in one.items() if name not in {"labels", "trained_at", "targets"}}
        if self.selects:
            self._positions, self._num_positions = one["trained_at"], one["input_ids"].numel()
        try:
            logits = model(**others).logits
        finally:
            self._positions = None
        if not self.selects:
            logits = logits.flatten(0, -2).index_select(0, one["trained_at"])[None]
        targets = one["targets"][0]
        losses = cross_entropy(logits[0].float(), targets, reduction="none", ignore_index=IGNORE)
        return losses, logits[0].argmax(-1) == targets

    def _selected(self, model: Any, one: Pass, over: Any) -> Any:
        others = {name: value for name, value in one.items() if name not in {"labels", "trained_at", "targets"}}
        self._positions, self._num_positions = one["trained_at"], one["input_ids"].numel()
        try:
            return model(**others, labels=one["targets"], shift_labels=one["targets"], num_items_in_batch=over)
        finally:
            self._positions = None

    def _select(self, head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._positions is None:
            return None
        hidden, *others = inputs  # (B, T, H)
        if hidden.shape[:-1].numel() != self._num_positions:
            raise ValueError("the model's head does not get one hidden state for each token")
        return hidden.flatten(0, -2).index_select(0, self._positions)[None], *others  # (1, N, H)

    def _is_equivalent(self, network: Any, rows: list[Example]) -> bool:
        one = with_targets(pad(rows, 0))
        try:
            with eval_mode(network) as device, torch.inference_mode():
                one = {name: value.to(device) for name, value in one.items()}
                expected = network(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits
                output = self._selected(network, one, 1)
                loss = cross_entropy(output.logits[0].float(), one["targets"][0], reduction="sum")
                same_loss = abs(float(output.loss - loss)) <= 1e-3 * abs(float(loss))
                return same_loss and nearly_equal(output.logits[0], expected.flatten(0, 1)[one["trained_at"]])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # computing all logits works with every model
