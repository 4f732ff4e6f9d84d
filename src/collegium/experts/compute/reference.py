"""The readable back end: a loop over experts. Slow, and the oracle for all others.

Legend: T tokens, E experts, A assignments, d model width, f expert width, u = 2f for gated experts, f for plain ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collegium.catalog import method
from collegium.experts.weights import ExpertWeights
from collegium.routing.record import Routing

__all__ = ["reference"]


@method("reference", kind="compute", paper="Sparsely-Gated Mixture-of-Experts (2017)", arxiv="1701.06538")
def reference(x: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """``y[t] = sum over t's assignments of weight * expert(x[t])``, summed in float32.

    Args:
        x: ``[T, d]``, of the weights' dtype.
        routing: any record, ragged and with dropped assignments too.
        weights: the layer's experts.

    Returns:
        ``[T, d]`` in x's dtype, differentiable in x, the weights and the combine weights.
    """
    dispatch = routing.dispatch()
    bounds = dispatch.offsets.tolist()
    y = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for e in range(weights.num_experts):
        rows = slice(bounds[e], bounds[e + 1])
        if rows.start == rows.stop:
            continue
        token = dispatch.token[rows]
        h = x[token] @ weights.up_t[e]
        if weights.up_bias is not None:
            h = h + weights.up_bias[e]
        out = weights.activation(h) @ weights.down_t[e]
        if weights.down_bias is not None:
            out = out + weights.down_bias[e]
        if weights.post_norm is not None:
            out = weights.post_norm(out)
        combine = routing.weight[dispatch.order[rows]]
        y = y.index_add(0, token, (out * combine[:, None]).to(y.dtype))
    return y.to(x.dtype)
