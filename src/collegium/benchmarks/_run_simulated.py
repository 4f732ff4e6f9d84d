"""Decode under a limit as the simulator predicts it, beside what the engine took.

The engine that runs under the limit keeps where its tokens were sent, prompts included, and times the parts of its
passes during the tokens before those that are timed. From that cost model and that routing the simulator predicts every
timed token; no time of the timed tokens goes into their prediction. What is read ahead while a prompt goes through, and
how much of it comes in time, is up to the disk, so that the caches may differ a little after it: a row says how many of
the reads are those of the engine.

Legend: P passes, N rows (tokens), L layers, K slots of a token.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from collegium import __version__
from collegium.benchmarks.harness import Row
from collegium.offload.cost import CostModel
from collegium.offload.geometry import Array

if TYPE_CHECKING:
    from collegium.offload.model import Offloaded
    from collegium.offload.simulate import Simulation
    from collegium.offload.simulate_times import Stopwatch
    from collegium.trace import Trace

__all__ = ["WITHIN", "Recording", "predicted", "trace_of"]

WITHIN = 0.15
"""How far a prediction may be from what was measured, as a share of it."""

_PROMPT, _WARM, _DECODE = "prompt", "warm", "decode"


class Recording:
    """What an engine does during a plan, for `predicted`; see `collegium.benchmarks._run_sides.drive`.

    Args:
        loaded: the model that runs.
        disk: what its cost models are based on, see `Stopwatch.cost`.
    """

    def __init__(self, loaded: Offloaded, disk: CostModel) -> None:
        self._engine, self._slots, self._disk = loaded.engine, loaded.budget.slots, disk
        self._rows: list[list[tuple[Array, Array, Array]]] = [[] for _ in loaded.source.layers]
        self._layers = {layer.layer: index for index, layer in enumerate(loaded.source.layers)}
        self._sizes = {bits: loaded.source.layers[0].layouts[bits].nbytes for bits in self._slots}
        self._runs: dict[str, dict[str, Any]] = {}
        self._watch: Stopwatch | None = None
        loaded.watch(self._see)

    def _see(self, layer: int, experts: Array, weights: Array, source: Array) -> None:
        self._rows[self._layers[layer]].append((experts.astype(np.uint16), weights.astype(np.float16), source.copy()))

    def __call__(self, name: str, stage: str) -> None:
        """A stage of a run begins: "prompt", "warm" or "decode"."""
        from collegium.offload.simulate_times import Stopwatch

        run = self._runs.setdefault(name, {})
        run[stage] = len(self._rows[0])
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            run["cost"] = self._watch.cost(self._disk).model_dump(mode="json")
            self._watch = None
        if stage == _WARM:
            self._watch = Stopwatch(self._engine)
            self._watch.__enter__()

    def save(self, file: Path) -> None:
        """Write it as npz: of each layer ``[N, K]`` experts, weights and where they came from, tokens of passes
        ``[P]``, and as JSON which passes are whose, with their cost models."""
        arrays = {
            f"{name}_{layer}": np.concatenate([parts[at] for parts in rows])
            for layer, rows in enumerate(self._rows)
            for at, name in enumerate(("experts", "weights", "source"))
        }
        about = {
            "runs": self._runs,
            "layers": list(self._layers),
            "experts": self._engine.geometry.experts,
            "slots": self._slots,
            "bytes": self._sizes,
        }
        tokens = np.array([len(experts) for experts, _, _ in self._rows[0]])
        with file.open("wb") as open_file:
            np.savez(open_file, about=np.array(json.dumps(about)), tokens=tokens, **arrays)  # type: ignore[arg-type]


def predicted(file: Path, measured: dict[str, dict[str, Any]], words: dict[str, str]) -> Iterator[Row]:
    """A row for each routing: median seconds of the timed tokens as predicted, and as measured.

    Args:
        file: that a `Recording` saved.
        measured: what `drive` found, by run.
        words: for each run, how its row is called.
    """
    with np.load(file, allow_pickle=False) as found:
        held = dict(found)
    about = json.loads(str(held["about"]))
    with tempfile.TemporaryDirectory() as scratch:
        trace = trace_of(held, about, Path(scratch) / "trace")
        for name, word in words.items():
            cost = CostModel.model_validate_json(json.dumps(about["runs"][name]["cost"]))
            yield _row(word, _simulate(trace, about, cost), about["runs"][name], held, measured[name]["decode"], cost)


def trace_of(held: dict[str, Array], about: dict[str, Any], folder: Path) -> Trace:
    """The routing of a recording as a trace, a step for each pass."""
    from collegium.trace import LayerMeta, LayerRows, Trace, TraceMeta, TraceWriter
    from collegium.trace.schema import column_names

    layers = about["layers"]
    meta = TraceMeta(
        model="made up",
        family="olmoe",
        layers=tuple(
            LayerMeta(layer=layer, path=f"layers.{layer}", num_experts=E, top_k=held[f"experts_{at}"].shape[1],
                      score="softmax")
            for at, (layer, E) in enumerate(zip(layers, about["experts"], strict=True))
        ),
        data="made up",
        domains=("unknown",),
        columns=column_names(layers, logits=False, gate_inputs=False),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        collegium=__version__,
    )  # fmt: skip
    sequence, position, first = -1, 0, 0
    begins = {at for run in about["runs"].values() for at in range(run[_PROMPT], run[_WARM])}
    with TraceWriter(folder, meta) as writer:
        for number, tokens in enumerate(held["tokens"].tolist()):
            if number in begins:
                sequence, position = sequence + 1, 0
            rows = slice(first, first + tokens)
            same = np.full(tokens, sequence)
            columns = {"sequence": same, "document": same, "position": np.arange(position, position + tokens),
                       "token": np.zeros(tokens, np.int64), "domain": np.zeros(tokens, np.int8)}  # fmt: skip
            writer.add(
                columns,
                [
                    LayerRows(held[f"experts_{at}"][rows].reshape(-1), held[f"weights_{at}"][rows].reshape(-1))
                    for at in range(len(layers))
                ],
                phase="prefill" if number in begins else "decode",
                step=number,
            )
            position, first = position + tokens, first + tokens
    return Trace.open(folder)


def _simulate(trace: Trace, about: dict[str, Any], cost: CostModel) -> Simulation:
    from collegium.offload.model import Settings
    from collegium.offload.simulate import SimulationSettings, simulate

    [(bits, slots)] = about["slots"].items()
    asked = SimulationSettings(Settings().policy, slots, {int(bits): about["bytes"][bits]})
    return simulate(trace, asked, cost, by="recorded")


def _row(
    word: str,
    simulation: Simulation,
    run: dict[str, Any],
    held: dict[str, Array],
    measured: Sequence[float],
    cost: CostModel,
) -> Row:
    timed = slice(run[_DECODE], run[_DECODE] + len(measured))
    name, seconds = f"simulated decode, {word}", statistics.median(measured)
    loads, truth = ({*map(tuple, found.tolist())} for found in (_loads(simulation, timed), _loaded(held, timed)))
    limit = f"{len(truth) / len(measured):.0f} reads a token"
    if truth:
        alike = len(loads & truth) / len(loads | truth)
        limit += f" at {cost.read_bandwidth / 1e9:.2f} GB/s, {alike:.1%} of them simulated alike"
    value = statistics.median(simulation.spent[timed].tolist())
    return Row(name, value, seconds, "measured", limit=limit, within=WITHIN)


def _loads(simulation: Simulation, passes: slice) -> Array:
    """``[n, 3]`` pass, layer and expert of every read that a token waited for in the simulation."""
    log = simulation.log
    read = (log["bytes"] > 0) & (log["step"] >= passes.start) & (log["step"] < passes.stop)
    return np.stack([log[name][read].astype(np.int64) for name in ("step", "layer", "expert")], 1)


def _loaded(held: dict[str, Array], passes: slice) -> Array:
    """The same of the engine."""
    from collegium.offload.engine import DISK

    found = []
    number = np.repeat(np.arange(len(held["tokens"])), held["tokens"])
    within = (number >= passes.start) & (number < passes.stop)
    for layer in range(sum(name.startswith("source_") for name in held)):
        row, slot = np.nonzero((held[f"source_{layer}"] == DISK) & within[:, None])
        experts = held[f"experts_{layer}"][row, slot].astype(np.int64)
        found.append(np.stack([number[row], np.full(len(row), layer), experts], 1))
    return np.concatenate(found)
