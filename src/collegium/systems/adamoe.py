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
    token. Weights add up to 1 over the true ones.

    Formula:
        K' = round(K (E + m) / E) slots of a token, m null experts
        p = softmax(W x) over E + m experts, top-K' of p
        w_e = p_e / sum of p over the chosen true experts;  a null expert adds nothing
        loss = c (E + m) sum_e f_e P_e, where f_e of a null expert is the mean over all of them

    Cost:
        m rows more in the router. A token has K true experts on average where loads are even, as in the plain layer;
        one that takes null experts has fewer.

    Use it:
        where easy tokens should cost less than hard ones; m and the slots set how much computation there is to move
        between them.

    Not:
        where every token has to take the same time, or in a trained model without care: new rows of the router take
        probability from its experts at once. A token that chooses null experts only gets nothing from the layer.

    Attributes:
        null: m null experts; None is E, which doubles the slots.
        load_balancing: c, coefficient of the loss in which null experts count as one kind.
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
