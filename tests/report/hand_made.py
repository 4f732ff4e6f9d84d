"""Traces and results with known numbers, for the tests of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from collegium.measure.cache import CacheCurve
from collegium.measure.estimate import Estimate
from collegium.measure.load import Load
from collegium.measure.locality import Locality
from collegium.measure.specialisation import DomainInformation
from collegium.trace import Trace
from measure_traces import make_trace


def estimate(value: float) -> Estimate:
    return Estimate(value, value - 0.01, value + 0.01)


def make_load(layer: int, counts: Sequence[int], group: str | None = None) -> Load:
    n = np.array(counts)
    share = n / max(n.sum(), 1)
    used = share[share > 0]
    return Load(
        layer=layer,
        group=group,
        counts=n,
        dropped=None,
        share=share,
        max_violation=estimate(float(share.max() * len(n) - 1)),
        requested_max_violation=None,
        cv=estimate(float(n.std() / max(n.mean(), 1e-9))),
        entropy=estimate(float(-(used * np.log2(used)).sum())),
        dead=tuple(np.flatnonzero(n == 0).tolist()),
        cold=tuple(np.flatnonzero((share > 0) & (share < 0.1 / len(n))).tolist()),
    )


def make_information(layer: int, bits: float = 0.5, control: float = 0.1, experts: int = 8) -> DomainInformation:
    share = np.random.default_rng(layer).random((3, experts))
    names = ("code", "prose", "sums")
    share /= share.sum(1, keepdims=True)
    return DomainInformation(layer, estimate(bits), control, control * 1.2, share, names)


def make_curve(layer: int, lru: Sequence[float], experts: int = 8) -> CacheCurve:
    """Capacities are 2, 4, ... up to `experts`, one for each hit rate."""
    capacity = np.linspace(2, experts, len(lru)).round().astype(int)
    hits = np.array(lru)
    return CacheCurve(
        layer, capacity, capacity / 2, np.minimum(hits + 0.05, 1), hits, 16, "miss", 1000, 500, hits * 0.5
    )


def make_locality(layer: int | None, srp: float = 0.7, experts: int = 8) -> Locality:
    M = 3
    values = tuple(estimate(srp - 0.1 * i) for i in range(M))
    return Locality(
        layer, np.array([4, 16, 64]), values, np.full(M, 1.3), np.zeros((M, experts if layer is not None else 0)),
        np.full(M, 0.4), np.full(M, 0.35),
    )  # fmt: skip


def random_trace(
    folder: Path, *, layers: int = 3, experts: int = 8, top_k: int = 2, length: int = 600, seed: int = 0, **options: Any
) -> Trace:
    """Documents of 60 tokens in turns of three domains, each domain preferring other experts."""
    rng = np.random.default_rng(seed)
    document = np.arange(length) // 60
    domain = document % 3
    scores = {
        layer: rng.normal(size=(length, experts)) + 2 * (np.arange(experts) % 3 == domain[:, None])
        for layer in range(layers)
    }
    settings: dict[str, Any] = {
        "tokens": np.random.default_rng(99).integers(0, 50, length).tolist(),  # whatever the seed
        "sequences": document.tolist(),
        "domains": domain.tolist(),
        "domain_names": ("code", "prose", "sums"),
        "logits": scores,
        "weights": {layer: rng.random((length, top_k)) for layer in scores},
        "part_rows": 200,
    } | options
    chosen = {layer: np.argsort(-score, axis=1)[:, :top_k] for layer, score in scores.items()}
    return make_trace(folder, chosen, experts, **settings)


class WordTokenizer:
    """Stands in for a tokenizer: token 7 is the word that `odd` says, every other one its number with a space."""

    def __init__(self, odd: str = " seven") -> None:
        self.odd = odd

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return [self.decode([number]) for number in ids]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.odd if number == 7 else f" w{number}" for number in ids)
