"""Hit rates of all cache policies on traces of the demo model, beside the optimum that knows the future."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from collegium import catalog
from collegium.benchmarks._run_routing import TEXTS, demo_trace
from collegium.benchmarks.harness import Row
from collegium.offload.cost import CostModel
from collegium.offload.policies import find_policy
from collegium.offload.simulate import SimulationSettings, simulate
from collegium.offload.simulate_passes import Passes

__all__ = ["GOAL", "hit_rates"]

GOAL = 0.9
"""Share of the optimum's hit rate that the best policy reaches."""
_COST = CostModel(read_bandwidth=1e9, read_latency=0, memory_bandwidth=1e10, measured="made up: no times are asked for")


def hit_rates(tokens: int) -> Iterator[Row]:
    """A row for each policy, the best first, with room for two times the experts that one token needs.

    Args:
        tokens: of each text.
    """
    hits: dict[str, int] = {}
    requests = optimal = 0
    policies = {name: find_policy(name) for name in sorted(_policies())}
    for text in TEXTS:
        with tempfile.TemporaryDirectory() as scratch:
            trace = demo_trace(text, tokens, Path(scratch) / "trace", logits=True)
            passes = Passes(trace, "tokens", probabilities=True)
            capacity = 2 * sum(passes.geometry.top_k)
            for name, policy in policies.items():
                found = simulate(passes, SimulationSettings(policy, capacity, {16: 1}), _COST)
                hits[name] = hits.get(name, 0) + round(found.hit_rate * found.requests)
            requests += found.requests
            optimal += found.optimal_hits or 0
    limit = f"optimum {optimal / requests:.1%}"
    for rank, name in enumerate(sorted(hits, key=lambda name: -hits[name])):
        goal, rate = None if rank else GOAL, hits[name] / requests
        yield Row(
            f"hit rate, {name}", rate, optimal / requests, "optimum", goal, limit, hits[name] / optimal, unit="share"
        )


def _policies() -> set[str]:
    find_policy("lru")  # imports them all
    return {found.name for found in catalog.methods("cache")} - {"opt"}
