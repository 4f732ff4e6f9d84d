"""Switch Transformers: top-1 with a capacity; ``experts(x [T, d], one-hot [T, 1, E], weight [T, 1])``.

A token over its expert's capacity has an all-zero row: the block gives zero for it. Capacity is counted per sequence,
and before transformers 5.18 not at all: no token is dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from collegium.routing import Routing
from collegium.sites.adapters.base import Adapter, Call
from collegium.sites.names import Names, module_names

if TYPE_CHECKING:
    from collegium.sites.site import Site

__all__ = ["Switch"]


class Switch(Adapter):
    """Hooked at the experts call; what a dropped token wanted is read from the gate's probabilities.

    A dropped assignment is in the record with ``kept`` False and the weight the gate gave it.
    """

    needs_gate: ClassVar[bool] = True

    def matches(self, block: nn.Module, gate: nn.Module, experts: nn.Module) -> bool:
        return isinstance(experts, nn.ModuleDict) and hasattr(gate, "classifier") and hasattr(gate, "jitter_noise")

    def num_experts(self, experts: Any) -> int:
        return experts.num_experts

    def top_k(self, block: Any, gate: Any, config: Any) -> int:
        return 1

    def logits_module(self, site: Site) -> nn.Module | None:
        # in the place of logits the gate gives its largest probabilities before transformers 5.18
        return site.gate.get_submodule("classifier")

    def read(self, site: Site, call: Call, gate_output: Any, logits: Tensor | None) -> tuple[Tensor, Routing]:
        x, chosen_T1E, weight_T1 = call[:3]
        chosen_TE = chosen_T1E[:, 0].bool()
        kept = chosen_TE.any(-1)
        assert logits is not None
        gate: Any = site.gate
        # the gate's own expression, rounding included; the noise of training is in the logits already
        wanted = F.softmax(logits, dim=-1, dtype=gate.dtype).to(weight_T1.dtype).argmax(-1)
        expert = wanted.where(~kept, chosen_TE.int().argmax(-1))
        everyone = bool(kept.all())
        routing = Routing(
            expert, weight_T1[:, 0], x.shape[0], site.num_experts, slots=1, kept=None if everyone else kept
        )
        return x, routing

    def write(self, site: Site, call: Call, gate_output: Any, before: Routing, after: Routing) -> Any:
        x, chosen, weight = call[:3]
        new_index, new_weight = after.to_topk()
        new_chosen = F.one_hot(new_index, site.num_experts + 1)[..., :-1]
        return (x, new_chosen.to(chosen.dtype), new_weight.to(weight.dtype), *call[3:])

    def names(self, model: nn.Module, path: str, experts: nn.Module) -> Names:
        return module_names(path, experts)
