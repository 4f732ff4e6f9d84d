"""Attention of one new token of one sequence on a CPU by a kernel of our own; all else goes to ``sdpa``.

Legend: B sequences, H heads, G key-value heads, S keys, D head width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from collegium.models.attention_kernel import attend, fits

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
    if plain and fits(query, key, value):
        return attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
