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
    """Softmax top-k with a loss that couples each router row to its own expert, whose cost does not depend on the
    number of tokens.

    Formula:
        p = softmax(W x), top-K of p;  w_e = p_e / sum of p over the chosen
        M_ij = |G_j (r_i * noise_i)|, r_i row i of W, G_j the gate matrix of expert j
        loss = b / E^2 sum_{i != j} (max(M_ij - alpha M_ii, 0) + max(M_ji - alpha M_ii, 0))
          + c E sum_e f_e P_e

    Cost:
        ``E^2 d f`` multiplications a layer and micro-batch, what E tokens take in the gate matrices of all experts;
        nothing at inference.

    Use it:
        where routers should learn what their experts can do, in training with many tokens a micro-batch.

    Not:
        with very many experts or tiny micro-batches, where the loss costs more than the tokens do.

    Attributes:
        coefficient: b, of the coupling.
        alpha: the smaller, the more an expert must prefer its own row; the paper takes 1 for 64 experts, 0.5 for 256.
        load_balancing: c, coefficient of the loss between experts.
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
