"""Selective Sinkhorn Routing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from collegium.catalog import method
from collegium.systems.base import Layer, System

__all__ = ["SSR"]


@method("ssr", kind="system", paper="Selective Sinkhorn Routing (2025)", arxiv="2511.08972")
@dataclass(frozen=True)
class SSR(System):
    """A softmax router whose choice is a balanced transport plan in a small share of the training steps, and no balance
    loss.

    Formula:
        p = softmax(W x), top-K of p;  w_e = p_e / sum of p over the chosen
        in a share of the steps, in place of p and without gradient:
        plan = argmax <plan, p> + xi entropy(plan),  rows of sum 1, columns of sum T / E

    Cost:
        none in most steps; in the others up to 50 passes over ``[T, E]`` a layer. No parameters, nothing at inference.

    Use it:
        where a loss should not pull at the task's gradient, yet no expert should die.

    Not:
        where loads must be even: between the rare steps nothing balances them, and the plan evens out probability, not
        counts. Each process solves for its own tokens.

    Attributes:
        probability: of a step with a plan; each layer draws its own.
        xi: weight of the entropy; with costs from 0 to 1 it must be well below 1.
        cost: what the plan maximises: "probs" (SSR-S) or "logits" (SSR-L).
        noise: deviation of what is added to the logits in the other training steps; 0 is none.
    """

    probability: float = 0.01
    xi: float = 0.05
    cost: Literal["probs", "logits"] = "probs"
    noise: float = 0.0

    def settings(self, layer: Layer) -> dict[str, Any]:
        router = {"transforms": [{"selective_sinkhorn": asdict(self)}], "weigh": {"normalise": True}}
        return {"router": router, "balance": {"load_balancing": 0.0}}
