"""Expert-router coupling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from collegium.catalog import method
from collegium.systems.base import Layer, System

__all__ = ["ERC"]


@method("erc", kind="system", paper="Expert-Router Coupling (2025)", arxiv="2512.23447")
@dataclass(frozen=True)
class ERC(System):
    """Softmax top-k with a loss that couples each router row to its own expert, whatever the number of tokens costs.

    Attributes:
        coefficient, alpha: see `ExpertRouterCoupling`.
        load_balancing: coefficient of the loss beside it.
    """

    coefficient: float = 1.0
    alpha: float = 1.0
    load_balancing: float = 0.01

    def settings(self, layer: Layer) -> dict[str, Any]:
        losses = [{"expert_router_coupling": {"coefficient": self.coefficient, "alpha": self.alpha}}]
        return {
            "router": {"weigh": {"normalise": True}},
            "balance": {"load_balancing": self.load_balancing, "losses": losses},
        }
