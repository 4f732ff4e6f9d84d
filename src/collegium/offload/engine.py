"""`Engine`: computes the experts of a model whose experts lie on a disk, with some of them in a bounded memory.

transformers calls it in place of an experts module's forward. For one layer of one pass it asks the precision policy
which copies are wanted, the caches which of them are there, starts the missing reads, computes what is there while they
come, then the rest. What comes out does not depend on what was there: every expert writes rows of its own, and they are
added up in one fixed order.

Legend: T tokens of a pass, K slots, E experts of a layer, A assignments, n distinct experts, d model width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from torch import Tensor, nn

from collegium.errors import ConfigError, NonFiniteError
from collegium.offload.ahead import ReadAhead
from collegium.offload.arithmetic import Arithmetic, Group, Kind, arithmetic
from collegium.offload.assigned import Assigned, sort
from collegium.offload.cache import Found
from collegium.offload.events import EventLog
from collegium.offload.geometry import Array, Geometry
from collegium.offload.meter import Meter
from collegium.offload.policies.base import Use
from collegium.offload.pool import Done, Pool
from collegium.offload.precision.base import Choice, PrecisionPolicy
from collegium.offload.predictors.base import FEW, Moment, Predictor
from collegium.offload.prefetch import Prefetch
from collegium.offload.resident import Resident
from collegium.offload.schedule import due, load_order
from collegium.offload.store import ExpertSource, ReadQueue

__all__ = ["AHEAD", "DISK", "MEMORY", "Engine", "Watcher"]

MEMORY, AHEAD, DISK = range(3)
"""Where an expert came from, as watchers are told: it was in memory, it was prefetched (perhaps still on its way), or
it was read from the disk while its token waited."""

_SOURCE = np.array([MEMORY, AHEAD, AHEAD, DISK, MEMORY], np.uint8)  # by `Found`

Watcher = Callable[[int, Array, Array, Array], None]
"""``(decoder layer, experts [T, K], weights [T, K], source [T, K])``, called once for each MoE layer of each pass."""


@dataclass(eq=False)
class _Part:
    """The experts of a step in one pool: those to be asked for, and those that have slots and are not computed yet."""

    pool: Pool
    left: Array
    held: dict[int, int] = field(default_factory=dict)  # expert -> slot, in the order of requests
    waiting: set[int] = field(default_factory=set)
    rows: dict[int, int] = field(default_factory=dict)  # expert -> row of the log

    def ready(self) -> list[int]:
        """Experts to compute now."""
        return due(self.held, self.waiting, more=len(self.left) > 0)


class Engine:
    """Experts of one model from one source.

    Args:
        geometry: of the model's MoE layers.
        source, reader: where experts are read from, and by whom.
        pools: one for each precision that `precision` may choose.
        done: the queue that the pools' reads end in.
        precision: which copy of an expert a token gets.
        predictor, prefetch: what is read ahead; without a predictor only while a prompt goes through.
        kind: of arithmetic.

    Attributes:
        found: ``[L, 5]`` requests by layer and `Found`.
        stalled: seconds that passes waited for reads.
        computed: seconds of experts' arithmetic.
        meter: told of the parts of a pass.
        log: gets every request, if `record_events` was called.
    """

    def __init__(
        self,
        geometry: Geometry,
        source: ExpertSource,
        reader: ReadQueue,
        pools: Sequence[Pool],
        done: Done,
        precision: PrecisionPolicy,
        predictor: Predictor | None = None,
        prefetch: Prefetch = Prefetch(),  # noqa: B008 (frozen)
        kind: Kind = "fast",
    ) -> None:
        self.geometry, self.source, self.reader, self.precision = geometry, source, reader, precision
        self.pools = {pool.bits: pool for pool in pools}
        self.predictor = predictor
        self.ahead = ReadAhead(geometry, self.pools, precision, reader, predictor, prefetch)
        self.found = np.zeros((geometry.num_layers, len(Found)), np.int64)
        self.stalled = self.computed = 0.0
        self.evictions = self.passes = self.tokens = 0
        self.meter = Meter()
        self.log: EventLog | None = None
        self._done = done
        plain = precision.constant and predictor is None and len(pools) == 1
        self._resident = Resident(pools[0]) if plain else None
        self._kind = kind
        self._kernels: dict[tuple[int, int], Arithmetic] = {}
        self._watchers: list[Watcher] = []
        self._tokens: Array = np.empty(0, np.int64)
        self._path: list[Array] = []
        self._gate_input: Tensor | None = None
        self._probabilities: Array | None = None

    # ---- called by the model -----------------------------------------------------------------------------------------

    def begin(self, tokens: Array) -> None:
        """A forward pass of these token ids ``[T]`` starts."""
        self._tokens, self._path = tokens, []
        self.meter.begin(len(tokens))
        self.passes += 1
        self.tokens += len(tokens)
        if self.ahead.predicts(len(tokens)):
            self.ahead.predict(Moment(-1, tokens, (), self._gate_input))

    def see_gate(self, x: Tensor | None, probabilities: Tensor | None) -> None:
        """What the router of the layer that comes next saw ``[T, d]``, and its probabilities ``[T, E]``."""
        self._gate_input = x
        self._probabilities = None if probabilities is None else probabilities.float().mean(0).numpy()

    @property
    def sees_gates(self) -> tuple[bool, bool]:
        """Whether the predictor asks for router inputs, and a policy for probabilities."""
        inputs = self.predictor is not None and "gate_input" in self.predictor.needs
        return inputs, any("probabilities" in pool.cache.policy.needs for pool in self.pools.values())

    def run(self, layer: int, module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            layer: counted from 0.
            module: the experts module, for its activation and norm; it has no weights.
            x: ``[T, d]``.
            index, weight: ``[T, K]``, ids from E on are unused slots.

        Returns:
            ``[T, d]`` in x's dtype.

        Raises:
            CheckpointError: an expert could not be read; the message names it. The engine can go on.
            NonFiniteError: the router gave a weight that is NaN or infinite.
        """
        self._settle()
        experts, weights = index.numpy(), weight.float().numpy()
        if len(x) == 1 and self._resident is not None and self.log is None:
            y = self._token(layer, module, x, experts, weights)
            if y is not None:
                return y
        if not np.isfinite(weights).all():
            raise NonFiniteError(
                f"the router of layer {self.geometry.layers[layer]} gives combine weights that are NaN or infinite"
            )
        wanted = self._choose(layer, experts, weights, decode=len(x) <= FEW)
        assigned = sort(experts, weight, weights, self.geometry.experts[layer], wanted, self.precision.bits[0])
        self.found[layer, Found.SKIP] += assigned.skipped
        parts = self._parts(layer, assigned, len(x))
        source = np.zeros(self.geometry.experts[layer] + 1, np.uint8)
        first_kernel = self._kernel(layer, parts[0].pool.bits if parts else self.precision.bits[0], module)
        rows, out = first_kernel.rows(x, len(assigned.token))
        try:
            self._request(layer, parts, source)
            self.ahead.time_layer()
            if self.ahead.predicts(len(x)):
                self._path.append(experts)
                self.ahead.predict(Moment(layer, self._tokens, tuple(self._path), self._gate_input))
            self._compute(layer, module, parts, rows, out, assigned, source)
        except BaseException:
            self._abandon(layer, parts)
            raise
        for part in parts:
            self._tell(layer, part.pool, assigned, len(x))
        self.ahead.prompt(layer, len(x))
        self._gate_input = self._probabilities = None  # they are of this layer
        for watch in self._watchers:
            watch(self.geometry.layers[layer], experts, weights, source[np.minimum(experts, len(source) - 1)])
        y = first_kernel.combine(out, assigned.token, assigned.weight, assigned.edges, x)
        self.meter.layer()
        return y

    def _token(self, layer: int, module: nn.Module, x: Tensor, experts: Array, weights: Array) -> Tensor | None:
        """`run` for one token whose experts are all in memory, the short way; None where it takes the long one."""
        assert self._resident is not None
        ids, shares = experts[0].tolist(), weights[0].tolist()
        slots = self._resident.slots(layer, ids) if math.isfinite(sum(shares)) else None
        if slots is None:
            return None
        bits, start = self.precision.bits[0], time.perf_counter()
        y = self._resident.compute(layer, self._kernel(layer, bits, module), x, ids, shares, slots)
        if y is None:
            self._resident = None  # this arithmetic never has one
            return None
        seconds = time.perf_counter() - start
        self.computed += seconds
        self.found[layer, Found.HIT] += len(ids)
        self.meter.experts(bits, len(ids), len(ids), seconds)
        self.ahead.time_layer()
        self._resident.finish(layer, ids, shares, self._probabilities)
        self._gate_input = self._probabilities = None
        for watch in self._watchers:
            watch(self.geometry.layers[layer], experts, weights, np.full_like(experts, MEMORY, np.uint8))
        self.meter.layer()
        return y

    # ---- one layer ---------------------------------------------------------------------------------------------------

    def _choose(self, layer: int, experts: Array, weights: Array, decode: bool) -> Array | None:
        """``[T, K]`` bits of each assignment; None where there is but one kind of copy."""
        if self.precision.constant:
            return None
        resident = self.pools[self.precision.bits[0]].cache.is_resident(layer)
        return self.precision.choose(Choice(layer, experts, weights, resident, decode))

    def _parts(self, layer: int, assigned: Assigned, tokens: int) -> list[_Part]:
        """The experts of each pool in the order to ask for them."""
        parts = []
        for pool in self.pools.values():
            own = self._own(pool, assigned)
            experts = assigned.experts[own]
            if len(experts):
                resident = pool.cache.is_resident(layer)[experts]
                order = load_order(resident, assigned.mass[own], assigned.counts[own], tokens)
                parts.append(_Part(pool, experts[order]))
        return parts

    def _own(self, pool: Pool, assigned: Assigned) -> slice | Array:
        """Which of the distinct experts take their copy from a pool."""
        return slice(None) if len(self.pools) == 1 else assigned.bits == pool.bits

    def _request(self, layer: int, parts: list[_Part], source: Array) -> None:
        """Ask for as many as fit."""
        for part in parts:
            if not len(part.left):
                continue
            request = part.pool.cache.request(layer, part.left)
            part.left = request.left
            part.waiting |= part.pool.load(request)
            part.held |= dict(zip(request.experts.tolist(), request.slots.tolist(), strict=True))
            source[request.experts] = _SOURCE[request.found]
            self.found[layer] += np.bincount(request.found, minlength=len(Found))
            self.evictions += int((request.evicted >= 0).sum())
            if self.log is not None:
                row = self.log.add(self.passes, request, part.pool.bits, part.pool.sizes[layer])
                part.rows |= {expert: row + at for at, expert in enumerate(request.experts.tolist())}

    def _compute(
        self,
        layer: int,
        module: nn.Module,
        parts: list[_Part],
        rows: Tensor,
        out: Tensor,
        assigned: Assigned,
        source: Array,
    ) -> None:
        while any(part.held or len(part.left) for part in parts):
            if not any(part.held for part in parts):  # what is read ahead for nothing holds the slots
                if not any(part.pool.flying for part in parts):
                    raise ConfigError(f"no slot can be freed for layer {layer}")
                self._wait(layer, parts)
            for part in parts:
                ready = part.ready()
                if ready:
                    start = time.perf_counter()
                    record = part.pool.record
                    groups: list[Group] = [(record(layer, part.held[e]), *assigned.rows[e]) for e in ready]
                    self._kernel(layer, part.pool.bits, module).compute(rows, assigned.token, groups, out)
                    seconds = time.perf_counter() - start
                    self.computed += seconds
                    computed_rows = sum(last - first for _, first, last in groups)
                    self.meter.experts(part.pool.bits, len(groups), computed_rows, seconds)
                    for expert in ready:
                        del part.held[expert]
                    part.pool.cache.release(layer, np.array(ready))
            self._request(layer, parts, source)
            if not any(part.ready() for part in parts) and any(part.waiting for part in parts):
                self._wait(layer, parts)

    def _wait(self, layer: int, parts: list[_Part]) -> None:
        """Until a read has come; raises what went wrong with one that this step needs."""
        start = time.perf_counter()
        ended = [self._done.get()]
        seconds = time.perf_counter() - start
        self.stalled += seconds
        while not self._done.empty():
            ended.append(self._done.get())
        errors = []
        for pool, of, expert, ticket in ended:
            pool.land(of, expert, ticket)
            for part in parts:
                if part.pool is pool and of == layer and expert in part.waiting:
                    part.waiting.discard(expert)
                    errors += [] if ticket.error is None else [ticket.error]
                    if self.log is not None:
                        self.log.wait(part.rows[expert], seconds)
                        seconds = 0.0
        if errors:
            raise errors[0]

    def _settle(self) -> None:
        """Take note of the reads that have ended since. A prefetch that failed is read again if it is asked for."""
        while not self._done.empty():
            pool, layer, expert, ticket = self._done.get()
            pool.land(layer, expert, ticket)

    def _abandon(self, layer: int, parts: list[_Part]) -> None:
        """A step has failed: leave caches and slots as if it had ended."""
        while any(part.waiting for part in parts):
            pool, of, expert, ticket = self._done.get()
            pool.land(of, expert, ticket)
            for part in parts:
                if part.pool is pool and of == layer:
                    part.waiting.discard(expert)
        for part in parts:
            part.pool.cache.release(layer, np.array(list(part.held), np.int64))

    def _tell(self, layer: int, pool: Pool, assigned: Assigned, tokens: int) -> None:
        own = self._own(pool, assigned)
        mass = assigned.mass[own]
        order = np.argsort(-mass, kind="stable")
        pool.cache.finish(
            Use(
                layer=layer,
                experts=assigned.experts[own][order],
                weights=mass[order],
                counts=assigned.counts[own][order],
                exact=np.full(len(order), pool.bits == self.precision.bits[0]),
                probabilities=self._probabilities,
                tokens=tokens,
            )
        )

    def _kernel(self, layer: int, bits: int, module: nn.Module) -> Arithmetic:
        found = self._kernels.get((layer, bits))
        if found is None:
            found = arithmetic(self._kind, self.source.layers[layer].layouts[bits], module)
            self._kernels[layer, bits] = found
        return found

    # ---- what others ask ---------------------------------------------------------------------------------------------

    def new_sequence(self) -> None:
        """A new sequence starts; caches keep their content."""
        for pool in self.pools.values():
            pool.cache.policy.begin()
        if self.predictor is not None:
            self.predictor.begin()

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Call `watcher` at every MoE layer; the result undoes it."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    def record_events(self) -> None:
        """Log every request from now on."""
        self.log = EventLog()

    def counters(self) -> dict[str, float]:
        """Totals since the start: requests by where they were found, bytes and seconds."""
        found = self.found.sum(0).tolist()
        names = ("hits", "prefetched", "late", "misses", "skipped")
        return {
            **{name: float(count) for name, count in zip(names, found, strict=True)},
            "passes": float(self.passes),
            "tokens": float(self.tokens),
            "evictions": float(self.evictions + self.ahead.evictions),
            "called_off": float(self.ahead.called_off),
            "stall_seconds": self.stalled,
            "compute_seconds": self.computed,
            **{f"read_{name}": float(value) for name, value in asdict(self.reader.counters()).items()},
        }

    def close(self) -> None:
        """Wait for what is under way, and end the readers."""
        self.reader.close()
        self.source.close()
