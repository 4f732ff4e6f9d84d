"""All families behind transformers' experts interface: ``experts(x [T, d], index [T, K], weight [T, K])``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from collegium.routing import Routing
from collegium.sites.adapters.base import Adapter, Call, flat
from collegium.sites.families import logits_module
from collegium.sites.names import Names, saved_names

if TYPE_CHECKING:
    from collegium.sites.site import Site

__all__ = ["Seam", "slots"]


class Seam(Adapter):
    """Hooked at the experts call, so whatever a family does between gate and experts is seen, and any
    experts implementation gets what a tap returns."""

    def matches(self, block: nn.Module, gate: nn.Module, experts: nn.Module) -> bool:
        # the decorator's flags; 3-D parameters alone are not enough, some families have those and another forward
        return hasattr(experts, "is_transposed") and hasattr(experts, "has_gate") and hasattr(experts, "down_proj")

    def num_experts(self, experts: Any) -> int:
        # not experts.num_experts: that is the local number under expert parallelism, while ids here are global
        return experts.down_proj.shape[0]

    def top_k(self, block: Any, gate: Any, config: Any) -> int:
        # where the gate only computes logits, the block chooses
        owner = next((owner for owner in (gate, block) if hasattr(owner, "top_k")), None)
        return config.top_k_experts if owner is None else owner.top_k

    def logits_module(self, site: Site) -> nn.Module | None:
        path = logits_module(site.family)
        return site.gate.get_submodule(path) if path else None

    def logits(self, gate_output: Any) -> Tensor:
        if isinstance(gate_output, Tensor):
            return gate_output
        # first in all families, but last in GraniteMoE before transformers 5.21
        return gate_output[0 if gate_output[0].is_floating_point() else -1]

    def read(self, site: Site, call: Call, gate_output: Any, logits: Tensor | None) -> tuple[Tensor, Routing]:
        x, index, weight = call[:3]
        if site.family == "zaya":
            # a token that chose ZAYA's skip expert arrives as expert 0 with weight exactly 0
            index = index.masked_fill(weight == 0, site.num_experts)
        return flat(x), Routing.from_topk(index, weight, site.num_experts)

    def write(self, site: Site, call: Call, gate_output: Any, before: Routing, after: Routing) -> Any:
        x, index, weight = call[:3]
        new_index, new_weight = slots(after, sentinel=_skips_sentinels(site.experts))
        return (x, new_index.to(index.dtype), new_weight.to(weight.dtype), *call[3:])

    def names(self, model: nn.Module, path: str, experts: nn.Module) -> Names:
        return saved_names(model, path)


def _skips_sentinels(experts: Any) -> bool:
    implementation = getattr(experts.config, "_experts_implementation", None)
    # transformers before 5.18 does not say
    return str(implementation).startswith("collegium") and not getattr(experts, "_is_expert_parallel", True)


def slots(routing: Routing, sentinel: bool) -> tuple[Tensor, Tensor]:
    """``[T, K]`` index and weight with at least one slot.

    Only our own compute leaves sentinel slots out; transformers' back ends would read past the last expert. For them an
    unused slot repeats the token's first expert (or expert 0 if it has none) with weight 0.
    """
    index, weight = routing.to_topk()
    if index.shape[1] == 0:
        index = index.new_full((routing.num_tokens, 1), routing.num_experts)
        weight = weight.new_zeros((routing.num_tokens, 1))
    if not sentinel:
        unused = index == routing.num_experts
        first = index[:, :1].masked_fill(unused[:, :1], 0)
        index = torch.where(unused, first, index)
    return index, weight
