"""Chain-of-Experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.systems.base import Layer, System

__all__ = ["ChainOfExperts"]


@method("chain_of_experts", kind="system", paper="Chain-of-Experts (2025)", arxiv="2506.18945")
@dataclass(frozen=True)
class ChainOfExperts(System):
    """The experts of a layer in sequence: C iterations with a router each and ``K / C`` experts of a token in each, as
    many in all as in the plain layer. Softmax weights are not renormalised.

    Formula:
        x^0 = x
        x^t = x^(t-1) + sum_e p^t_e expert_e(x^(t-1)) over the top K / C of p^t,  t = 1 ... C
        p^t = softmax(W^t x^(t-1))
        y = x^C
        loss = c E sum_e f_e P_e within each sequence, the mean over iterations

    Cost:
        ``(C - 1) * E * d`` parameters of routers more and the same computation of experts, but C dispatches that wait
        for each other. Shared experts, where there are some, run in every iteration.

    Use it:
        where a layer has many small experts and several active, so that C choices in a row reach more combinations than
        one.

    Not:
        where the time of a dispatch counts more than computation (one token at a time, experts spread over devices);
        nor with routers that average as the attention does or keep something of the past, which is refused.

    Attributes:
        iterations: C; divides K.
        inner_residual: an iteration's input is added to its output; without it the paper finds no gain.
        load_balancing: c, coefficient of the loss within sequences, of each iteration.
    """

    iterations: int = 2
    inner_residual: bool = True
    load_balancing: float = 1e-3

    def settings(self, layer: Layer) -> dict[str, Any]:
        C, K = self.iterations, layer.num_experts_per_tok
        if C < 1 or K % C:
            raise ConfigError(f"chain_of_experts: {K} experts of a token cannot be shared among {C} iterations evenly")
        return {
            "num_experts_per_tok": K // C,
            "iterations": C,
            "inner_residual": self.inner_residual,
            "router": {"weigh": {"normalise": False}},
            "balance": {"load_balancing": self.load_balancing, "scope": "sequence"},
        }
