"""The back-end skeleton for experts that only torch can differentiate: gather, two linears, combine.

Legend: T tokens, A assignments, E experts, d model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from collegium.experts.weights import ExpertWeights
from collegium.routing.record import Routing

__all__ = ["Linear", "bounds", "run_rows"]

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``(rows, matrix as stored, bias) -> rows``: each row with the matrix of its expert."""


def bounds(routing: Routing, num_experts: int) -> list[int]:
    """``E+1`` row bounds of the layer's experts; rows beyond the last belong to experts that compute nothing."""
    return routing.dispatch().offsets[: num_experts + 1].tolist()


def run_rows(x: Tensor, routing: Routing, weights: ExpertWeights, linear: Linear) -> Tensor:
    """``[T, d]`` in x's dtype: the experts' outputs times the combine weights, summed in float32."""
    dispatch = routing.dispatch()
    live = bounds(routing, weights.num_experts)[-1]
    token, order = dispatch.token[:live], dispatch.order[:live]
    hidden = weights.activation(linear(x.index_select(0, token), weights.up, weights.up_bias))
    out = linear(hidden, weights.down, weights.down_bias)
    if weights.post_norm is not None:
        out = weights.post_norm(out)
    out = out.float() * routing.weight.index_select(0, order).float()[:, None]
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    return y.index_add(0, token, out).to(x.dtype)
