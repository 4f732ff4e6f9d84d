"""What ``simulate`` is asked for, and running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collegium.errors import ConfigError

if TYPE_CHECKING:
    from collegium.offload.cost import CostModel
    from collegium.offload.geometry import Geometry
    from collegium.offload.predictors.base import Predictor
    from collegium.offload.prefetch import Prefetch
    from collegium.offload.simulate_passes import Passes
    from collegium.offload.simulation import Simulation
    from collegium.trace import Trace

__all__ = ["Asked", "Machine", "Row", "capacities", "open_machine", "simulate_all"]


@dataclass(frozen=True)
class Asked:
    """Options as they were written; no policies are all of them."""

    policies: Sequence[str]
    predictor: str | None
    fit: Path | None
    prefetch: str
    prefilled: bool
    batch: int | None = None
    schedule: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class Machine:
    """Bytes of an expert, bits of its copy, and times."""

    expert_bytes: int
    bits: int
    cost: CostModel


@dataclass(frozen=True)
class Row:
    """One simulation; `schedule` and `facts` are of its `Variant`."""

    policy: str
    share: float
    simulation: Simulation
    schedule: str = ""
    facts: Mapping[str, float] = field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """One row of a CSV file."""
        return {**self._head(), **self.simulation.summary()}

    def record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**self._head(), **self.simulation.record()}

    def _head(self) -> dict[str, Any]:
        return {"policy": self.policy, "schedule": self.schedule, "share": self.share, **self.facts}


def open_machine(trace: Trace, expert_bytes: int | None, model: str | None, cost: Path | None) -> Machine:
    """What an expert takes in bytes and in time.

    Raises:
        ConfigError: neither bytes nor a model are given, or the model's layers are not those of the trace.
    """
    from collegium.offload.cost import CostModel, measure_cost

    bits = 16
    if model is not None:
        from collegium.offload.store import open_source

        source = open_source(model)
        found = [(layer.layer, layer.num_experts) for layer in source.layers]
        traced = [(layer.layer, layer.num_experts) for layer in trace.meta.layers]
        if found != traced:
            raise ConfigError(f"{model} has MoE layers {found}, the trace {traced} (layer, experts); give its model")
        bits = max(source.layers[0].layouts)
        expert_bytes = expert_bytes or max(layer.layouts[bits].nbytes for layer in source.layers)
        source.close()
    if expert_bytes is None:
        raise ConfigError("how large is an expert? give --model, or --expert-bytes")
    times = measure_cost(trace.folder.parent, record=expert_bytes) if cost is None else CostModel.load(cost)
    return Machine(expert_bytes, bits, times)


def capacities(
    geometry: Geometry, expert_bytes: int, memory: str | None, experts: int | None, ratio: float | None, sweep: bool
) -> list[int]:
    """Slots to simulate, ascending.

    Raises:
        ConfigError: not exactly one way to say how much memory there is, or it is too little.
    """
    from collegium.offload.budget import parse_bytes

    K = sum(geometry.top_k)
    if sweep:
        if memory is not None or experts is not None or ratio is not None:
            raise ConfigError("--sweep tries every memory; leave out --memory, --experts and --ratio")
        steps = [step * 2.0**power for power in range(16) for step in (1.0, 1.5)]
        found = {min(round(K * step), geometry.total) for step in steps}
        return sorted(found)
    if [memory, experts, ratio].count(None) != 2:
        raise ConfigError("say how much memory there is: one of --memory, --experts, --ratio (or --sweep)")
    if memory is not None:
        count = parse_bytes(memory) // expert_bytes
    else:
        count = experts if experts is not None else round(K * (ratio or 0))
    if count < geometry.num_layers:
        raise ConfigError(
            f"{count} experts fit, and each of the {geometry.num_layers} MoE layers needs at least one: "
            f"give {geometry.num_layers * expert_bytes / 2**20:,.1f} MiB or more"
        )
    return [min(count, geometry.total)]


def simulate_all(
    asked: Asked, trace: Trace, passes: Passes, machine: Machine, budgets: Sequence[int], model: str | None
) -> list[Row]:
    """Every policy at every budget in every way that was asked for, with a progress bar.

    Raises:
        ConfigError: settings that do not fit.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from collegium.catalog import methods
    from collegium.cli._schedules import variants
    from collegium.offload.policies import find_policy
    from collegium.offload.simulate import SimulationSettings
    from collegium.offload.simulate_passes import recorded_gate_inputs

    names = list(dict.fromkeys(asked.policies)) or [method.name for method in methods("cache")]
    policies = {name: find_policy(name) for name in names}
    prefetch = _prefetch(asked)
    predictor = _predictor(asked, passes.geometry, model)
    inputs = None
    if predictor is not None and "gate_input" in predictor.needs:
        inputs = recorded_gate_inputs(trace)
    ways = variants(asked, passes, machine, predictor)
    rows = []
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(budgets) * len(policies) * sum(len(way.passes) for way in ways))
        done = 0
        for capacity, (name, policy), way in product(budgets, policies.items(), ways):
            bar.update(task, description=f"{name}, {capacity} experts {way.name}", completed=done)
            settings = SimulationSettings(
                policy,
                capacity,
                {machine.bits: machine.expert_bytes},
                prefetch=prefetch,
                first_touch="prefilled" if asked.prefilled else "miss",
            )
            found = way.simulate(
                settings,
                machine.cost,
                predictor,
                inputs,
                lambda count, done=done: bar.update(task, completed=done + count),  # type: ignore[misc]
            )
            done += len(way.passes)
            rows.append(Row(name, capacity / passes.geometry.total, found, way.name, way.facts))
    return rows


def _prefetch(asked: Asked) -> Prefetch:
    from collegium.offload.prefetch import Prefetch, find_prefetch

    text = asked.prefetch.strip()
    found = find_prefetch(f"width={text}" if text.isdecimal() else text)
    if asked.predictor is None and (asked.fit or found != Prefetch(prompt=found.prompt)):
        raise ConfigError("--prefetch and --fit say how to read ahead; name a predictor with --predictor")
    return found


def _predictor(asked: Asked, geometry: Geometry, model: str | None) -> Predictor | None:
    if asked.predictor is None:
        return None
    from collegium.offload.predictors import find_predictor
    from collegium.trace import Trace

    settings = find_predictor(asked.predictor)
    fitted_on = None if asked.fit is None else Trace.open(asked.fit)
    if settings.needs_trace and fitted_on is None:
        raise ConfigError(f"the predictor {asked.predictor} learns from a trace of other texts; give it with --fit")
    gates = None
    if settings.needs_gates:
        if model is None:
            raise ConfigError(f"the predictor {asked.predictor} asks the model's routers; give --model")
        from collegium.assets import model_folder
        from collegium.cli._model import open_model
        from collegium.offload.gates import ModelGates

        network = open_model(model_folder(model), dtype=None, device=None, trust_remote_code=False)
        gates = ModelGates(network)
    return settings.build(geometry, trace=fitted_on, gates=gates)
