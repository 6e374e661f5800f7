"""Scores of single rows: their loss, and whether every trained token was the likeliest one, the answer given."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel

from daemon.evaluation.values import RowScore
from daemon.job import FailureKind
from daemon.trainer import distributed
from daemon.trainer.attempt import StopFlag
from daemon.trainer.attention import eval_mode
from daemon.trainer.collate import IGNORE, Collator, Example, places_in_pass
from daemon.trainer.errors import Interrupted, RunFailure
from daemon.trainer.loss import Objective
from daemon.trainer.tokenise import digest_tokens

KEY_DIGITS = 32  # of a digest of a row's tokens
ScoredRows = Mapping[str, Sequence[Example]]  # the samples of each row, by `row_key`


def row_key(samples: Sequence[Example]) -> str:
    """Return what a row is known by: a digest of its tokens, and of which are trained."""
    return digest_tokens(samples)[:KEY_DIGITS]


def by_line(examples: Sequence[Example]) -> list[list[Example]]:
    """Group samples of one file by the line that they come from, in their order."""
    lines: dict[int, list[Example]] = {}
    for example in examples:
        lines.setdefault(example.line, []).append(example)
    return list(lines.values())


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scores rows under the adapter that the model has at the time."""

    model: PeftModel
    collator: Collator
    objective: Objective
    stop: StopFlag

    def score(self, rows: ScoredRows) -> dict[str, RowScore]:
        """Return the score of each row, the same in every process.

        Raises Interrupted when a stop is requested, RunFailure(DIVERGED) when a loss is not finite.
        """
        keys = [key for key, samples in rows.items() for _ in samples]
        examples = [one for samples in rows.values() for one in samples]
        losses, misses = [0.0] * len(examples), [0.0] * len(examples)
        with eval_mode(self.model) as device, torch.inference_mode():
            for places in self.collator.divide(examples) if examples else ():
                if distributed.world_size() == 1:
                    self._check_stop()
                one = self.collator.tensors(examples, places)
                of_row = places_in_pass(one)
                on_device = {name: value.to(device) if hasattr(value, "to") else value for name, value in one.items()}
                loss, right = (part.cpu() for part in self.objective.token_losses(self.model, on_device))
                counts = one["targets"][0] != IGNORE
                sums = torch.zeros(len(places), dtype=torch.float64).index_add_(0, of_row, (loss * counts).double())
                wrong = torch.zeros(len(places), dtype=torch.float64).index_add_(0, of_row, (~right & counts).double())
                for place, total, missed in zip(places, sums.tolist(), wrong.tolist(), strict=True):
                    losses[place], misses[place] = total, missed
        *totals, stops = distributed.all_reduce_sum([*losses, *misses, float(self.stop.requested)])
        if stops:
            raise Interrupted
        if not all(map(math.isfinite, totals)):
            raise RunFailure(
                FailureKind.DIVERGED, "the loss over the held-out rows is not finite", hint="lower learning_rate"
            )
        return self._by_row(keys, totals[: len(examples)], totals[len(examples) :], rows)

    def _check_stop(self) -> None:
        if self.stop.requested:
            raise Interrupted

    @staticmethod
    def _by_row(
        keys: Sequence[str], losses: Sequence[float], misses: Sequence[float], rows: ScoredRows
    ) -> dict[str, RowScore]:
        loss, missed = dict.fromkeys(rows, 0.0), dict.fromkeys(rows, 0.0)
        for key, one, wrong in zip(keys, losses, misses, strict=True):
            loss[key] += one
            missed[key] += wrong
        return {
            key: RowScore(
                loss=loss[key],
                tokens=sum(sample.trained_tokens for sample in samples),
                exact=missed[key] == 0,
                row=samples[0].content_digest,
            )
            for key, samples in rows.items()
        }


def set_weights(model: PeftModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give the model's trainable tensors these values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[name])


@contextmanager
def with_weights(
    model: PeftModel, tensors: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Give the model `tensors` for the time being, and `after` at the end, however it comes."""
    set_weights(model, tensors)
    try:
        yield
    finally:
        set_weights(model, after)


def interpolate(
    parent: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """Return parent + alpha x (trained - parent), tensor by tensor, computed in float32."""
    return {
        name: (tensor.float() + alpha * (trained[name].float() - tensor.float())).to(tensor.dtype)
        for name, tensor in parent.items()
    }
