"""Experts that every token passes through."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN

__all__ = ["SharedExperts"]


class SharedExperts(nn.Module):
    """A gated FFN that every token passes through: ``down(act(gate(x)) * up(x))``, without biases.

    S shared experts of width f are one such FFN of width ``fs = S * f``, since their outputs are added.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str = "silu") -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d] -> [..., d]``."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
