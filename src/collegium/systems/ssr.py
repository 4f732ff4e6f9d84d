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
    loss. Use it where a loss should not pull at the task's gradient; not at inference, where it is plain top-k.

    Attributes:
        probability, xi, cost, noise: see `SelectiveSinkhorn`.
    """

    probability: float = 0.01
    xi: float = 0.05
    cost: Literal["probs", "logits"] = "probs"
    noise: float = 0.0

    def settings(self, layer: Layer) -> dict[str, Any]:
        router = {"transforms": [{"selective_sinkhorn": asdict(self)}], "weigh": {"normalise": True}}
        return {"router": router, "balance": {"load_balancing": 0.0}}
