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

    Formula:
        p = softmax(W x), top-K of p;  w_e = p_e / sum of p over the chosen
        loss = c E sum_e f_e P_e,
          f over all tokens of the optimizer step so far, P over those of the micro-batch

    Cost:
        one sum of ``E + 1`` integers a layer and micro-batch over the processes, of all layers in one message.

    Use it:
        where a batch holds several domains: experts may then specialise in one as long as the whole is even.

    Not:
        where each device must be loaded evenly in each micro-batch, which a narrower scope asks for and this does not.

    Attributes:
        load_balancing: c, coefficient of the loss.
        scope: of the counts: "global", or what it is compared with.
    """

    load_balancing: float = 0.01
    scope: Literal["sequence", "micro_batch", "global"] = "global"

    def settings(self, layer: Layer) -> dict[str, Any]:
        return {
            "router": {"weigh": {"normalise": True}},
            "balance": {"load_balancing": self.load_balancing, "scope": self.scope},
        }
