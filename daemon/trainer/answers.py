"""Answers of the model to prompts: the likeliest token each time, until it ends its answer or may write no more."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from daemon.trainer.attention import eval_mode

PASS_TOKENS = 16384  # of one pass, answers included
MOST_PROMPTS = 32  # of one pass


# What a model's own code may raise that computes losses, and cannot write.
GENERATION_ERRORS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


class GenerationError(Exception):
    """The model cannot write answers; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Writes answers under the adapter that the model has at the time."""

    model: PeftModel
    ends: Sequence[int]  # tokens that end an answer
    pad_token_id: int
    max_new_tokens: int
    tick: Callable[[], None]  # called at every token; what it raises ends the writing

    def write(self, prompts: Sequence[Sequence[int]], until: float) -> list[list[int] | None]:
        """Return each answer's tokens, without the one that ends it; None for those not finished by `until`.

        `until` as time.monotonic(). Raises what `tick` raises.
        """
        try:
            return self._pass(prompts, until)
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                return [None]
        half = len(prompts) // 2  # outside of the handler, whose traceback would keep the tensors
        return [*self.write(prompts[:half], until), *self.write(prompts[half:], until)]

    def _pass(self, prompts: Sequence[Sequence[int]], until: float) -> list[list[int] | None]:
        if time.monotonic() >= until:
            return [None] * len(prompts)
        width = max(map(len, prompts))
        pads = [width - len(prompt) for prompt in prompts]
        ids = [[self.pad_token_id] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
        attended = [[0] * pad + [1] * (width - pad) for pad in pads]
        network: Any = self.model.get_base_model()
        if not callable(getattr(network, "generate", None)):
            raise GenerationError(f"{type(network).__name__} writes no answers")
        own = network.generation_config
        # The model's own may sample, or penalise what was written.
        network.generation_config = self._config()
        try:
            with eval_mode(self.model) as device, torch.inference_mode():
                written = network.generate(
                    input_ids=torch.tensor(ids, device=device),
                    attention_mask=torch.tensor(attended, device=device),
                    generation_config=self._config(),
                    stopping_criteria=StoppingCriteriaList([_Until(until, self.tick)]),
                )
        except torch.OutOfMemoryError:
            raise
        except GENERATION_ERRORS as error:
            raise GenerationError(f"{type(error).__name__}: {error}") from error
        finally:
            network.generation_config = own
        return [self.finished(row) for row in written[:, width:].tolist()]

    def _config(self) -> GenerationConfig:
        return GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(self.ends) or None,
            pad_token_id=self.pad_token_id,
            use_cache=True,
        )

    def finished(self, written: list[int]) -> list[int] | None:
        """What was written before an end, or as much as may be; None for an answer that was cut short."""
        for at, token in enumerate(written):
            if token in self.ends:
                return written[:at]
        return written if len(written) >= self.max_new_tokens else None


class _Until(StoppingCriteria):  # type: ignore[misc]  # the library types it as Any
    """Stop all answers at a time."""

    def __init__(self, until: float, tick: Callable[[], None]) -> None:
        self._until = until
        self._tick = tick

    def __call__(self, input_ids: torch.Tensor, scores: Any, **others: Any) -> torch.Tensor:
        self._tick()
        over = time.monotonic() >= self._until
        return torch.full((input_ids.shape[0],), over, device=input_ids.device, dtype=torch.bool)


def divide(lengths: Sequence[int], max_new_tokens: int) -> list[list[int]]:
    """Divide prompts of these lengths into passes, as places; alike ones together, so that little is padded."""
    passes: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda at: (lengths[at], at)):
        width = lengths[place] + max_new_tokens
        if not passes or len(passes[-1]) >= MOST_PROMPTS or (len(passes[-1]) + 1) * width > PASS_TOKENS:
            passes.append([])
        passes[-1].append(place)
    return passes
