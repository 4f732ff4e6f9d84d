"""What all capacities share: who is first in the queue of an expert, and how long the queue may be.

Legend: A assignments, T tokens, E experts, C places of an expert.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from collegium.errors import ConfigError
from collegium.routing.parts import Capacity, Part
from collegium.routing.record import Routing, RoutingContext

__all__ = ["LimitedCapacity", "first_come"]


def first_come(expert: Tensor, order: Tensor, room: Tensor) -> Tensor:
    """Which assignments get a place.

    Args:
        expert: ``[A]`` of each assignment.
        order: ``[A]`` permutation: the assignments in the order in which they are served.
        room: ``[E]`` places of each expert.

    Returns:
        ``[A]`` bool.
    """
    served = expert[order]
    by_expert = served.argsort(stable=True)
    counts = torch.bincount(served, minlength=len(room))
    first = counts.cumsum(0) - counts
    place = torch.empty_like(served)
    place[by_expert] = torch.arange(len(served), device=served.device) - first[served[by_expert]]
    kept = torch.empty(len(served), dtype=torch.bool, device=served.device)
    kept[order] = place < room[served]
    return kept


@dataclass(frozen=True)
class LimitedCapacity(Capacity):
    """Of all capacities with a factor.

    Attributes:
        capacity_factor: places in training, as a multiple of an even share.
        eval_capacity_factor: the same at inference; None drops nothing there, so that a token does not depend on its
            neighbours.
    """

    capacity_factor: float = 1.25
    eval_capacity_factor: float | None = None

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Where nothing is dropped at inference."""
        return self.eval_capacity_factor is None

    @property
    def batch_invariant(self) -> bool:  # type: ignore[override]
        """Where nothing is dropped at inference."""
        return self.eval_capacity_factor is None

    def check(self, num_experts: int, top_k: int, parts: tuple[Part, ...]) -> None:
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be above 0, not {value}: an expert without a place computes nothing")

    def __call__(self, routing: Routing, context: RoutingContext) -> Tensor | None:
        factor = self.capacity_factor if context.training else self.eval_capacity_factor
        if factor is None:
            return None
        live = torch.ones_like(routing.expert, dtype=torch.bool)
        if routing.valid is not None:  # padding takes nobody's place
            live = routing.valid[routing.token]
        order = self.order(routing, context)
        order = order[live[order]]
        kept = torch.zeros_like(live)
        alive = live.nonzero().squeeze(1)
        position = torch.empty_like(routing.expert)
        position[alive] = torch.arange(len(alive), device=alive.device)
        room = self.room(routing, factor, len(alive))
        kept[alive] = first_come(routing.expert[alive], position[order], room)
        return kept

    def room(self, routing: Routing, factor: float, assignments: int) -> Tensor:
        """``[E]`` int64 places; an even share is ``assignments / E``."""
        E = routing.num_experts
        places = math.ceil(factor * assignments / E)
        return torch.full((E,), places, dtype=torch.int64, device=routing.expert.device)

    @abstractmethod
    def order(self, routing: Routing, context: RoutingContext) -> Tensor:
        """``[A]`` permutation: the assignments in the order in which they are served."""


def choice_rank(routing: Routing) -> Tensor:
    """``[A]`` int64: 0 for a token's first choice, 1 for its second, ..."""
    if routing.slots is not None:
        return torch.arange(routing.slots, device=routing.expert.device).repeat(routing.num_tokens)
    counts = torch.bincount(routing.token, minlength=routing.num_tokens)
    first = counts.cumsum(0) - counts
    return torch.arange(len(routing.token), device=routing.token.device) - first[routing.token]
