"""Our own `collegium.layer.MoE`: ``experts(x [T, d], routing)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from collegium.layer import MoE
from collegium.routing import Routing
from collegium.sites.adapters.base import Adapter, Call, Handle
from collegium.sites.names import Names, parameter_names, saved_names

if TYPE_CHECKING:
    from collegium.sites.site import Site

__all__ = ["Own"]


class Own(Adapter):
    """The experts are told what a tap returns; the layer's balance losses still see the gate's own decision."""

    def matches(self, block: nn.Module, gate: nn.Module, experts: nn.Module) -> bool:
        return isinstance(block, MoE)

    def num_experts(self, experts: Any) -> int:
        return experts.num_experts

    def top_k(self, block: Any, gate: Any, config: Any) -> int:
        return gate.top_k

    def score(self, gate: Any) -> str | None:
        return type(gate.score).__name__.lower()

    def gates(self, block: Any, gate: nn.Module) -> tuple[nn.Module, ...]:
        return block.gates

    def prepare(self, site: Site, logits: bool) -> list[Handle]:
        return [_KeepLogits(gate) for gate in site.gates] if logits else []

    def logits(self, gate_output: Any) -> Tensor:
        return gate_output.logits

    def read(self, site: Site, call: Call, gate_output: Any, logits: Tensor | None) -> tuple[Tensor, Routing]:
        x, routing = call[:2]
        return x, routing

    def write(self, site: Site, call: Call, gate_output: Any, before: Routing, after: Routing) -> Any:
        return (call[0], after, *call[2:])

    def names(self, model: nn.Module, path: str, experts: nn.Module) -> Names:
        # experts wrapped from a transformers model keep its layout flags, and are saved as it saves them
        return saved_names(model, path) if hasattr(experts, "is_concatenated") else parameter_names(path, experts)


class _KeepLogits:
    """Switches ``gate.keep_logits`` on until removed."""

    def __init__(self, gate: Any) -> None:
        self.gate, self.before = gate, gate.keep_logits
        gate.keep_logits = True

    def remove(self) -> None:
        self.gate.keep_logits = self.before
