"""MoE++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from collegium.catalog import method
from collegium.systems.base import Layer, System

__all__ = ["MoEPlusPlus"]


@method("moe_plus_plus", kind="system", paper="MoE++ (2024)", arxiv="2410.07348")
@dataclass(frozen=True)
class MoEPlusPlus(System):
    """Constant, copy and zero experts beside those that compute, routers that see the previous layer's logits, and
    capacities and a loss that tell the two classes apart.

    Attributes:
        constants: constant experts; one copy and one zero expert come with them.
        tau: the smaller, the more tokens go to experts that cost nothing.
        gamma: capacity factor.
        load_balancing: coefficient of the loss, which counts zero-computation experts `tau`.
    """

    constants: int = 2
    tau: float = 0.75
    gamma: float = 1.1
    load_balancing: float = 0.01

    def settings(self, layer: Layer) -> dict[str, Any]:
        return {
            "zero_experts": [*["constant"] * self.constants, "copy", "zero"],
            "router": {
                "transforms": ["gating_residual"],
                "weigh": {"renormalised_except": {"last": 1}},
                "capacity": {"two_class": {"capacity_factor": self.gamma, "tau": self.tau}},
            },
            "balance": {
                "load_balancing": 0.0,
                "losses": [{"class_balance": {"coefficient": self.load_balancing, "tau": self.tau}}],
            },
        }
