"""Which assignments an expert has room for."""

from __future__ import annotations

from collegium.routing.capacity.two_class import TwoClassCapacity
from collegium.routing.capacity.uniform import PositionCapacity, PriorityCapacity, RandomCapacity

__all__ = ["PositionCapacity", "PriorityCapacity", "RandomCapacity", "TwoClassCapacity"]
