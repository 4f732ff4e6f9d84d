"""`ReadAhead`: the engine's reads of experts that nobody has asked for yet.

While a model writes, a predictor names them. While a prompt goes through, nearly every expert of every layer is needed,
so the next layer's are read while attention runs, into slots of the layer that is done: those are needed last of all.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from collegium.offload.geometry import Geometry
from collegium.offload.pool import Pool
from collegium.offload.precision.base import PrecisionPolicy
from collegium.offload.predictors.base import FEW, Moment, Predictor
from collegium.offload.prefetch import Copies, Prefetch, for_prompt, plan
from collegium.offload.store import ReadQueue

__all__ = ["ReadAhead"]

_SMOOTH = 0.9


class ReadAhead:
    """What is read ahead for one engine.

    Args:
        geometry, pools, precision, reader: the engine's.
        predictor: None reads ahead in prompts only.
        prefetch: how much.

    Attributes:
        evictions: experts that left for one that was read ahead.
        called_off: reads ahead that nobody waited for any more.
    """

    def __init__(
        self,
        geometry: Geometry,
        pools: Mapping[int, Pool],
        precision: PrecisionPolicy,
        reader: ReadQueue,
        predictor: Predictor | None,
        prefetch: Prefetch,
    ) -> None:
        self._geometry, self._pools, self._reader = geometry, pools, reader
        self._predictor, self._prefetch = predictor, prefetch
        self._copies = Copies(precision, {bits: pool.cache for bits, pool in pools.items()})
        # which copy a prompt will take is known where there is but one
        self._prompts = prefetch.prompt if precision.constant else 0
        self._only = pools[precision.bits[0]]
        self._asked_at: float | None = None
        self._layer_seconds: float | None = None  # from one layer's request to the next one's, lately
        self.evictions = self.called_off = 0

    def predicts(self, tokens: int) -> bool:
        """Whether the predictor is asked in a pass of so many tokens."""
        return self._predictor is not None and tokens <= FEW

    def predict(self, moment: Moment) -> None:
        """Ask the predictor, and start the reads that are worth it; of the copies that the precision policy names."""
        assert self._predictor is not None
        if moment.layer >= 0:
            self.called_off += sum(pool.call_off(moment.layer) for pool in self._pools.values())
        predictions = self._predictor.predict(moment)
        self._copies.expect(predictions)
        wanted = plan(
            self._prefetch,
            predictions,
            self._geometry,
            self._copies.resident,
            seconds=self._layer_seconds,
            per_load=self._load_seconds(),
        )
        for of, expert in wanted:
            self._count(self._pools[self._copies.bits(of, expert)].prefetch(of, expert))

    def prompt(self, layer: int, tokens: int) -> None:
        """A layer of a pass of so many tokens is done; read what the next one will need."""
        for expert in for_prompt(self._prompts, self._only.cache, layer, tokens):
            self._count(self._only.prefetch(layer + 1, expert, lender=layer))

    def time_layer(self) -> None:
        """A layer's experts were asked for."""
        now, before = time.perf_counter(), self._asked_at
        self._asked_at = now
        if before is not None:
            last = self._layer_seconds or now - before
            self._layer_seconds = _SMOOTH * last + (1 - _SMOOTH) * (now - before)

    def _count(self, evicted: int | None) -> None:
        self.evictions += evicted is not None and evicted >= 0

    def _load_seconds(self) -> float | None:
        """Seconds that the disk is busy for one expert, from the reads so far."""
        counters = self._reader.counters()
        reads = counters.demand + counters.prefetch - counters.failed - counters.reading
        return counters.seconds / self._reader.threads / reads if reads > 0 else None
