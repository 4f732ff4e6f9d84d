"""`Simulation`: what a simulated run did, and `SimulationSettings`: what it was asked to do.

Legend: L MoE layers, P passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from collegium.errors import ConfigError
from collegium.offload.cache import Found
from collegium.offload.events import EventLog
from collegium.offload.geometry import Array, Geometry
from collegium.offload.policies.base import PolicySettings
from collegium.offload.precision.base import PrecisionSettings
from collegium.offload.precision.fixed import Fixed
from collegium.offload.prefetch import Prefetch

__all__ = ["FirstTouch", "Simulation", "SimulationSettings"]

FirstTouch = Literal["miss", "prefilled"]


@dataclass(frozen=True)
class SimulationSettings:
    """What is simulated.

    Attributes:
        policy: of every pool.
        capacity: slots of the most exact copy, for all layers together.
        expert_bytes: bits -> bytes of one expert, most exact first.
        precision: which copies tokens get; each copy that is used has a pool of its own.
        low_share: share of the memory of `capacity` slots that a second copy takes of it.
        prefetch: how much is read ahead where there is a predictor.
        first_touch: how the first request of an expert counts while there are free slots: "miss", or as a hit that
            costs nothing, as if the cache had been "prefilled".

    Raises:
        ConfigError: no slots, no bytes, or a share outside 0 to 1.
    """

    policy: PolicySettings
    capacity: int
    expert_bytes: Mapping[int, int]
    precision: PrecisionSettings = field(default_factory=Fixed)
    low_share: float = 0.2
    prefetch: Prefetch = field(default_factory=Prefetch)
    first_touch: FirstTouch = "miss"

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ConfigError(f"a cache of {self.capacity} slots cannot hold an expert")
        if not self.expert_bytes or min(self.expert_bytes.values()) < 1:
            raise ConfigError(f"the bytes of an expert must be at least 1, not {dict(self.expert_bytes)}")
        if not 0 < self.low_share < 1:
            raise ConfigError(f"low_share must be between 0 and 1, not {self.low_share}")

    def slots(self, geometry: Geometry, used: tuple[int, ...]) -> dict[int, int]:
        """Bits -> slots of each copy that is used, the most exact first."""
        exact, *low = used
        size = self.expert_bytes[exact]
        found = {exact: min(self.capacity, geometry.total)}
        for bits in low:
            given = int(self.capacity * size * self.low_share / len(low))
            found[bits] = min(max(given // self.expert_bytes[bits], geometry.num_layers), geometry.total)
            found[exact] -= -(-found[bits] * self.expert_bytes[bits] // size)
        if found[exact] < geometry.num_layers:
            raise ConfigError(
                f"{self.capacity} slots are too few for copies of {', '.join(map(str, used))} bits: each of the "
                f"{geometry.num_layers} layers needs one of each"
            )
        return found


@dataclass(frozen=True, eq=False)
class Simulation:
    """What happened. Where a duration is given it is in seconds of the cost model.

    Attributes:
        geometry: what was simulated.
        capacity: slots of the most exact copy that there were.
        by: what a pass was: see `collegium.offload.simulate_passes`.
        unrolled: prompts were run token by token.
        decode_tokens, decode_seconds: of passes that decode.
        prompt_tokens, prompt_seconds: of passes that hold rows of a prompt.
        spent: ``[P]`` seconds of each pass.
        found: ``[L, 5]`` requests by layer and `Found`.
        demand_bytes: ``[L]`` read because a token waited.
        useful_bytes, wasted_bytes: ``[L]`` read ahead and then asked for; and never, or not before it had left.
        stall: ``[L]`` seconds that the layer waited for reads.
        evictions: ``[L]`` experts that left for one of the layer.
        unused: ``[L]`` experts of the layer that were read ahead and left before anybody asked for them.
        called_off: reads ahead that were dropped before they began.
        reading: seconds that the link was busy.
        computing: seconds of experts' arithmetic.
        optimal_hits: of Belady's cache with as many slots in one pool and no reading ahead; None where copies of
            several precisions make it no yardstick.
        log: every request.
    """

    geometry: Geometry
    capacity: int
    by: str
    unrolled: bool
    decode_tokens: int
    decode_seconds: float
    prompt_tokens: int
    prompt_seconds: float
    spent: Array
    found: Array
    demand_bytes: Array
    useful_bytes: Array
    wasted_bytes: Array
    stall: Array
    evictions: Array
    unused: Array
    called_off: int
    reading: float
    computing: float
    optimal_hits: int | None
    log: EventLog

    @property
    def tokens(self) -> int:
        """Of all passes."""
        return self.decode_tokens + self.prompt_tokens

    @property
    def requests(self) -> int:
        """Experts asked for, each once a layer and pass."""
        return int(self.found[:, : Found.SKIP].sum())

    def rate(self, *kinds: Found) -> float:
        """Share of the requests that were found so."""
        return float(self.found[:, list(kinds)].sum() / max(self.requests, 1))

    @property
    def hit_rate(self) -> float:
        """Share of the requests whose expert was there in time, prefetched ones included."""
        return self.rate(Found.HIT, Found.PREFETCHED)

    @property
    def distance(self) -> float | None:
        """Hit rate of the optimal cache that loads on demand minus this one's; below 0 where reading ahead beats it."""
        return None if self.optimal_hits is None else self.optimal_hits / max(self.requests, 1) - self.hit_rate

    @property
    def overlap(self) -> float:
        """Share of the reading time during which computation did not wait; 1 where nothing was read."""
        return 1 - float(self.stall.sum()) / self.reading if self.reading else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Of decoding; of everything where nothing was decoded."""
        if self.decode_tokens:
            return self.decode_tokens / max(self.decode_seconds, 1e-12)
        return self.prompt_tokens / max(self.prompt_seconds, 1e-12)

    def summary(self) -> dict[str, float | int | None]:
        """Totals, for a table row."""
        count = max(self.tokens, 1)
        return {
            "experts": self.capacity,
            "hit": self.rate(Found.HIT),
            "prefetched": self.rate(Found.PREFETCHED),
            "late": self.rate(Found.LATE),
            "miss": self.rate(Found.MISS),
            "skipped": int(self.found[:, Found.SKIP].sum()),
            "bytes_per_token": float((self.demand_bytes + self.useful_bytes + self.wasted_bytes).sum() / count),
            "demand_bytes_per_token": float(self.demand_bytes.sum() / count),
            "useful_bytes_per_token": float(self.useful_bytes.sum() / count),
            "wasted_bytes_per_token": float(self.wasted_bytes.sum() / count),
            "stall_ms_per_token": 1000 * float(self.stall.sum()) / count,
            "overlap": self.overlap,
            "evictions": int(self.evictions.sum()),
            "evicted_unused": int(self.unused.sum()),
            "distance_to_opt": self.distance,
            "tokens_per_second": self.tokens_per_second,
        }

    def record(self) -> dict[str, Any]:
        """Everything but the events as plain data, for JSON."""
        names = [kind.name.lower() for kind in Found]
        layers = [
            {
                "layer": number,
                **dict(zip(names, self.found[at].tolist(), strict=True)),
                **{
                    name: getattr(self, name)[at].item()
                    for name in ("demand_bytes", "useful_bytes", "wasted_bytes", "stall", "evictions", "unused")
                },
            }
            for at, number in enumerate(self.geometry.layers)
        ]
        counts = ("by", "unrolled", "decode_tokens", "decode_seconds", "prompt_tokens", "prompt_seconds", "called_off")
        others = ("reading", "computing", "optimal_hits")
        return {**{name: getattr(self, name) for name in (*counts, *others)}, **self.summary(), "layers": layers}
