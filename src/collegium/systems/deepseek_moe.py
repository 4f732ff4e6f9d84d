"""DeepSeekMoE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.systems.base import Layer, System

__all__ = ["DeepSeekMoE"]


@method("deepseek_moe", kind="system", paper="DeepSeekMoE (2024)", arxiv="2401.06066")
@dataclass(frozen=True)
class DeepSeekMoE(System):
    """Every expert cut into finer ones, of which some see every token; as many parameters and as much computation as
    before. Softmax weights are not renormalised.

    Formula:
        m E - S routed experts of width f / m, of which a token has m K - S, and S shared ones
        p = softmax(W x)
        y = sum of p_e expert_e(x) over the top m K - S of p  +  sum_s shared_s(x)
        loss = c1 E' sum_e f_e P_e + c2 E' sum_e f'_e P_e,  E' = m E - S
          f'_e the mean of f over the experts of e's device

    Cost:
        a router with about m times as many rows, and m times as many rows to dispatch, each to a product 1 / m as
        large.

    Use it:
        where many combinations of small experts pay, as in DeepSeek's models.

    Not:
        where a step has few tokens for each expert: small products leave a processor idle.

    Attributes:
        segments: m, what an expert is cut into; divides f.
        shared: S, always-on experts.
        expert_balance, device_balance: c1 between experts and c2 between devices (0.003 and 0.05 in the largest model).
        devices: groups of neighbouring experts that lie together; with a loss between them it divides ``m E - S``.
    """

    segments: int = 4
    shared: int = 1
    expert_balance: float = 0.01
    device_balance: float = 0.0
    devices: int = 1

    def settings(self, layer: Layer) -> dict[str, Any]:
        m, S = self.segments, self.shared
        E, K = m * layer.num_experts - S, m * layer.num_experts_per_tok - S
        if m < 1 or S < 0 or layer.moe_intermediate_size % m or K < 1:
            raise ConfigError(
                f"deepseek_moe: {layer.num_experts} experts of width {layer.moe_intermediate_size} cannot be cut into "
                f"{m} each with {S} shared ones; the width must be a multiple of {m}, and a token needs a routed expert"
            )
        losses = []
        if self.device_balance:
            losses.append({"device_balance": {"coefficient": self.device_balance, "groups": self.devices}})
        return {
            "num_experts": E,
            "num_experts_per_tok": K,
            "moe_intermediate_size": layer.moe_intermediate_size // m,
            "n_shared_experts": S,
            "router": {"weigh": {"normalise": False}},
            "balance": {"load_balancing": self.expert_balance, "losses": losses},
        }
