"""Experts that compute next to nothing: they never enter dispatch, and their ids follow those of the others.

Legend: T tokens, A assignments, E experts that compute, Z zero-computation experts, d model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from collegium.catalog import get, method, methods
from collegium.errors import ConfigError
from collegium.routing.record import Routing

__all__ = ["ConstantExpert", "CopyExpert", "ZeroComputeExperts", "ZeroExpert"]


@method("zero", kind="zero_expert", paper="AdaMoE (2024)", arxiv="2406.13233")
class ZeroExpert(nn.Module):
    """Nothing: whoever chooses it computes less.

    Formula:
        expert(x) = 0

    Cost:
        a row of the router.

    Use it:
        with more slots than experts are needed, to let a token do with fewer (AdaMoE's null experts).

    Not:
        without a loss on its use: a router may learn to send everything there, or nothing.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor | None:
        """``[A, d]`` -> nothing to add."""
        return None


@method("copy", kind="zero_expert", paper="MoE++ (2024)", arxiv="2410.07348")
class CopyExpert(nn.Module):
    """The block passes its input on.

    Formula:
        expert(x) = x

    Cost:
        a row of the router.

    Use it:
        beside experts that compute, for tokens that need no change (MoE++).

    Not:
        in place of the residual around the layer, which is there anyway.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor | None:
        """``[A, d] -> [A, d]``."""
        return x


@method("constant", kind="zero_expert", paper="MoE++ (2024)", arxiv="2410.07348")
class ConstantExpert(nn.Module):
    """A learnt mix of the input and of a learnt vector.

    Formula:
        expert(x) = a1 x + a2 v,  [a1, a2] = softmax(W x),  W [2, d] and v [d] learnt

    Cost:
        ``3 d`` parameters and about ``4 d`` multiplications for a token, beside a row of the router.

    Use it:
        beside experts that compute, for tokens of which little is left to say (MoE++).

    Not:
        alone: it knows one direction.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, hidden_size))
        self.value = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw both; the constant from a standard normal distribution, as MoE++ does."""
        self.weight.normal_(std=std)
        self.value.normal_()

    def forward(self, x: Tensor) -> Tensor | None:
        """``[A, d] -> [A, d]``."""
        share = (x @ self.weight.T.to(x.dtype)).float().softmax(-1).to(x.dtype)
        return share[:, :1] * x + share[:, 1:] * self.value.to(x.dtype)


class ZeroComputeExperts(nn.ModuleList):
    """The Z zero-computation experts of a layer.

    Args:
        kinds: a catalogued name for each, in the order of their ids.
        hidden_size: d.

    Raises:
        ConfigError: there is no such kind.
    """

    def __init__(self, kinds: Sequence[str], hidden_size: int) -> None:
        known = [one.name for one in methods("zero_expert")]
        if unknown := [kind for kind in kinds if kind not in known]:
            raise ConfigError(f"no zero-computation expert is named {unknown[0]!r}; there are {', '.join(known)}")
        super().__init__([get("zero_expert", kind)(hidden_size) for kind in kinds])

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weights of those that have some."""
        for one in self:
            if isinstance(one, ConstantExpert):
                one.reset_parameters(std)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """What they add to each token: ``x [T, d] -> [T, d]``."""
        y = torch.zeros_like(x)
        first = routing.num_experts - len(self)
        live = routing.expert >= first
        if routing.kept is not None:
            live = live & routing.kept
        token, expert, weight = routing.token[live], routing.expert[live] - first, routing.weight[live]
        for number, one in enumerate(self):
            if isinstance(one, ZeroExpert):
                continue  # rows would be gathered for nothing
            mine = (expert == number).nonzero().squeeze(1)
            value = one(x[token[mine]])
            if value is not None:
                y.index_add_(0, token[mine], weight[mine, None].to(x.dtype) * value)
        return y
