"""The loss of a pass: the same with all logits as with those of trained positions alone, and left out where it is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from daemon.trainer.collate import IGNORE, Example, pad, with_targets
from daemon.trainer.loss import Objective

EXAMPLES = [
    Example(input_ids=[1, 5, 3, 2, 7], learned=((2, 5),), line=1, content_digest=""),
    Example(input_ids=[4, 6, 2], learned=((1, 3),), line=2, content_digest=""),
]


class Network(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
    """A model as small as one can be; `fault` makes it one whose logits cannot be selected."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.fault = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9), fault
        self.config = SimpleNamespace()
        self.seen: list[int] = []  # positions that each pass computed logits of

    def get_output_embeddings(self) -> Any:
        return None if self.fault == "no head" else self.head

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
    ) -> Any:
        hidden = self.embed(input_ids).cumsum(1)
        if self.fault == "first row":
            hidden = hidden[:1]
        logits = self.head(hidden)
        if self.fault == "scaled" and logits.shape[1] != input_ids.shape[1]:
            logits = logits * 1.5
        self.seen.append(logits.shape[:-1].numel())
        if labels is None:
            return SimpleNamespace(logits=logits)
        if shift_labels is None:
            shift_labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORE)[:, 1:]
        flat = logits.flatten(0, -2).float()
        mean = num_items_in_batch is None
        loss = cross_entropy(flat, shift_labels.flatten(), ignore_index=IGNORE, reduction="mean" if mean else "sum")
        if self.fault == "loss":
            loss = loss * 1.01
        return SimpleNamespace(logits=logits, loss=loss if mean else loss / num_items_in_batch)


def one_pass() -> dict[str, Any]:
    return with_targets(pad(EXAMPLES, 0))


def expected() -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each trained token, and whether it was the likeliest, from all logits."""
    one, network = one_pass(), Network()
    logits = network(one["input_ids"]).logits.flatten(0, 1)[one["trained_at"]]
    targets = one["targets"][0]
    return cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


def test_the_loss_is_the_sum_over_trained_tokens_divided_by_those_of_the_step() -> None:
    due = float(expected()[0].detach().sum()) / 10
    for selects, takes_count in ((False, False), (False, True), (True, False), (True, True)):
        network, objective = Network(), Objective()
        if selects:
            assert objective.select_trained(network, EXAMPLES)
        network.seen.clear()
        loss = objective.loss(network, one_pass(), over=10, takes_count=takes_count)
        assert float(loss) == pytest.approx(due, rel=1e-5)
        assert network.seen == [5 if selects else 10]  # five trained tokens in ten positions


def test_each_token_has_its_own_loss_either_way_and_the_next_pass_is_whole_again() -> None:
    losses, likeliest = expected()
    for selects in (False, True):
        network, objective = Network(), Objective()
        if selects:
            objective.select_trained(network, EXAMPLES)
        found, hit = objective.token_losses(network, one_pass())
        assert torch.allclose(found, losses, atol=1e-6)
        assert hit.tolist() == likeliest.tolist()
        assert found.dtype is torch.float32
        assert network(one_pass()["input_ids"]).logits.shape == (2, 5, 9)


@pytest.mark.parametrize("fault", ["no head", "first row", "scaled", "loss"])
def test_a_model_that_then_computes_something_else_is_left_as_it_was(fault: str) -> None:
    network, objective = Network(fault), Objective()
    assert not objective.select_trained(network, EXAMPLES)
    assert not objective.selects
    assert not network.head._forward_pre_hooks
    assert network.training


def test_a_pass_that_fails_leaves_no_selection_behind() -> None:
    network, objective = Network(), Objective()
    objective.select_trained(network, EXAMPLES)
    network.fault = "first row"
    for compute in (
        lambda: objective.loss(network, one_pass(), over=1),
        lambda: objective.token_losses(network, one_pass()),
    ):
        with pytest.raises(ValueError, match="one hidden state for each token"):
            compute()
        network.fault = ""
        assert network(one_pass()["input_ids"]).logits.shape == (2, 5, 9)
        network.fault = "first row"


def test_an_adapter_s_own_base_is_what_is_probed() -> None:
    network = Network()
    wrapped = SimpleNamespace(get_base_model=lambda: network)
    assert Objective().select_trained(wrapped, EXAMPLES)
    assert len(network.head._forward_pre_hooks) == 1
