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

    The routers of the later iterations are parameters more, ``(C - 1) * E * d`` of them; shared experts, where there
    are some, run in every iteration.

    Attributes:
        iterations: C; divides K.
        inner_residual: an iteration's input is added to its output; without it the paper finds no gain.
        load_balancing: coefficient of the loss within sequences, of each iteration.
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
