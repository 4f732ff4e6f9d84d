"""Attention of one new token on a CPU, without the detours that torch's fused attention takes there.

torch multiplies one row of bfloat16 by the keys several times as slowly in its fused attention as in a plain matrix
product. So one token takes two plain products with the softmax between them in float32, as transformers' own eager
attention does; all else goes to ``sdpa``.

Legend: B sequences, H heads, G key-value heads, S keys, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

__all__ = ["NAME", "use_lean_attention"]

NAME = "collegium_lean"
"""Of the attention implementation."""

_UNKNOWN = ("s_aux", "softcap", "position_bias", "head_mask")
"""Arguments that change what attention computes, and that only a family's own attention understands."""


def use_lean_attention(model: Any) -> None:
    """Let a model that attends by ``sdpa`` do so by this module. Inference on the CPU."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            # past the setter, which would also write to the configs of parts
            config._attn_implementation_internal = NAME


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Query ``[B, H, T, D]``, key and value ``[B, G, S, D]``; output ``[B, T, H, D]``."""
    plain = attention_mask is None and all(kwargs.get(name) is None for name in _UNKNOWN)
    if query.shape[2] != 1 or not plain or query.dtype != torch.bfloat16 or query.device.type != "cpu":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    B, H, _, D = query.shape
    rows = query.reshape(B, key.shape[1], -1, D) * (D**-0.5 if scaling is None else scaling)
    share = torch.matmul(rows, key.transpose(-1, -2)).softmax(-1, dtype=torch.float32)
    return torch.matmul(share.to(value.dtype), value).reshape(B, 1, H, -1), None
