"""The load-balancing loss over the whole batch, or over less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from collegium.catalog import method
from collegium.systems.base import Layer, System

__all__ = ["GlobalBatch"]


@method("global_batch", kind="system", paper="Demons in the Detail (2025)", arxiv="2501.11873")
@dataclass(frozen=True)
class GlobalBatch(System):
    """Softmax top-k with a load-balancing loss whose counts are those of all processes and micro-batches: a narrower
    scope forbids experts of a domain.

    Attributes:
        load_balancing: coefficient.
        scope: "global", or what it is compared with.
    """

    load_balancing: float = 0.01
    scope: Literal["sequence", "micro_batch", "global"] = "global"

    def settings(self, layer: Layer) -> dict[str, Any]:
        return {
            "router": {"weigh": {"normalise": True}},
            "balance": {"load_balancing": self.load_balancing, "scope": self.scope},
        }
