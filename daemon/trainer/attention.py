"""Attention over rows that lie end to end without padding, and the proof that a model computes the same with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from daemon.trainer.data import Example, flatten

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
    """Causal attention inside each row of one flattened batch.

    query is (1, H, T, D), key and value (1, H_kv, T, D); returns (1, T, H, D). Rows begin and end at `cu_seq_lens_q`.
    Without those it is transformers' own scaled_dot_product_attention.
    """
    if cu_seq_lens_q is None:
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("packed attention knows neither soft caps nor sinks")
    if (window := kwargs.get("sliding_window")) is not None and (max_length_q or 0) > window:
        raise NotImplementedError(f"packed attention has no sliding window of {window}")
    grouped = query.shape[1] != key.shape[1]
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

    Tried on two rows: a model whose attention ignores the seams, or knows more than this one does, shows at once.
    """
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = network.config._attn_implementation
    rows = [
        _short(example, size) for example, size in zip((*examples[:1], *examples[-1:]), (PROBE_TOKENS, 9), strict=True)
    ]
    if before == "flash_attention_2":  # it knows seams by itself, under the same names
        return _same(network, rows, lambda: None)
    if before != "sdpa":
        return False
    if _same(network, rows, lambda: network.set_attn_implementation(PACKED)):
        return True
    network.set_attn_implementation(before)
    return False


def _same(network: Any, rows: list[Example], switch: Any) -> bool:
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            alone = [network(input_ids=torch.tensor([row.input_ids], device=device)).logits[0] for row in rows]
            switch()
            batch = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in flatten(rows).items()
                if name != "labels"
            }
            together = network(**batch, use_cache=False).logits[0]
        apart = torch.cat(alone).float()
        difference = float((together.float() - apart).abs().max()) / max(float(apart.abs().max()), 1e-6)
        return difference <= TOLERANCE.get(alone[0].dtype, 0.0)
    except (NotImplementedError, RuntimeError, TypeError, ValueError, KeyError):
        return False  # padded passes work with every model
    finally:
        network.train(was_training)


def _short(example: Example, most: int) -> Example:
    return Example(
        input_ids=list(example.input_ids[:most]),
        labels=list(example.labels[:most]),
        line=example.line,
        content_digest=example.content_digest,
    )
