"""Switch Transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from collegium.catalog import method
from collegium.systems.base import Layer, System

__all__ = ["Switch"]


@method("switch", kind="system", paper="Switch Transformers (2021)", arxiv="2101.03961")
@dataclass(frozen=True)
class Switch(System):
    """One expert a token, K times as wide and 1 / K as many as in the plain layer, with a limited number of places in
    the order of the batch; who finds none passes by.

    Formula:
        p = softmax(W x) over E / K experts of width K f;  y = p_e expert_e(x) of the likeliest
        places of an expert in training = ceil(capacity_factor T / (E / K))
        loss = c E/K sum_e f_e P_e,  f before anyone is dropped

    Cost:
        that of the plain layer, with 1 / K of the rows to dispatch and of the router.

    Use it:
        where moving tokens costs more than computing: one expert a token is the least there is.

    Not:
        where combinations of experts are wanted; and K must divide E.

    Attributes:
        capacity_factor: places in training, as a multiple of an even share; at inference nobody is dropped.
        load_balancing: c, coefficient of the loss.
    """

    capacity_factor: float = 1.25
    load_balancing: float = 0.01

    def settings(self, layer: Layer) -> dict[str, Any]:
        return {
            **layer.joined("switch"),
            "router": {
                "weigh": {"normalise": False},
                "capacity": {"position": {"capacity_factor": self.capacity_factor}},
            },
            "balance": {"load_balancing": self.load_balancing},
        }
