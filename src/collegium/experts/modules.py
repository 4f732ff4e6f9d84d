"""`Experts`: the routed experts of one layer as a torch module, with transformers' parameter names and layout.

Legend: T tokens, E experts, d model width, f expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from collegium.experts.compute import compute
from collegium.experts.weights import ExpertWeights
from collegium.routing.record import Routing

__all__ = ["Experts"]


class Experts(nn.Module):
    """E feed-forward experts."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        hidden_act: str = "silu",
        gated: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.hidden_size, self.intermediate_size, self.num_experts = hidden_size, intermediate_size, num_experts
        self.hidden_act, self.gated, self.compute = hidden_act, gated, "auto"
        self.act_fn = ACT2FN[hidden_act]
        u = 2 * intermediate_size if gated else intermediate_size
        up = nn.Parameter(torch.empty(num_experts, u, hidden_size))
        self.register_parameter("gate_up_proj" if gated else "up_proj", up)
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        for p in self.parameters():
            p.normal_(std=std)

    def activation(self, h: Tensor) -> Tensor:
        if not self.gated:
            return self.act_fn(h)
        gate, up = h.chunk(2, -1)
        return self.act_fn(gate) * up

    @property
    def weights(self) -> ExpertWeights:
        up = self.gate_up_proj if self.gated else self.up_proj
        return ExpertWeights(up, self.down_proj, self.activation, gated=self.gated, fused_activation=self.hidden_act)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        return compute(x, routing, self.weights, self.compute)
