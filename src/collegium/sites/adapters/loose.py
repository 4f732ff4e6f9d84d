"""`collegium.experts.loose.LooseExperts` in the place of a family's own experts: called the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from collegium.experts.loose import LooseExperts
from collegium.routing import Routing
from collegium.sites.adapters.base import Call
from collegium.sites.adapters.seam import Seam, slots
from collegium.sites.names import Names

if TYPE_CHECKING:
    from collegium.sites.site import Site

__all__ = ["Loose"]


class Loose(Seam):
    """The gate, and what is between it and the experts, is still the family's."""

    def matches(self, block: nn.Module, gate: nn.Module, experts: nn.Module) -> bool:
        return isinstance(experts, LooseExperts)

    def num_experts(self, experts: Any) -> int:
        return experts.num_experts

    def write(self, site: Site, call: Call, gate_output: Any, before: Routing, after: Routing) -> Any:
        x, index, weight = call[:3]
        new_index, new_weight = slots(after, sentinel=True)
        return (x, new_index.to(index.dtype), new_weight.to(weight.dtype), *call[3:])

    def names(self, model: nn.Module, path: str, experts: Any) -> Names:
        found = [
            {
                name.removesuffix(".weight").replace(".", "_"): f"{path}.{number}.{name}"
                for name in expert.state_dict(keep_vars=True)
            }
            for number, expert in enumerate(experts.experts)
        ]
        return found if experts.expert_map is None else [found[e] for e in experts.expert_map.tolist()]
