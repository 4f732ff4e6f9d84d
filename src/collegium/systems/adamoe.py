"""AdaMoE: null experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.systems.base import Layer, System

__all__ = ["AdaMoE"]


@method("adamoe", kind="system", paper="AdaMoE (2024)", arxiv="2406.13233")
@dataclass(frozen=True)
class AdaMoE(System):
    """Null experts that compute nothing, and more slots for a token, so that its number of true experts follows the
    token: ``K * E / (E + null)`` on average. Weights add up to 1 over the true ones.

    Attributes:
        null: m null experts; None is E, which doubles the slots.
        load_balancing: coefficient of the loss in which null experts count as one kind.
    """

    null: int | None = None
    load_balancing: float = 0.01

    def settings(self, layer: Layer) -> dict[str, Any]:
        E, K = layer.num_experts, layer.num_experts_per_tok
        null = E if self.null is None else self.null
        if null < 1:
            raise ConfigError(f"adamoe: null is {null}; it takes at least one null expert")
        return {
            "num_experts_per_tok": round(K * (E + null) / E),
            "zero_experts": ["zero"] * null,
            "router": {"weigh": {"renormalised_except": {"last": null}}},
            "balance": {
                "load_balancing": 0.0,
                "losses": [{"class_balance": {"coefficient": self.load_balancing, "merge": True}}],
            },
        }
