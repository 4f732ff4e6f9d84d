"""`Experts`: the routed experts of one layer as a torch module, with transformers' parameter names and layout.

Legend: T tokens, E experts, d model width, f expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.experts.activations import name_of
from collegium.experts.compute import compute
from collegium.experts.weights import ExpertWeights
from collegium.routing.record import Routing

__all__ = ["Experts"]


@method("feed_forward", kind="expert", paper="GLU Variants Improve Transformer (2020)", arxiv="2002.05202")
class Experts(nn.Module):
    """E feed-forward experts: ``down(act(gate x) * up x)`` when gated, else ``down(act(up x))``.

    Parameters (names and layout are those of transformers): ``gate_up_proj [E, 2f, d]``, gate first, or
    ``up_proj [E, f, d]`` without a gate; ``down_proj [E, d, f]``; with `bias` also ``gate_up_proj_bias [E, 2f]`` (or
    ``up_proj_bias [E, f]``) and ``down_proj_bias [E, d]``.

    Args:
        hidden_size: d.
        intermediate_size: f, of each expert.
        num_experts: E.
        hidden_act: a name from transformers' ``ACT2FN``.
        gated: whether a gate multiplies the up projection.
        bias: whether both projections have one.

    Attributes:
        compute: name of the back end, "auto" for the fastest one; see `collegium.experts.compute.choose`.

    Raises:
        ConfigError: a size is not positive, or the activation is unknown.
    """

    down_proj: nn.Parameter

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
        if min(hidden_size, intermediate_size, num_experts) < 1:
            raise ConfigError(
                f"hidden_size={hidden_size}, intermediate_size={intermediate_size} and num_experts={num_experts} "
                "must be at least 1"
            )
        if hidden_act not in ACT2FN:
            raise ConfigError(f"unknown hidden_act {hidden_act!r}; transformers knows {', '.join(sorted(ACT2FN))}")
        self.hidden_size, self.intermediate_size, self.num_experts = hidden_size, intermediate_size, num_experts
        self.gated, self.compute = gated, "auto"
        self.act_fn = ACT2FN[hidden_act]
        self._up = "gate_up_proj" if gated else "up_proj"
        u = 2 * intermediate_size if gated else intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            self._up: (num_experts, u, hidden_size),
            "down_proj": (num_experts, hidden_size, intermediate_size),
        }
        if bias:
            shapes |= {f"{self._up}_bias": (num_experts, u), "down_proj_bias": (num_experts, hidden_size)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the matrices from a normal distribution with standard deviation `std`; biases become 0."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                parameter.zero_()
            else:
                parameter.normal_(std=std)

    def activation(self, hidden: Tensor) -> Tensor:
        """``[..., u] -> [..., f]``: the gate product, or the activation of experts without a gate."""
        if not self.gated:
            return self.act_fn(hidden)
        gate, up = hidden.chunk(2, -1)
        return self.act_fn(gate) * up

    @property
    def weights(self) -> ExpertWeights:
        """The parameters and their layout, for back ends."""
        return ExpertWeights(
            up=getattr(self, self._up),
            down=self.down_proj,
            activation=self.activation,
            up_bias=getattr(self, f"{self._up}_bias", None),
            down_bias=getattr(self, "down_proj_bias", None),
            gated=self.gated,
            fused_activation=name_of(self.act_fn),
        )

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """``[T, d]``: the weighted sum of each token's experts; see `collegium.experts.compute.compute`."""
        return compute(x, routing, self.weights, self.compute)

    def extra_repr(self) -> str:
        """The sizes, for ``print(model)``."""
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"num_experts={self.num_experts}, gated={self.gated}"
        )
