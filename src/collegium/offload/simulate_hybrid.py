"""`simulate_hybrid`: a trace on two processors, one with every expert at hand and one with a cache of them over a link.

It is `simulate` with the second processor's memory for the cache and the link for the disk, and with each layer's
experts divided first (`collegium.offload.schedule.divide`): only those that the fast processor computes are asked for.
Both compute at the same time, and the layer is done when both are. What lies between the layers takes what the cost
model says. There is no such machine here: the times are those that were given.

Legend: L layers, n distinct experts of a step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from collegium.errors import ConfigError
from collegium.files import atomic_file
from collegium.offload.cost import CostModel
from collegium.offload.geometry import Array
from collegium.offload.predictors.base import Prediction, Predictor
from collegium.offload.prefetch import impact_order
from collegium.offload.schedule import Processors, divide
from collegium.offload.schedule.hybrimoe import Hybrid
from collegium.offload.simulate import GateInputs, Progress, Run
from collegium.offload.simulate_passes import Passes, Step
from collegium.offload.simulate_pools import Part
from collegium.offload.simulation import Simulation, SimulationSettings

__all__ = ["HybridSimulation", "Planned", "save_plans", "simulate_hybrid"]


@dataclass(frozen=True)
class Planned:
    """What one layer of one pass was to do: ids of experts, in the order of each processor.

    Attributes:
        number, layer: of the pass, and of the layer, counted from 0.
        fast, moved, slow: what each processor computes, and what of the fast one's the link moves.
        makespan: seconds until both are done, if the link has nothing else to do and there are slots.
    """

    number: int
    layer: int
    fast: tuple[int, ...]
    moved: tuple[int, ...]
    slow: tuple[int, ...]
    makespan: float


@dataclass(frozen=True, eq=False)
class HybridSimulation(Simulation):
    """What happened on two processors. Requests, hits and bytes are those of the fast one, `stall` is its waiting, and
    `computing` is of both.

    Attributes:
        on: who computed.
        seconds: ``[L]`` from a layer's request until both were done with its experts.
        slow_experts: ``[L]`` experts that the slow one computed.
        plans: of every layer of every pass that asked for experts.
    """

    on: Processors
    seconds: Array
    slow_experts: Array
    plans: Sequence[Planned]

    @property
    def slow_share(self) -> float:
        """Share of the experts that the slow processor computed."""
        slow = int(self.slow_experts.sum())
        return slow / max(slow + self.requests, 1)

    def summary(self) -> dict[str, float | int | None]:
        """Totals, for a table row."""
        expert_ms = 1000 * float(self.seconds.sum()) / max(self.tokens, 1)
        return {**super().summary(), "slow_share": self.slow_share, "expert_ms_per_token": expert_ms}

    def record(self) -> dict[str, Any]:
        """Everything but the events and the plans as plain data, for JSON."""
        found = super().record()
        for at, layer in enumerate(found["layers"]):
            layer |= {"seconds": self.seconds[at].item(), "slow_experts": self.slow_experts[at].item()}
        return {**found, "on": self.on}


def simulate_hybrid(
    passes: Passes,
    settings: SimulationSettings,
    cost: CostModel,
    times: Hybrid,
    *,
    on: Processors = "both",
    predictor: Predictor | None = None,
    gate_inputs: GateInputs | None = None,
    progress: Progress | None = None,
) -> HybridSimulation:
    """Simulate passes on two processors.

    Args:
        passes: of a trace.
        settings: of the fast processor's memory; what is read ahead may go by "impact".
        cost: what lies between the layers' experts.
        times: of the processors and the link.
        on: which of them compute.
        predictor, gate_inputs, progress: as for `simulate`.

    Raises:
        ConfigError: the settings do not fit the trace, there are copies of several precisions or prefilled slots, or
            what the predictor needs was not given.
    """
    if settings.first_touch == "prefilled":
        raise ConfigError("a second processor computes what its memory lacks; simulate that from an empty memory")
    if predictor is not None and "gate_input" in predictor.needs and gate_inputs is None:
        raise ConfigError("this predictor reads the routers' inputs, which the trace does not hold for every token")
    if on == "slow":
        predictor = None  # there is nothing to move
    return _HybridRun(passes, settings, cost, times, on, predictor, gate_inputs).run(progress)


def _fast_alone(cost: CostModel, times: Hybrid, settings: SimulationSettings) -> CostModel:
    """The times of a machine whose only processor is the fast one and whose disk is the link; between the layers'
    experts it takes what `cost` says."""
    between = {"layer_seconds", "layer_token_seconds", "outside_seconds", "outside_token_seconds"}
    # two points make a line, which goes on
    points = tuple((rows, times.fast + times.fast_token * rows) for rows in (1, 2))
    return CostModel(
        read_latency=times.transfer,  # of an expert, whatever its bytes
        read_bandwidth=sys.float_info.max,
        memory_bandwidth=cost.memory_bandwidth,
        expert=dict.fromkeys(settings.expert_bytes, points),
        measured=cost.measured,
        **cost.model_dump(include=between),
    )


class _HybridRun(Run):
    def __init__(
        self,
        passes: Passes,
        settings: SimulationSettings,
        cost: CostModel,
        times: Hybrid,
        on: Processors,
        predictor: Predictor | None,
        gate_inputs: GateInputs | None,
    ) -> None:
        super().__init__(passes, settings, _fast_alone(cost, times, settings), predictor, gate_inputs)
        if len(self.pools) > 1 or not self.precision.constant:
            raise ConfigError("two processors are simulated with one copy of each expert; leave the precision fixed")
        self.times, self.on = times, on
        self.seconds = np.zeros(self.geometry.num_layers)
        self.slow_experts = np.zeros(self.geometry.num_layers, np.int64)
        self.slow_seconds = 0.0  # of the layer that runs
        self.plans: list[Planned] = []
        self.number = -1

    def run(self, progress: Progress | None) -> HybridSimulation:
        found = super().run(progress)
        values = {one.name: getattr(found, one.name) for one in fields(found)}
        values["optimal_hits"] = None  # it is the optimum of a cache that is asked for every expert
        return HybridSimulation(
            **values, on=self.on, seconds=self.seconds, slow_experts=self.slow_experts, plans=self.plans
        )

    def _pass(self, number: int) -> None:
        self.number = number
        super()._pass(number)

    def _parts(self, layer: int, step: Step, bits: Array | None) -> list[Part]:
        self.slow_seconds = 0.0
        if not len(step.experts):
            return []
        edges = self.passes.edges
        tokens = int(edges[self.number + 1] - edges[self.number])
        resident = self.exact.cache.is_resident(layer)[step.experts]
        plan = divide(resident, step.weights, step.counts, tokens, self.times, self.on)
        fast, moved, slow = (step.experts[list(places)].tolist() for places in (plan.fast, plan.moved, plan.slow))
        self.plans.append(Planned(self.number, layer, tuple(fast), tuple(moved), tuple(slow), plan.makespan))
        self.slow_experts[layer] += len(slow)
        self.slow_seconds = plan.slow_seconds
        self.computing += plan.slow_seconds
        rows = dict(zip(fast, step.counts[list(plan.fast)].tolist(), strict=True))
        return [Part(self.exact, np.array(fast, np.int64), rows)] if fast else []

    def _compute(self, number: int, layer: int, parts: list[Part]) -> None:
        start = self.now
        super()._compute(number, layer, parts)
        self.now = max(self.now, start + self.slow_seconds)
        self.seconds[layer] += self.now - start

    def _plan(self, predictions: list[Prediction], tokens: int) -> list[tuple[int, int]]:
        found = super()._plan(predictions, tokens)
        if self.settings.prefetch.order != "impact":
            return found
        expected = {one.layer: self._expected(one, found, tokens) for one in predictions}

        def makespan(layer: int, resident: Array) -> float:
            experts, counts = expected[layer]
            return divide(resident[experts], counts, counts, tokens, self.times, self.on).makespan

        return impact_order(found, self.copies.resident, makespan)

    def _expected(self, one: Prediction, found: list[tuple[int, int]], tokens: int) -> tuple[Array, Array]:
        """Experts ``[n]`` that a layer is expected to ask for, and tokens of each: as many as a token has and those to
        be read, alike; scores say who comes, but not of how many tokens."""
        K = self.geometry.top_k[one.layer]
        best = np.argsort(-one.scores, kind="stable")[:K].tolist()
        experts = np.array(sorted({*best, *(expert for layer, expert in found if layer == one.layer)}), np.int64)
        return experts, np.full(len(experts), max(1, round(tokens * K / len(experts))), np.int64)


def save_plans(plans: Sequence[Planned], file: Path) -> None:
    """Write plans as Parquet, one row for each layer of each pass: ``pass`` and ``layer``, lists of experts ``fast``,
    ``moved`` and ``slow``, and ``makespan`` in seconds. Raises StorageError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = pa.list_(pa.uint32())
    columns = {
        "pass": pa.array([one.number for one in plans], pa.uint32()),
        "layer": pa.array([one.layer for one in plans], pa.uint16()),
        **{name: pa.array([getattr(one, name) for one in plans], ids) for name in ("fast", "moved", "slow")},
        "makespan": pa.array([one.makespan for one in plans], pa.float64()),
    }
    with atomic_file(file) as partial:
        pq.write_table(pa.table(columns), partial, compression="zstd")
