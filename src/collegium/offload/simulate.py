"""`simulate`: a trace run through the caches, the link and the cost model of one machine, event by event.

It drives `ExpertCache` in the order in which the engine does. Of each layer of each pass: reads that have come are
taken note of, the experts are asked for, those that are missing start to load, what a predictor names is read ahead,
resident experts are computed while others come, and at the end the policy hears what was used. Where a step has more
experts than slots they are computed in the order of their requests, a part of the slots at a time (see `due`).

Legend: L layers, E experts of a layer, T tokens of a pass, K slots, n distinct experts of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from collegium.errors import ConfigError
from collegium.offload.cache import ExpertCache, Found, Request
from collegium.offload.cost import CostModel
from collegium.offload.events import EventLog
from collegium.offload.geometry import Array
from collegium.offload.policies.base import PolicySettings, Use
from collegium.offload.policies.opt import OPT
from collegium.offload.precision.base import SKIP, Choice
from collegium.offload.predictors.base import FEW, Moment, Prediction, Predictor
from collegium.offload.prefetch import Copies, for_prompt, plan
from collegium.offload.simulate_bound import optimal_hits
from collegium.offload.simulate_link import Link, Read
from collegium.offload.simulate_passes import Passes, PassesBy, Step
from collegium.offload.simulate_pools import Part, Pool
from collegium.offload.simulation import Simulation, SimulationSettings
from collegium.trace import Trace

if TYPE_CHECKING:
    import torch

__all__ = ["GateInputs", "Progress", "Run", "Simulation", "SimulationSettings", "simulate"]

Progress = Callable[[int], None]
GateInputs: TypeAlias = "Callable[[int, Array], torch.Tensor]"
"""``(layer, rows [T] of the trace) -> [T, d]`` tensor of what that layer's router saw."""


