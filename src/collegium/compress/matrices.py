"""One expert's matrices in one form, whatever the layout of its family.

Legend: E experts, f expert width, d model width. Neuron k of an expert is row k of `gate` and `up`, with its entries of
their biases, and column k of `down`: neurons may change places without changing what the expert computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from collegium.errors import PlanError, UnsupportedFamilyError
from collegium.experts.weights import ExpertWeights

__all__ = ["Expert", "LayerExperts", "pack"]


@dataclass(frozen=True, eq=False)
class Expert:
    """The float32 matrices of one expert: `gate`, `up` ``[f, d]``, `down` ``[d, f]``, biases ``[f]``, ``[f]``, ``[d]``.

    Plain experts have no gate.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def width(self) -> int:
        """f."""
        return self.up.shape[0]

    def neurons(self, ids: Sequence[int] | Tensor) -> Expert:
        """The same expert with these neurons only, in this order. ``ids [f']``."""
        ids = torch.as_tensor(ids, dtype=torch.long)
        rows = {
            name: None if value is None else value[ids]
            for name, value in (
                ("gate", self.gate),
                ("up", self.up),
                ("gate_bias", self.gate_bias),
                ("up_bias", self.up_bias),
            )
        }
        return replace(self, down=self.down[:, ids], **rows)  # type: ignore[arg-type]


class LayerExperts:
    """All experts of one layer, read one at a time.

    Attributes:
        weights: where they are.
    """

    def __init__(self, weights: ExpertWeights) -> None:
        self.weights = weights
        self.num_experts, self.intermediate_size, self.hidden_size = weights.down_t.shape

    def read(self, e: int) -> Expert:
        """A float32 copy of expert `e`."""
        w = self.weights
        gate, up = self._split(w.up_t[e].T)
        gate_bias, up_bias = (None, None) if w.up_bias is None else self._split(w.up_bias[e])
        return Expert(
            gate=None if gate is None else _copy(gate),
            up=_copy(up),
            down=_copy(w.down_t[e].T),
            gate_bias=None if gate_bias is None else _copy(gate_bias),
            up_bias=None if up_bias is None else _copy(up_bias),
            down_bias=None if w.down_bias is None else _copy(w.down_bias[e]),
        )

    def _split(self, rows: Tensor) -> tuple[Tensor | None, Tensor]:
        """``(gate, up)`` of rows ``[u, ...]``."""
        if not self.weights.gated:
            return None, rows
        if self.weights.interleaved:
            return rows[0::2], rows[1::2]
        gate, up = rows.chunk(2)
        return gate, up


def _copy(rows: Tensor) -> Tensor:
    """Its own memory: what is read may be a view of a file that goes away."""
    return rows.detach().float().clone(memory_format=torch.contiguous_format)


def pack(experts: Sequence[Expert], like: ExpertWeights) -> dict[str, Tensor]:
    """Experts of one width as transformers' fused tensors, in the layout and dtype of `like`: name -> ``[E', ...]``.

    Raises:
        PlanError: the experts differ in width.
        UnsupportedFamilyError: `like` has biases and the experts do not, or the other way round.
    """
    widths = {one.width for one in experts}
    if len(widths) != 1:
        raise PlanError(f"experts of widths {sorted(widths)} do not fit into one tensor")
    if (like.up_bias is None) != (experts[0].up_bias is None):
        raise UnsupportedFamilyError("some experts have biases and others have none")
    prefix = "gate_up_proj" if like.gated else "up_proj"
    found = {prefix: [_up(one, like) for one in experts], "down_proj": [_turned(one.down, like) for one in experts]}
    if like.up_bias is not None:
        found[f"{prefix}_bias"] = [_joined(one.gate_bias, one.up_bias, like) for one in experts]
    if like.down_bias is not None:
        found["down_proj_bias"] = [one.down_bias for one in experts]  # type: ignore[misc]
    return {name: torch.stack([one.to(like.up.dtype) for one in rows]) for name, rows in found.items()}


def _up(expert: Expert, like: ExpertWeights) -> Tensor:
    return _turned(_joined(expert.gate, expert.up, like), like)


def _turned(matrix: Tensor, like: ExpertWeights) -> Tensor:
    return matrix.T if like.transposed else matrix


def _joined(gate: Tensor | None, up: Tensor | None, like: ExpertWeights) -> Tensor:
    """Rows of gate and up as the layout has them."""
    assert up is not None
    if gate is None:
        return up
    if like.interleaved:
        return torch.stack([gate, up], 1).flatten(0, 1)
    return torch.cat([gate, up])
