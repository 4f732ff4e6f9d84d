"""GShard, and its places by chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from collegium.catalog import method
from collegium.systems.base import Layer, System

__all__ = ["GShard", "RandomTokenSelection"]


@dataclass(frozen=True)
class _Limited(System):
    """Attributes:
    capacity_factor: places in training, as a multiple of an even share; at inference nobody is dropped.
    load_balancing: c, coefficient of the loss.
    """

    capacity_factor: float = 1.25
    load_balancing: float = 0.01

    def _settings(self, capacity: Literal["position", "random"]) -> dict[str, Any]:
        return {
            "router": {
                "weigh": {"normalise": True},
                "capacity": {capacity: {"capacity_factor": self.capacity_factor}},
            },
            "balance": {"load_balancing": self.load_balancing},
        }


@method("gshard", kind="system", paper="GShard (2020)", arxiv="2006.16668")
@dataclass(frozen=True)
class GShard(_Limited):
    """Top-k with a limited number of places: first choices before second ones, earlier tokens of the batch first.

    Formula:
        p = softmax(W x), top-K of p;  w_e = p_e / sum of p over the chosen,
          those without a place included
        places of an expert in training = ceil(capacity_factor T K / E),
          in the order of choice, then of the batch
        loss = c E sum_e f_e P_e,  f before anyone is dropped

    Cost:
        no parameters. Tokens that find no place are not computed, so an expert never has more than its places.

    Use it:
        where buffers of experts must have a fixed size, or as the baseline that most papers mean.

    Not:
        where experts take any number of tokens, as ours do: a limit then only loses some, late sequences of a batch
        first.

    Attributes:
        capacity_factor: places in training, as a multiple of an even share; at inference nobody is dropped.
        load_balancing: c, coefficient of the loss.
    """

    def settings(self, layer: Layer) -> dict[str, Any]:
        return self._settings("position")


@method("random_token_selection", kind="system", arxiv="2109.10465",
        paper="Scalable and Efficient MoE Training for Multitask Multilingual Models (2021)")  # fmt: skip
@dataclass(frozen=True)
class RandomTokenSelection(_Limited):
    """Top-k with a limited number of places that go by chance, so that late tokens are not always those that are
    dropped (Z-code M3).

    Formula:
        p = softmax(W x), top-K of p;  w_e = p_e / sum of p over the chosen,
          those without a place included
        places of an expert in training = ceil(capacity_factor T K / E), in a random order
        loss = c E sum_e f_e P_e,  f before anyone is dropped

    Cost:
        that of `gshard` and one random order of the assignments a layer.

    Use it:
        in place of `gshard` where the end of a batch or sequence matters as much as its beginning.

    Not:
        where second choices should give way to first ones: chance does not tell them apart.

    Attributes:
        capacity_factor: places in training, as a multiple of an even share; at inference nobody is dropped.
        load_balancing: c, coefficient of the loss.
    """

    def settings(self, layer: Layer) -> dict[str, Any]:
        return self._settings("random")