def simulate(
    trace: Trace | Passes,
    settings: SimulationSettings,
    cost: CostModel,
    *,
    predictor: Predictor | None = None,
    gate_inputs: GateInputs | None = None,
    by: PassesBy = "auto",
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Simulation:
    """Simulate a trace.

    Args:
        trace: a trace, or its passes where several simulations share them (`by` and `max_tokens` are then theirs).
        settings: what is simulated.
        cost: times of the machine.
        predictor: what is read ahead; fitted on other documents than those of the trace, or it knows the answers.
        gate_inputs: what routers saw, for a predictor that needs it.
        by: what a pass is, see `Passes`.
        max_tokens: only so many tokens.
        progress: told the passes that are done, now and then.

    Raises:
        ConfigError: the settings do not fit the trace, or what the predictor needs was not given.
        TraceError: the trace is empty or damaged.
    """
    passes = Passes(trace, by, max_tokens, probabilities=True) if isinstance(trace, Trace) else trace
    if predictor is not None and "gate_input" in predictor.needs and gate_inputs is None:
        raise ConfigError("this predictor reads the routers' inputs, which the trace does not hold for every token")
    settings.prefetch.for_one_processor()
    return Run(passes, settings, cost, predictor, gate_inputs).run(progress)


class Run:
    """One simulation; what schedules it on two processors is a subclass."""

    def __init__(
        self,
        passes: Passes,
        settings: SimulationSettings,
        cost: CostModel,
        predictor: Predictor | None,
        gate_inputs: GateInputs | None,
    ) -> None:
        self.passes, self.settings, self.cost = passes, settings, cost
        self.predictor, self.gate_inputs = predictor, gate_inputs
        self.geometry = geometry = passes.geometry
        self.precision = settings.precision.build(geometry, tuple(settings.expert_bytes))
        self.slots = settings.slots(geometry, self.precision.used_bits)
        policy = settings.policy
        if isinstance(policy, OPT):
            if len(self.slots) > 1:
                raise ConfigError("opt knows which expert is asked for next, not in which precision; use one copy")
            policy = policy.knowing(passes.stream())
        self.pools = {bits: self._pool(bits, count, policy) for bits, count in self.slots.items()}
        self.exact = next(iter(self.pools.values()))
        self.copies = Copies(self.precision, {bits: pool.cache for bits, pool in self.pools.items()})
        self.link, self.log, self.now = Link(cost.readers, cost.read_delay), EventLog(), 0.0
        L = geometry.num_layers
        self.found = np.zeros((L, len(Found)), np.int64)
        self.demand, self.useful, self.wasted, self.evictions, self.unused = np.zeros((5, L), np.int64)
        self.stall = np.zeros(L)
        self.computing, self.called_off = 0.0, 0
        self.path: list[Array] = []

    def _pool(self, bits: int, count: int, policy: PolicySettings) -> Pool:
        geometry = self.geometry
        prefilled = np.zeros(geometry.total, np.bool_) if self.settings.first_touch == "prefilled" else None
        cache = ExpertCache(geometry, count, policy.build(geometry, count))
        return Pool(bits, self.settings.expert_bytes[bits], cache, prefilled)

    def run(self, progress: Progress | None) -> Simulation:
        passes = self.passes
        spent = np.zeros(len(passes))
        for number in range(len(passes)):
            start = self.now
            if passes.fresh[number]:
                self._begin()
            self._pass(number)
            spent[number] = self.now - start
            if progress is not None and number % 256 == 255:
                progress(number + 1)
        for pool in self.pools.values():
            for key in pool.fresh:
                layer, expert = self.geometry.split(key)
                read = pool.flying.get((layer, expert))
                if read is None or read.end is not None:  # else it never began
                    self.wasted[layer] += pool.nbytes
        tokens, decode = np.diff(passes.edges), passes.decode
        bound = None
        if len(self.pools) == 1 and self.precision.constant:
            prefilled = self.settings.first_touch == "prefilled"
            bound = optimal_hits(passes.stream(), self.geometry.total, self.exact.cache.capacity, prefilled)
        return Simulation(
            geometry=self.geometry,
            capacity=self.exact.cache.capacity,
            by=passes.by,
            unrolled=passes.unrolled,
            decode_tokens=int(tokens[decode].sum()),
            decode_seconds=float(spent[decode].sum()),
            prompt_tokens=int(tokens[~decode].sum()),
            prompt_seconds=float(spent[~decode].sum()),
            spent=spent,
            found=self.found,
            demand_bytes=self.demand,
            useful_bytes=self.useful,
            wasted_bytes=self.wasted,
            stall=self.stall,
            evictions=self.evictions,
            unused=self.unused,
            called_off=self.called_off,
            reading=self.link.busy,
            computing=self.computing,
            optimal_hits=bound,
            log=self.log,
        )

    def _begin(self) -> None:
        for pool in self.pools.values():
            pool.cache.policy.begin()
        if self.predictor is not None:
            self.predictor.begin()

    def _pass(self, number: int) -> None:
        rows = slice(int(self.passes.edges[number]), int(self.passes.edges[number + 1]))
        tokens = rows.stop - rows.start
        ahead = self.predictor is not None and tokens <= FEW
        self.path = []
        if ahead:
            self._read_ahead(-1, rows)
        for layer in range(self.geometry.num_layers):
            self.now += self.cost.layer(tokens)
            self._settle()
            step = self.passes.step(number, layer)
            bits = self._choose(layer, rows, step)
            parts = self._parts(layer, step, bits)
            self._request(number, layer, parts)
            if ahead:
                self.path.append(self.passes.experts[layer][rows])
                self._read_ahead(layer, rows)
            self._compute(number, layer, parts)
            self._tell(number, layer, step, bits, tokens)
            self._read_for_prompt(layer, tokens)
        self.now += self.cost.outside(tokens)

    # ---- one layer ---------------------------------------------------------------------------------------------------

    def _choose(self, layer: int, rows: slice, step: Step) -> Array | None:
        """``[n]`` bits of each expert of a step, 0 where all of its tokens leave it out; None where all are alike."""
        if self.precision.constant:
            return None
        experts, weights = self.passes.experts[layer][rows], self.passes.weights[layer][rows]
        resident = self.exact.cache.is_resident(layer)
        wanted = self.precision.choose(Choice(layer, experts, weights, resident, len(experts) <= FEW))
        used = experts < self.geometry.experts[layer]
        self.found[layer, Found.SKIP] += int((used & (wanted == SKIP)).sum())
        bits = np.zeros(self.geometry.experts[layer], np.uint8)
        np.maximum.at(bits, experts[used], wanted[used])
        return bits[step.experts]

    def _parts(self, layer: int, step: Step, bits: Array | None) -> list[Part]:
        parts = []
        for pool in self.pools.values():
            order = step.order if bits is None else step.order[bits[step.order] == pool.bits]
            if len(order):
                experts = step.experts[order]
                parts.append(Part(pool, experts, dict(zip(experts.tolist(), step.counts[order].tolist(), strict=True))))
        return parts

    def _request(self, number: int, layer: int, parts: list[Part]) -> None:
        for part in parts:
            if not len(part.left):
                continue
            pool = part.pool
            request = pool.cache.request(layer, part.left)
            part.left = request.left
            if not len(request.experts):
                if not part.held:
                    raise ConfigError(f"no slot of {pool.cache.capacity} can be freed for layer {layer}")
                continue
            if pool.prefilled is not None:
                self._prefill(pool, request)
            row = self.log.add(number, request, pool.bits, pool.nbytes)
            self.found[layer] += np.bincount(request.found, minlength=len(Found))
            first = int(self.geometry.offsets[layer])
            for expert, found, evicted in zip(
                request.experts.tolist(), request.found.tolist(), request.evicted.tolist(), strict=True
            ):
                part.held[expert] = row
                row += 1
                if found == Found.HIT:
                    continue
                if found == Found.MISS:
                    self._evicted(pool, layer, evicted)
                    self._submit(pool, layer, expert, ahead=False)
                    self.demand[layer] += pool.nbytes
                else:
                    pool.fresh.discard(first + expert)
                    self.useful[layer] += pool.nbytes
                if found != Found.PREFETCHED:
                    part.waiting.add(expert)
                if found == Found.LATE:
                    self.link.hurry(pool.flying[layer, expert])

    def _prefill(self, pool: Pool, request: Request) -> None:
        """First touches that find a free slot are there already."""
        assert pool.prefilled is not None
        keys = self.geometry.offsets[request.layer] + request.experts
        free = (request.found == Found.MISS) & (request.evicted < 0) & ~pool.prefilled[keys]
        request.found[free] = Found.HIT
        pool.prefilled[keys] = True
        for expert in request.experts[free].tolist():
            pool.cache.arrived(request.layer, expert)

    def _compute(self, number: int, layer: int, parts: list[Part]) -> None:
        while any(part.held for part in parts):
            for part in parts:
                ready = part.ready()
                if ready:
                    pool = part.pool
                    rows = [part.rows[expert] for expert in ready]
                    seconds = self.cost.call(rows, pool.bits, pool.nbytes)
                    if not self.cost.spare:
                        self.link.hold(self.now, self.now + seconds)
                    self.now += seconds
                    self.computing += seconds
                    for expert in ready:
                        del part.held[expert]
                    pool.cache.release(layer, np.array(ready))
            self._request(number, layer, parts)
            while not any(part.ready() for part in parts) and any(part.waiting for part in parts):
                self._wait(layer, parts)

    def _wait(self, layer: int, parts: list[Part]) -> None:
        read = self.link.next()
        assert read.end is not None
        waited = 0.0
        if read.end > self.now:
            waited = read.end + self.cost.wake_seconds - self.now
            self.now += waited
        self.stall[layer] += waited
        for came in (read, *self.link.advance(self.now)):
            self._land(came)
            for part in parts:
                if part.pool.bits == came.pool and came.layer == layer and came.expert in part.waiting:
                    part.waiting.discard(came.expert)
                    self.log.wait(part.held[came.expert], waited)
                    waited = 0.0

    def _tell(self, number: int, layer: int, step: Step, bits: Array | None, tokens: int) -> None:
        for pool in self.pools.values():
            order = np.argsort(-step.weights, kind="stable")
            if bits is not None:
                order = order[bits[order] == pool.bits]
            if not len(order):
                continue
            policy = pool.cache.policy
            wanted = "probabilities" in policy.needs
            pool.cache.finish(
                Use(
                    layer=layer,
                    experts=step.experts[order],
                    weights=step.weights[order],
                    counts=step.counts[order],
                    exact=np.full(len(order), pool is self.exact),
                    probabilities=self.passes.probabilities(number, layer) if wanted else None,
                    tokens=tokens,
                )
            )

    # ---- reads -------------------------------------------------------------------------------------------------------

    def _read_ahead(self, layer: int, rows: slice) -> None:
        """Ask the predictor, and start the reads that are worth it; of the copies that the precision policy names."""
        assert self.predictor is not None
        if layer >= 0:
            for read in self.link.call_off(layer):
                pool = self.pools[read.pool]
                self.called_off += 1
                del pool.flying[layer, read.expert]
                pool.fresh.discard(int(self.geometry.offsets[layer]) + read.expert)
                pool.cache.failed(layer, read.expert)
        gate_input = None
        if layer >= 0 and self.gate_inputs is not None and "gate_input" in self.predictor.needs:
            gate_input = self.gate_inputs(layer, self.passes.rows[rows])
        predictions = self.predictor.predict(Moment(layer, self.passes.tokens[rows], tuple(self.path), gate_input))
        self.copies.expect(predictions)
        for of, expert in self._plan(predictions, rows.stop - rows.start):
            self._prefetch(self.pools[self.copies.bits(of, expert)], of, expert)

    def _read_for_prompt(self, layer: int, tokens: int) -> None:
        """As `ReadAhead.prompt` does."""
        count = self.settings.prefetch.prompt if self.precision.constant else 0
        for expert in for_prompt(count, self.exact.cache, layer, tokens):
            self._prefetch(self.exact, layer + 1, expert, lender=layer)

    def _prefetch(self, pool: Pool, layer: int, expert: int, lender: int | None = None) -> None:
        place = pool.cache.prefetch(layer, expert, lender)
        if place is not None:
            self._evicted(pool, layer, place[1])
            pool.fresh.add(int(self.geometry.offsets[layer]) + expert)
            self._submit(pool, layer, expert, ahead=True)

    def _plan(self, predictions: list[Prediction], tokens: int) -> list[tuple[int, int]]:
        """What to read ahead, in which order, in a pass of so many tokens."""
        pool, K = self.exact, max(self.geometry.top_k)
        between = self.cost.layer(1) + self.cost.call([1] * K, pool.bits, pool.nbytes)
        return plan(
            self.settings.prefetch,
            predictions,
            self.geometry,
            self.copies.resident,
            seconds=between,
            per_load=self.cost.read_seconds(pool.nbytes),
        )

    def _evicted(self, pool: Pool, layer: int, key: int) -> None:
        """Count an expert that left for one of `layer`."""
        if key < 0:
            return
        self.evictions[layer] += 1
        if key in pool.fresh:
            pool.fresh.discard(key)
            own = int(self.geometry.layer_of[key])
            self.unused[own] += 1
            self.wasted[own] += pool.nbytes

    def _submit(self, pool: Pool, layer: int, expert: int, ahead: bool) -> None:
        read = Read(pool.bits, layer, expert, self.cost.read_seconds(pool.nbytes), ahead, self.now)
        pool.flying[layer, expert] = read
        self.link.submit(read)

    def _settle(self) -> None:
        for read in self.link.advance(self.now):
            self._land(read)

    def _land(self, read: Read) -> None:
        pool = self.pools[read.pool]
        del pool.flying[read.layer, read.expert]
        pool.cache.arrived(read.layer, read.expert)
