"""Packed attention: rows end to end without padding, and the probe that a model computes the same with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from daemon.trainer.collate import Example, flatten

PACKED = "dropforge_packed"
PROBE_TOKENS = 24
# Largest difference of logits, in units of the largest logit; what rounding alone amounts to.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def packed_attention(  # noqa: PLR0917  transformers calls it so
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention inside each row of one flattened batch.

    query is (1, H, T, D), key and value (1, H_kv, T, D); returns (1, T, H, D). Rows begin and end at `cu_seq_lens_q`.
    Without those it is the "sdpa" attention of transformers.
    """
    if cu_seq_lens_q is None:
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("packed attention has neither soft caps nor sinks")
    if (window := kwargs.get("sliding_window")) is not None and (max_length_q or 0) > window:
        raise NotImplementedError(f"packed attention has no sliding window of {window}")
    grouped = query.shape[1] != key.shape[1]
    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # 4-bit layers return float32, whatever they compute in
        query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and dropout == 0.0:
        from torch.nn.attention.varlen import varlen_attn

        lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        parts = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, H, D)
        packed = varlen_attn(*parts, *lengths, scale=scaling, window_size=(-1, 0), enable_gqa=grouped)
        return packed[None], None
    sizes = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    rows = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    attended = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=grouped)
        for q, k, v in rows
    ]
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(PACKED, packed_attention)


def use_packed(model: Any, examples: Sequence[Example]) -> bool:
    """Switch `model` to packed attention if it then computes the same; else leave it as it was and return False.

    Probed on two rows: a model whose attention ignores row boundaries, or does more than this one, shows at once.
    """
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = network.config._attn_implementation
    longest = max(len(example.input_ids) for example in examples)
    if before == "flash_attention_2":  # it takes row boundaries itself, under the same names
        return _is_equivalent(network, probe_rows(examples), longest, lambda: None)
    if before != "sdpa":
        return False
    if _is_equivalent(network, probe_rows(examples), longest, lambda: network.set_attn_implementation(PACKED)):
        return True
    network.set_attn_implementation(before)
    return False


def _is_equivalent(network: Any, rows: list[Example], longest: int, switch: Callable[[], None]) -> bool:
    """Return whether rows end to end have the logits that each has alone, and gradients. `longest`: of all rows."""
    try:
        with eval_mode(network) as device:
            with torch.inference_mode():
                alone = [network(input_ids=torch.tensor([row.input_ids], device=device)).logits[0] for row in rows]
            switch()
            batch = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in flatten(rows).items()
                if name != "labels"
            }
            # A window that these rows fit in and others do not has to show now, not in the middle of a run.
            batch |= {"max_length_q": longest, "max_length_k": longest}
            together = network(**batch, use_cache=False).logits[0]
            learns = [p for p in network.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(together.float().sum(), learns, allow_unused=True) if learns else ()
            finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None)
            return finite and nearly_equal(together.detach(), torch.cat(alone))
    except (NotImplementedError, RuntimeError, TypeError, ValueError, KeyError):
        return False  # padded passes work with every model


@contextmanager
def eval_mode(network: Any) -> Iterator[torch.device]:
    """Evaluate `network` without dropout, in the precision that it trains in; yields its device."""
    device: torch.device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    try:
        with autocast(network):
            yield device
    finally:
        network.train(was_training)


def autocast(network: Any) -> torch.autocast:
    """Return the Trainer's autocast: bfloat16 on a GPU when the base weights are, or 4-bit ones compute in it."""
    device = next(network.parameters()).device
    quantized = getattr(network.config, "quantization_config", None)
    low = getattr(quantized, "bnb_4bit_compute_dtype", None) is torch.bfloat16 or any(
        parameter.dtype is torch.bfloat16 for parameter in network.parameters()
    )
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda" and low)


def nearly_equal(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether logits differ by no more than the rounding of the dtype that they were computed in."""
    device = actual.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else expected.dtype
    difference = float((actual.float() - expected.float()).abs().max()) / max(float(expected.abs().max()), 1e-6)
    return difference <= TOLERANCE.get(dtype, 0.0)


def probe_rows(examples: Sequence[Example]) -> list[Example]:
    """Return two short rows of different length, all but their first token trained."""
    return [_short(example, size) for example, size in zip((examples[0], examples[-1]), (PROBE_TOKENS, 9), strict=True)]


def _short(example: Example, max_tokens: int) -> Example:
    ids = list(example.input_ids[:max_tokens])
    return replace(example, input_ids=ids, learned=((0, len(ids)),))
