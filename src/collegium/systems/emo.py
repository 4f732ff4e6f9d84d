"""EMO: emergent modularity by pools of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from collegium.catalog import method
from collegium.systems.base import Layer, System

__all__ = ["EMO"]


@method("emo", kind="system", paper="EMO (2026)", arxiv="2605.06663")
@dataclass(frozen=True)
class EMO(System):
    """Tokens of a document share a pool of experts in training, so that a few experts are enough for a domain later.
    The balance loss counts over the whole batch: a narrower one would work against the pools.

    Attributes:
        smallest, largest, eval_size: see `DocumentPool`.
        load_balancing, z_loss: coefficients.
    """

    smallest: int | None = None
    largest: int | None = None
    eval_size: int | None = None
    load_balancing: float = 0.1
    z_loss: float = 1e-3

    def settings(self, layer: Layer) -> dict[str, Any]:
        low = layer.num_experts_per_tok if self.smallest is None else self.smallest
        high = layer.num_experts if self.largest is None else self.largest
        pool = {"smallest": low, "largest": high, "eval_size": self.eval_size}
        return {
            "router": {"transforms": [{"document_pool": pool}], "weigh": {"normalise": False}},
            "balance": {"load_balancing": self.load_balancing, "scope": "global", "z_loss": self.z_loss},
        }
