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
    """Every expert cut into `segments` finer ones, of which `shared` see every token; as many parameters and as much
    computation as before: ``segments * E - shared`` routed experts of width ``f / segments``, of which
    ``segments * K - shared``. Softmax weights are not renormalised.

    Attributes:
        segments: m, what an expert is cut into.
        shared: S, always-on experts.
        expert_balance, device_balance: coefficients of the losses between experts and between devices (0.003 and 0.05
            in the largest model).
        devices: groups of experts that lie together; 1 has no loss between them.
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
