"""`SiteBatch`: what one forward showed at one MoE block, and what its experts computed for it.

Legend: T tokens, E experts, A assignments of the tokens that count, d model width, f expert width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from collegium.errors import UnsupportedFamilyError
from collegium.experts.compute import compute
from collegium.experts.from_module import expert_weights
from collegium.experts.weights import ExpertWeights
from collegium.routing import Routing
from collegium.sites import Site

__all__ = ["SiteBatch", "apply_experts", "expert_hidden", "expert_outputs", "weights_of"]

PIECE = 1 << 25
"""What the experts put out for one piece of a batch has at most so many values (128 MB in float32)."""


def weights_of(site: Site) -> ExpertWeights:
    """The parameters of a site's experts. Nothing is copied.

    Raises:
        UnsupportedFamilyError: they are not fused parameters of a floating dtype (NLLB-MoE, Switch, quantised experts).
    """
    experts: Any = site.experts
    weights = getattr(experts, "weights", None)
    if not isinstance(weights, ExpertWeights):
        if site.scales_input:  # Llama-4, whose experts lack the flags of the common seam
            weights = ExpertWeights(
                up=experts.gate_up_proj,
                down=experts.down_proj,
                activation=lambda hidden: experts.act_fn(hidden.chunk(2, -1)[0]) * hidden.chunk(2, -1)[1],
                transposed=True,
            )
        else:
            weights = expert_weights(experts)
    if weights.up.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedFamilyError(
            f"{site.path}: the experts' weights are {weights.up.dtype}; load the model dequantised to look at them"
        )
    return weights


def apply_experts(weights: ExpertWeights, x: Tensor, expert: Tensor) -> Tensor:
    """``[A, d]`` float32: the output of expert ``expert [A]`` for each row of ``x [A, d]``, without combine weights."""
    if not len(x):
        return x.float()
    E = max(weights.num_experts, int(expert.max()) + 1)  # ids beyond the experts compute nothing, and give zeros
    weight = torch.ones_like(expert, dtype=torch.float32)
    routing = Routing(expert, weight, num_tokens=len(x), num_experts=E, slots=1)
    return compute(x.float(), routing, weights)


def expert_hidden(
    weights: ExpertWeights, x: Tensor, token: Tensor, offsets: Tensor, scale: Tensor | None = None
) -> Tensor:
    """``[A, f]`` float32 activations of the experts' neurons: what goes into the down projection.

    One expert at a time, so that no copy of x for every assignment is made, nor a float32 copy of all weights.

    Args:
        x: ``[T, d]``.
        token: ``[A]`` int64, the token of each row, rows sorted by expert.
        offsets: ``[E + 1]`` int64; rows ``offsets[e]:offsets[e + 1]`` are expert e's. Ids beyond the experts give
            zeros.
        scale: ``[A]`` what the input of each row is multiplied by; None for nothing.
    """
    hidden = torch.zeros(len(token), weights.down_t.shape[1], device=x.device)
    for e, rows in _groups(weights, offsets):
        row = x[token[rows]].float()
        if scale is not None:
            row = row * scale[rows, None]
        up = row @ weights.up_t[e].float()
        if weights.up_bias is not None:
            up = up + weights.up_bias[e].float()
        hidden[rows] = weights.activation(up)
    return hidden


def expert_outputs(weights: ExpertWeights, hidden: Tensor, offsets: Tensor) -> Tensor:
    """``[A, d]`` float32 outputs of the experts for their ``hidden [A, f]``, without combine weights."""
    outputs = torch.zeros(len(hidden), weights.down_t.shape[2], device=hidden.device)
    for e, rows in _groups(weights, offsets):
        out = hidden[rows] @ weights.down_t[e].float()
        if weights.down_bias is not None:
            out = out + weights.down_bias[e].float()
        outputs[rows] = out if weights.post_norm is None else weights.post_norm(out)
    return outputs


def _groups(weights: ExpertWeights, offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """``(expert, its rows)`` of the experts that have rows."""
    for e, (first, last) in enumerate(pairwise(offsets.tolist()[: weights.num_experts + 1])):
        if first < last:
            yield e, slice(first, last)


class SiteBatch:
    """What one forward showed at one MoE block. Tokens that do not count (padding) are in no row.

    Attributes:
        site: the block.
        x: ``[T, d]`` the experts' input.
        routing: what the experts were told; with logits if a collector needs them.
        document, domain, position: ``[T]`` int64; domains are codes.
        valid: ``[T]`` bool, the tokens that count.
        residual: ``[T, d]`` the residual stream entering the block, if a collector needs it, else None.
        token, expert: ``[A]`` int64 rows sorted by expert, in token order within one; dropped assignments left out.
        weight: ``[A]`` float32 combine weights of the rows.
        offsets: ``[E + 1]`` int64; rows ``offsets[e]:offsets[e + 1]`` are expert e's.
    """

    def __init__(
        self,
        site: Site,
        x: Tensor,
        routing: Routing,
        *,
        document: Tensor,
        domain: Tensor,
        position: Tensor,
        valid: Tensor,
        residual: Tensor | None = None,
        whole: SiteBatch | None = None,
    ) -> None:
        self.site, self.x, self.routing = site, x.detach(), routing
        self.document, self.domain, self.position, self.valid = document, domain, position, valid
        self.residual, self._whole = residual, whole
        dispatch = routing.dispatch()
        live = valid[dispatch.token]
        order = dispatch.order[live]
        self.token, self.expert = dispatch.token[live], routing.expert[order]
        self.weight = routing.weight[order].detach().float()
        counts = torch.bincount(self.expert, minlength=routing.num_experts)
        self.offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    @property
    def combine(self) -> Tensor:
        """``[A]`` float32 what multiplies an output; 1 where the weight has gone into the expert's input (Llama-4)."""
        return torch.ones_like(self.weight) if self.site.scales_input else self.weight

    @cached_property
    def hidden(self) -> Tensor:
        """``[A, f]`` float32 activations of the experts' neurons. Computed once for all collectors."""
        if self._whole is not None:
            return self._whole.hidden[self._in_whole]
        scale = self.weight if self.site.scales_input else None
        return expert_hidden(weights_of(self.site), self.x, self.token, self.offsets, scale)

    @cached_property
    def outputs(self) -> Tensor:
        """``[A, d]`` float32 outputs of the experts, before the combine weights. Computed once for all collectors."""
        if self._whole is not None:
            return self._whole.outputs[self._in_whole]
        return expert_outputs(weights_of(self.site), self.hidden, self.offsets)

    @cached_property
    def norms(self) -> Tensor:
        """``[A]`` float32 Euclidean norms of `outputs`."""
        if self._whole is not None:
            return self._whole.norms[self._in_whole]
        return self.outputs.norm(dim=1)

    @cached_property
    def routed(self) -> Tensor:
        """``[T, d]`` float32 what the routed experts put out together; of use for the tokens that count only."""
        if self._whole is not None:
            return self._whole.routed
        total, combine = self.outputs.new_zeros(len(self.x), self.outputs.shape[1]), self.combine
        for first, last in pairwise(self.offsets.tolist()):
            rows = slice(first, last)
            total.index_add_(0, self.token[rows], self.outputs[rows] * combine[rows, None])
        return total

    @cached_property
    def _in_whole(self) -> Tensor:
        """Which rows of the whole batch are rows here."""
        assert self._whole is not None
        return self.valid[self._whole.token]

    def of_domain(self, code: int) -> SiteBatch | None:
        """The same batch with only the tokens of one domain counting; None if there are none."""
        valid = self.valid & (self.domain == code)
        if not bool(valid.any()):
            return None
        return self if bool((valid == self.valid).all()) else self._of(valid, self)

    def pieces(self) -> Iterator[SiteBatch]:
        """The batch in pieces of consecutive tokens, so small that what the experts compute for one fits in `PIECE`."""
        step = max(1, PIECE // (max(1, self.site.top_k) * self.x.shape[1]))
        if len(self.x) <= step:
            yield self
            return
        for first in range(0, len(self.x), step):
            valid = torch.zeros_like(self.valid)
            valid[first : first + step] = self.valid[first : first + step]
            if bool(valid.any()):
                yield self._of(valid, None)

    def _of(self, valid: Tensor, whole: SiteBatch | None) -> SiteBatch:
        return SiteBatch(
            self.site,
            self.x,
            self.routing,
            document=self.document,
            domain=self.domain,
            position=self.position,
            valid=valid,
            residual=self.residual,
            whole=whole,
        )
