"""The same number of places for every expert; members differ in who is served first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from collegium.catalog import method
from collegium.routing.capacity.room import LimitedCapacity, choice_rank
from collegium.routing.record import Routing, RoutingContext

__all__ = ["PositionCapacity", "PriorityCapacity", "RandomCapacity"]


@method("position", kind="capacity", paper="Switch Transformers (2021)", arxiv="2101.03961")
@method("gshard", kind="capacity", paper="GShard (2020)", arxiv="2006.16668")
@dataclass(frozen=True)
class PositionCapacity(LimitedCapacity):
    """First choices before second ones, and of these the earlier tokens of the batch first (Switch, GShard).

    Formula:
        places of an expert = ceil(capacity_factor A / E)
        served by rank of the choice, then position in the batch

    Cost:
        two sorts of the A assignments; in exchange no expert computes more than its places.

    Use it:
        where experts' buffers have a fixed size, or to repeat a paper that drops.

    Not:
        where late sequences matter as much as early ones, or a batch is small: they are dropped first. At inference a
        limit makes a token depend on its neighbours.
    """

    def order(self, routing: Routing, context: RoutingContext) -> Tensor:
        return choice_rank(routing).argsort(stable=True)


@method("random", kind="capacity", paper="Scalable and Efficient MoE Training for Multitask Multilingual Models (2021)",
        arxiv="2109.10465")  # fmt: skip
@dataclass(frozen=True)
class RandomCapacity(LimitedCapacity):
    """In a random order, so that late tokens are not always the ones that are dropped (random token selection of Z-code
    M3).

    Formula:
        places of an expert = ceil(capacity_factor A / E);  served in a random order

    Cost:
        a random order of the A assignments and a sort.

    Use it:
        in place of `PositionCapacity` where all of a batch matters alike.

    Not:
        at inference, where chance has no place, or where first choices should come first.
    """

    draws = True

    def order(self, routing: Routing, context: RoutingContext) -> Tensor:
        device = routing.expert.device
        return torch.randperm(len(routing.expert), generator=context.generator("capacity", device), device=device)


@method("priority", kind="capacity", paper="Scaling Vision with Sparse Mixture of Experts (2021)", arxiv="2106.05974")
@dataclass(frozen=True)
class PriorityCapacity(LimitedCapacity):
    """By the probability of each token's first choice, the surest tokens first (batch prioritised routing of V-MoE).

    Formula:
        places of an expert = ceil(capacity_factor A / E)
        served by rank of the choice, then largest max_e p_te

    Cost:
        three sorts of the A assignments.

    Use it:
        with a tight factor and tokens of unequal worth, such as patches of an image.

    Not:
        for text generated left to right with a limit at inference: a later token can take an earlier one's place.
    """

    def order(self, routing: Routing, context: RoutingContext) -> Tensor:
        assert routing.probs is not None
        surest = routing.probs.detach().amax(-1)[routing.token]
        by_token = surest.argsort(descending=True, stable=True)
        return by_token[choice_rank(routing)[by_token].argsort(stable=True)]
