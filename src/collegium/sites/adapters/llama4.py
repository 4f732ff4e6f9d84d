"""Llama-4: the gate returns dense scores, the block multiplies each expert's *input* by its score and runs them all.

The score of an expert that was not chosen is exactly 0, and an expert of input 0 gives 0, so the dense scores are the
whole decision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from collegium.routing import Routing
from collegium.sites.adapters.base import Adapter, Call, flat
from collegium.sites.names import Names, saved_names

if TYPE_CHECKING:
    from collegium.sites.site import Site

__all__ = ["Llama4"]


class Llama4(Adapter):
    """Hooked at the gate's output ``(scores [T, E], logits [T, E])``.

    An expert whose score underflows to exactly 0 computes nothing; the id of such a slot is arbitrary.
    """

    at: ClassVar[Literal["experts", "gate"]] = "gate"
    scales_input: ClassVar[bool] = True

    def matches(self, block: nn.Module, gate: nn.Module, experts: nn.Module) -> bool:
        fused = getattr(experts, "gate_up_proj", None) is not None and getattr(experts, "down_proj", None) is not None
        # its gate is the only one that is a Linear beside undecorated fused experts
        return fused and isinstance(gate, nn.Linear) and hasattr(gate, "top_k")

    def num_experts(self, experts: Any) -> int:
        return experts.down_proj.shape[0]

    def top_k(self, block: Any, gate: Any, config: Any) -> int:
        return gate.top_k

    def logits(self, gate_output: Any) -> Tensor:
        return gate_output[1]

    def read(self, site: Site, call: Call, gate_output: Any, logits: Tensor | None) -> tuple[Tensor, Routing]:
        weight, index = gate_output[0].topk(site.top_k, dim=-1)
        return flat(call[0]), Routing.from_topk(index, weight, site.num_experts)

    def write(self, site: Site, call: Call, gate_output: Any, before: Routing, after: Routing) -> Any:
        live = slice(None) if after.kept is None else after.kept
        place = (after.token[live], after.expert[live])
        scores = gate_output[0]
        fresh = scores.new_zeros(scores.shape).index_put(place, after.weight[live].to(scores.dtype))
        return (fresh, *gate_output[1:])

    def names(self, model: nn.Module, path: str, experts: nn.Module) -> Names:
        return saved_names(model, path)
