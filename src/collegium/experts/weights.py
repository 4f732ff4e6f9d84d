"""`ExpertWeights`: the parameters of all experts of one layer, with everything a back end must know about their layout.

Legend: E experts, f expert hidden width, d model width. ``u`` is 2f for gated experts (gate and up in one matrix) and
f for plain ones. Layouts are those of transformers, so a checkpoint moves both ways without renaming:

    up      [E, u, d]   (transposed: [E, d, u])     named gate_up_proj, or up_proj without a gate
    down    [E, d, f]   (transposed: [E, f, d])     named down_proj
    up_bias [E, u], down_bias [E, d], or None
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["ExpertWeights"]


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """Parameters and layout of one layer's experts.

    Attributes:
        up, down, up_bias, down_bias: see the module docstring.
        transposed: matrices are stored ``[in, out]`` instead of ``[out, in]``.
        gated: `up` holds gate and up.
        interleaved: gate and up rows alternate (``gate0, up0, gate1, ...``) instead of following one another.
        activation: ``[..., u] -> [..., f]``, differentiable: the gate product for gated experts, the plain
            activation for others. It is the truth for every back end.
        fused_activation: name of an activation the fused kernels know ("silu", "gelu", "relu", ...) when
            `activation` is exactly ``act(gate) * up`` (gated, not interleaved) or ``act(up)`` (plain) of it; None
            means only `activation` knows.
        post_norm: applied to each expert's output row ``[..., d] -> [..., d]`` before the combine weight, or None.
    """

    up: Tensor
    down: Tensor
    activation: Callable[[Tensor], Tensor]
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    transposed: bool = False
    gated: bool = True
    interleaved: bool = False
    fused_activation: str | None = None
    post_norm: Callable[[Tensor], Tensor] | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up.shape[0]

    @property
    def up_t(self) -> Tensor:
        """``[E, d, u]`` view of `up`, whatever the stored layout: ``x @ up_t[e]``."""
        return self.up if self.transposed else self.up.transpose(1, 2)

    @property
    def down_t(self) -> Tensor:
        """``[E, f, d]`` view of `down`, whatever the stored layout: ``h @ down_t[e]``."""
        return self.down if self.transposed else self.down.transpose(1, 2)
