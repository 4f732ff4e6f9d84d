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

    Formula:
        z = W x + G z of the previous MoE layer,
          over E experts that compute and Z = constants + 2 that do not
        p = softmax(z), top-K of p;  w_e = p_e / sum of p over the chosen but the zero expert,
          whose weight is 0
        places in training: ceil(gamma tau T K / (tau E + Z)) where an expert computes,
          ceil(gamma T K / (tau E + Z)) where not
        loss = c (E + Z) sum_e eta_e f_e P_e,  eta = 1 where an expert computes, tau where not

    Cost:
        ``Z d`` parameters of the router, ``(E + Z)^2`` of G and ``3 d`` of each constant expert; less computation than
        the plain layer, since a slot that goes to one of the Z costs next to nothing.

    Use it:
        where many tokens are easy, and time of experts is what a step takes.

    Not:
        where layers differ in their number of experts, which G refuses; or where a layer's logits do not reach the next
        one, as between stages of a pipeline.

    Attributes:
        constants: constant experts; one copy and one zero expert come with them.
        tau: the smaller, the more tokens go to experts that cost nothing.
        gamma: capacity factor in training; at inference nobody is dropped.
        load_balancing: c, coefficient of the loss, in which zero-computation experts count `tau`.
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
