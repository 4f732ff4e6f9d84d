"""Cache policies: one class each, driven by the simulator over a trace and by the engine over live tokens."""

from __future__ import annotations

from collegium.offload.policies.base import CachePolicy, PolicySettings, Use
from collegium.offload.policies.find import find_policy

__all__ = ["CachePolicy", "PolicySettings", "Use", "find_policy"]
