"""The readable back end: a loop over experts. Slow, and the oracle for all others.

Legend: T tokens, E experts, d model width.
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
    """``y[t] = sum over t's assignments of weight * expert(x[t])``, everything in float32 at least.

    Args:
        x: ``[T, d]``.
        routing: any record; ragged, and with dropped assignments.
        weights: the layer's experts, any layout.

    Returns:
        ``[T, d]`` in x's dtype, differentiable (twice, too) in x, the weights and the combine weights.
    """
    dispatch = routing.dispatch()
    exact = torch.promote_types(torch.promote_types(x.dtype, weights.up.dtype), torch.float32)
    y = torch.zeros(x.shape, dtype=exact, device=x.device)
    # experts without rows go through the loop too: their gradients are zeros, not missing
    matrices = zip(weights.up_t.unbind(0), weights.down_t.unbind(0), strict=True)
    for e, (up, down) in enumerate(matrices):
        rows = slice(dispatch.offsets[e], dispatch.offsets[e + 1])
        token = dispatch.token[rows]
        hidden = x[token].to(exact) @ up.to(exact)
        if weights.up_bias is not None:
            hidden = hidden + weights.up_bias[e]
        out = weights.activation(hidden) @ down.to(exact)
        if weights.down_bias is not None:
            out = out + weights.down_bias[e]
        if weights.post_norm is not None:
            out = weights.post_norm(out)
        y = y.index_add(0, token, (out * routing.weight[dispatch.order[rows], None]).to(exact))
    return y.to(x.dtype)
