"""Do neighbouring tokens use the same experts, and what would a cache of experts gain?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from collegium.measure.estimate import Estimate
from collegium.report.figure import Choice, Figure, Readout
from collegium.report.figures._columns import Array, number, plot_lines

__all__ = ["WHOLE", "cache", "consistency", "consistency_by_layer", "mean_curve", "num_experts"]

WHOLE = -1
"""Code of the whole model among layers."""
_SEGMENT = 16
_KINDS = {"measured": "srp", "tokens shuffled": "shuffled", "every expert always on (bound)": "bound"}
_POLICIES = {
    "least recently used (LRU)": "lru",
    "oracle with a short horizon (SCH)": "sch",
    "LRU, tokens shuffled": "lru_shuffled",
}


def consistency(results: Sequence[Any]) -> Figure | None:
    """SRP against the length of the segment, of a chosen layer or the whole model; None if no sequence is as long."""
    if not any(np.isfinite(number(value)) for found in results for value in found.srp):
        return None
    ordered = sorted(results, key=lambda found: found.layer is not None)
    codes = [WHOLE if found.layer is None else found.layer for found in ordered]
    segments = [int(m) for m in ordered[0].segments]
    kinds = {
        kind: [(m, value) for found in ordered for m, value in zip(segments, getattr(found, name), strict=True)]
        for kind, name in _KINDS.items()
    }
    ratio = [number(value) for found in ordered for value in found.size_ratio]
    spec, columns = plot_lines(
        kinds,
        Readout("srp", "SRP", ".2f"),
        x=Readout("segment", "tokens in a segment"),
        top=1.0,
        more={
            "layer": np.tile(np.repeat(codes, len(segments)), len(kinds)).tolist(),
            "size_ratio": [*ratio, *[float("nan")] * (len(kinds) - 1) * len(ratio)],
        },
    )
    caption = (
        "SRP is how well one fixed choice of experts can serve a stretch of tokens (F1 score; 1: always the same "
        "experts). What lies above the shuffled line is real locality: a cache or a prefetcher can use it."
    )
    labels = tuple("whole model" if found.layer is None else f"layer {found.layer}" for found in ordered)
    choice = Choice("layer", "layer", tuple(codes), labels)
    return Figure("locality", "Local routing consistency", caption, _words(ordered[0]), spec, columns, (choice,))


def _words(found: Any) -> str:
    place = "The whole model" if found.layer is None else f"Layer {found.layer}"
    parts = [
        f"{number(srp):.2f} over {m} tokens ({number(shuffled):.2f} when shuffled)"
        for m, srp, shuffled in zip(found.segments, found.srp, found.shuffled, strict=True)
        if np.isfinite(number(srp))
    ]
    return f"{place}: SRP " + ", ".join(parts) + "."


def consistency_by_layer(results: Sequence[Any]) -> Figure | None:
    """SRP of each layer for segments of 16 tokens (or the nearest length); None if no sequence is that long."""
    layers = [found for found in results if found.layer is not None]
    at = int(np.abs(np.asarray(layers[0].segments) - _SEGMENT).argmin())
    segment = int(layers[0].segments[at])
    srp = np.array([number(found.srp[at]) for found in layers])
    if not np.isfinite(srp).all():
        return None
    kinds = {kind: [(found.layer, getattr(found, name)[at]) for found in layers] for kind, name in _KINDS.items()}
    alt = (
        f"Over {segment} tokens SRP lies between {srp.min():.2f} and {srp.max():.2f}; it is highest in layer "
        f"{layers[int(srp.argmax())].layer}."
    )
    spec, columns = plot_lines(kinds, Readout("srp", f"SRP over {segment} tokens", ".2f"), top=1.0)
    caption = "Layers whose line is far above the shuffled one keep using the same experts for a while."
    return Figure("locality-layers", "Locality of each layer", caption, alt, spec, columns)


def mean_curve(curves: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
    """``(fraction, rates)``: hit rates, by attribute of the curves, when each layer keeps that fraction of its experts.

    Layers count by their requests; their curves are interpolated where they were measured at other sizes.
    """
    grid = np.unique(np.concatenate([_fraction(curve) for curve in curves]).round(6))
    grid = grid[grid >= max(_fraction(curve)[0] for curve in curves) - 1e-6]
    requests = np.array([max(curve.requests, 1) for curve in curves], np.float64)
    weight = requests / requests.sum()
    rates = {
        name: weight @ np.stack([np.interp(grid, _fraction(curve), getattr(curve, name)) for curve in curves])
        for name in _POLICIES.values()
    }
    return grid, rates


def _mean_intervals(curves: Sequence[Any], grid: Array) -> dict[str, Array | None]:
    """``[C, 2]`` intervals of `mean_curve`, by attribute of the curves; None where a layer has none.

    They are the means of the layers' intervals. As all layers saw the same documents their rates go up and down
    together, and if they did so exactly these would be right; else they are too wide, never too narrow.
    """
    requests = np.array([max(curve.requests, 1) for curve in curves], np.float64)
    weight = requests / requests.sum()
    found: dict[str, Array | None] = {}
    for name in _POLICIES.values():
        ends: list[Any] = [getattr(curve, f"{name}_interval", None) for curve in curves]
        found[name] = None
        if all(end is not None for end in ends):
            pairs = zip(curves, ends, strict=True)
            at_grid = [[np.interp(grid, _fraction(curve), end[:, side]) for side in (0, 1)] for curve, end in pairs]
            found[name] = np.tensordot(weight, np.array(at_grid), 1).T
    return found


def _estimates(rates: Array, interval: Array | None) -> list[Any]:
    if interval is None:
        return [float(rate) for rate in rates]
    return [Estimate(float(rate), *map(float, ends)) for rate, ends in zip(rates, interval, strict=True)]


def _fraction(curve: Any) -> Any:
    return np.asarray(curve.capacity) / num_experts(curve)


def num_experts(curve: Any) -> int:
    """E of the layer: the curve ends where the whole layer is kept."""
    return int(np.asarray(curve.capacity)[-1])


def cache(curves: Sequence[Any], expert_bytes: int | None = None) -> Figure:
    """Hit rate against the part of a layer's experts that is kept in fast memory."""
    grid, rates = mean_curve(curves)
    total = sum(num_experts(curve) for curve in curves)
    intervals = _mean_intervals(curves, grid)
    parts = [(WHOLE, grid, {name: _estimates(rates[name], intervals[name]) for name in rates}, grid * total)]
    for curve in curves:
        own = {
            name: _estimates(getattr(curve, name), getattr(curve, f"{name}_interval", None))
            for name in _POLICIES.values()
        }
        parts.append((curve.layer, _fraction(curve), own, np.asarray(curve.capacity)))
    kinds = {
        kind: [pair for _, fraction, hits, _ in parts for pair in zip(fraction, hits[name], strict=True)]
        for kind, name in _POLICIES.items()
    }
    held = [round(float(count)) for _, _, _, experts in parts for count in experts] * len(kinds)
    layers = [code for code, fraction, _, _ in parts for _ in fraction] * len(kinds)
    more: dict[str, list[Any]] = {"layer": layers, "experts": held}
    fields = [Readout("experts", "experts kept", ",")]
    if expert_bytes:
        more["megabytes"] = [count * expert_bytes / 1e6 for count in held]
        fields.append(Readout("megabytes", "megabytes", ",.1f"))
    spec, columns = plot_lines(
        kinds,
        Readout("hits", "requests served from it", ".0%"),
        x=Readout("fraction", "part of the experts kept in fast memory", ".0%"),
        top=1.0,
        ordinal=False,
        fields=fields,
        more=more,
    )
    half = {name: float(np.interp(0.5, grid, values)) for name, values in rates.items()}
    alt = (
        f"With half of the experts of each layer kept, least recently used serves {half['lru']:.0%} of the requests "
        f"({half['lru_shuffled']:.0%} on shuffled tokens) and the short-sighted oracle {half['sch']:.0%}."
    )
    caption = (
        "A request is one expert of one token. First touches count as misses. SCH looks a few tokens ahead: what a "
        "good prefetcher could reach. "
    )
    lru = intervals["lru"]
    if lru is None:
        caption += "There are no intervals: they need several documents."
    else:
        low, high = (float(np.interp(0.5, grid, lru[:, side])) for side in (0, 1))
        alt += f" The 95 % interval of least recently used is {low:.1%} to {high:.1%}."
        caption += "Bands: 95 % intervals over documents; of all layers the mean of theirs, at the most too wide."
    labels = ("all layers", *(f"layer {curve.layer}" for curve in curves))
    choice = Choice("layer", "layer", (WHOLE, *(curve.layer for curve in curves)), labels)
    return Figure("cache", "What a cache of experts would serve", caption, alt, spec, columns, (choice,))
