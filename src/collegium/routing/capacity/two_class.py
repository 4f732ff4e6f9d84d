"""Fewer places where an expert costs something, more where it does not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.routing.capacity.uniform import PositionCapacity
from collegium.routing.parts import Part
from collegium.routing.record import Routing

__all__ = ["TwoClassCapacity"]


@method("two_class", kind="capacity", paper="MoE++ (2024)", arxiv="2410.07348")
@dataclass(frozen=True)
class TwoClassCapacity(PositionCapacity):
    """`PositionCapacity` with fewer places where an expert computes, and more where it does not.

    Formula:
        places of each of E_F experts that compute = ceil(gamma tau A / (tau E_F + E_Z)),
          gamma = capacity_factor
        places of each of E_Z zero-computation ones = ceil(gamma A / (tau E_F + E_Z))

    Cost:
        as `PositionCapacity`.

    Use it:
        with zero-computation experts, together with `ClassBalance` of the same `tau`.

    Not:
        without them: it is `PositionCapacity` then.

    Attributes:
        tau: the smaller, the more tokens go to zero-computation experts.
    """

    symmetric = False
    capacity_factor: float = 1.1
    tau: float = 0.75

    def check(self, num_experts: int, top_k: int, parts: tuple[Part, ...]) -> None:
        super().check(num_experts, top_k, parts)
        if not 0 < self.tau < math.inf:
            raise ConfigError(f"tau must be above 0 and finite, not {self.tau}")

    def room(self, routing: Routing, factor: float, assignments: int) -> Tensor:
        E, F = routing.num_experts, routing.num_true or routing.num_experts
        each = factor * assignments / (self.tau * F + E - F)
        room = torch.full((E,), math.ceil(each), dtype=torch.int64, device=routing.expert.device)
        room[:F] = math.ceil(self.tau * each)
        return room
