"""The ways in which ``simulate`` runs the same tokens: batched, regrouped, or on two processors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from collegium.errors import ConfigError

if TYPE_CHECKING:
    from collegium.cli._simulate import Asked, Machine, Row
    from collegium.offload.cost import CostModel
    from collegium.offload.predictors.base import Predictor
    from collegium.offload.schedule import Hybrid, Processors
    from collegium.offload.simulate import GateInputs, Simulation, SimulationSettings
    from collegium.offload.simulate_passes import Passes

__all__ = ["PLAIN", "REGROUPED", "Variant", "saved", "variants"]

PLAIN, REGROUPED = "as they come", "regrouped"


@dataclass(frozen=True)
class Variant:
    """One way to run the tokens.

    Attributes:
        name: for a person; empty where there is but one way.
        passes: what runs.
        times, on: of two processors, and which compute; None for one.
        facts: of the passes, for the record.
    """

    name: str
    passes: Passes
    times: Hybrid | None = None
    on: Processors = "both"
    facts: Mapping[str, float] = field(default_factory=dict)

    def simulate(
        self,
        settings: SimulationSettings,
        cost: CostModel,
        predictor: Predictor | None,
        inputs: GateInputs | None,
        progress: Callable[[int], None],
    ) -> Simulation:
        """Raises ConfigError for settings that do not fit."""
        from collegium.offload.simulate import simulate
        from collegium.offload.simulate_hybrid import simulate_hybrid

        if self.times is None:
            return simulate(self.passes, settings, cost, predictor=predictor, gate_inputs=inputs, progress=progress)
        return simulate_hybrid(
            self.passes,
            settings,
            cost,
            self.times,
            on=self.on,
            predictor=predictor,
            gate_inputs=inputs,
            progress=progress,
        )


def variants(asked: Asked, passes: Passes, machine: Machine, predictor: Predictor | None) -> list[Variant]:
    """What ``--batch``, ``--schedule`` and ``--device`` ask for.

    Raises:
        ConfigError: one of them lacks another, or there is no such schedule, setting or device.
    """
    from collegium.offload.simulate_batch import batched

    name, _, settings = ("" if asked.schedule is None else asked.schedule).partition(":")
    name = name.strip()
    if asked.device is not None and name != "hybrimoe":
        raise ConfigError("--device is the second processor of --schedule hybrimoe; ask for that, or leave it out")
    if name == "regroup":
        return _regrouped(asked, passes, predictor)
    together = passes if asked.batch is None else batched(passes, asked.batch)
    if name == "hybrimoe":
        return _divided(asked, together, machine, settings)
    if asked.schedule is None:
        return [Variant("", together)]
    from collegium.catalog import get

    get("scheduler", name)
    raise ConfigError(
        f"{name} is the order that passes of few or of many tokens have anyway; --schedule is regroup or hybrimoe"
    )


def _regrouped(asked: Asked, passes: Passes, predictor: Predictor | None) -> list[Variant]:
    from collegium.named import find_named
    from collegium.offload.simulate_batch import batched, distinct_experts, predicted_experts

    if asked.batch is None:
        raise ConfigError("--schedule regroup deals out two batches anew; say with --batch how many sequences one has")
    regroup = find_named("scheduler", asked.schedule or "")
    experts = None if predictor is None else predicted_experts(passes, predictor)
    plain = batched(passes, asked.batch, 2)
    dealt = batched(passes, asked.batch, 2, regroup, experts)
    return [
        Variant(name, one, facts={"distinct_experts": distinct_experts(one)})
        for name, one in ((PLAIN, plain), (REGROUPED, dealt))
    ]


def _divided(asked: Asked, passes: Passes, machine: Machine, settings: str) -> list[Variant]:
    from collegium.named import find_named
    from collegium.offload.schedule.device import find_device

    if bool(settings.strip()) == (asked.device is not None):
        raise ConfigError(
            "--schedule hybrimoe takes a second processor: describe it with --device gpu:seconds=0.0004,transfer=12 "
            "(seconds an expert, or gflops=9000; GB/s of the link), or give all times in seconds, as --schedule "
            "hybrimoe:fast=0.0005,slow=0.001,slow_start=0.0008,transfer=0.0004; not both"
        )
    if asked.device is None:
        name, times = "fast", find_named("scheduler", asked.schedule or "")
    else:
        name, device = find_device(asked.device)
        times = device.beside(machine.cost, machine.bits, machine.expert_bytes)
    names: dict[Processors, str] = {"both": f"cpu+{name}", "fast": name, "slow": "cpu"}
    return [Variant(label, passes, times, on) for on, label in names.items()]


def saved(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of each policy and memory what regrouping saves against the same batches as they come: shares of bytes and of
    stalls (None where there are none to save), times the tokens a second, and distinct experts before and after."""
    found = []
    for (policy, experts), pair in groupby(rows, key=lambda row: (row.policy, row.simulation.capacity)):
        plain, dealt = pair
        before, after = (row.simulation.summary() for row in (plain, dealt))

        def less(key: str, before: dict[str, Any] = before, after: dict[str, Any] = after) -> float | None:
            return 1 - after[key] / before[key] if before[key] else None

        found.append(
            {
                "policy": policy,
                "experts": experts,
                "bytes": less("bytes_per_token"),
                "stall": less("stall_ms_per_token"),
                "speedup": dealt.simulation.tokens_per_second / plain.simulation.tokens_per_second,
                "distinct_experts": [plain.facts["distinct_experts"], dealt.facts["distinct_experts"]],
            }
        )
    return found
