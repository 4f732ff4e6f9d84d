"""Which experts follow, and accompany, which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from collegium.report.figure import DIVERGING, Choice, Figure, Readout, heat_map
from collegium.report.figures._columns import cells, layer_choice, many, number, plot_lines, spread, top_of

__all__ = ["affinity", "coactivation", "flow"]


def flow(results: Sequence[Any]) -> Figure:
    """Expert x expert of the next layer: where the tokens of an expert go next."""
    shown = spread(results, [found.transition.size for found in results])
    names = ("layer", "expert", "next", "probability")
    columns = cells(((found.layer, np.asarray(found.transition, np.float64)) for found in shown), names)
    spec, readout = heat_map(
        Readout("next", "expert in the next layer"),
        Readout("expert", "expert"),
        Readout("probability", "share of next assignments", ".1%"),
        rows=2 * max(len(found.transition) for found in shown),
        domain=(0.0, top_of(columns["probability"], 0.02)),
        height=420,
    )
    best = max(results, key=lambda found: number(found.information) - number(found.control))
    alt = (
        f"From layer {best.layer} to {best.next_layer} the next expert depends most on this one: "
        f"{number(best.information):.2f} bits, {number(best.control):.2f} if layers were independent. The likeliest "
        f"successors get {number(best.concentration):.0%} of the assignments; {best.even:.0%} would be even."
    )
    caption = "Each row sums to 100 %. Bright cells are paths that many tokens take. " + _left_out(results, shown)
    ordered = sorted(shown, key=lambda found: found is not best)
    labels = tuple(f"layer {found.layer} to {found.next_layer}" for found in ordered)
    choice = Choice("layer", "layers", tuple(found.layer for found in ordered), labels)
    return Figure("flow", "From layer to layer", caption.strip(), alt, spec, columns, (choice,), readout, bits=7)


def affinity(results: Sequence[Any]) -> Figure:
    """How concentrated the successors of an expert are, layer by layer."""
    kinds = {
        "measured": [(found.layer, found.concentration) for found in results],
        "tokens of the next layer shuffled": [(found.layer, found.concentration_control) for found in results],
    }
    values = np.array([number(found.concentration) for found in results])
    alt = (
        f"The likeliest successors of an expert get {values.min():.0%} to {values.max():.0%} of its tokens' next "
        f"assignments; {results[0].even:.0%} would be even."
    )
    spec, columns = plot_lines(kinds, Readout("mass", "mass of the likeliest successors", ".0%"))
    caption = (
        "As many successors as the next layer chooses. High: experts of neighbouring layers can be placed together."
    )
    return Figure("affinity", "Affinity between neighbouring layers", caption, alt, spec, columns)


def coactivation(results: Sequence[Any]) -> Figure | None:
    """Expert x expert of a chosen layer: chosen together more or less often than independent choices would be."""
    if not any(found.counts.any() for found in results):
        return None  # one expert a token
    shown = spread(results, [found.lift.size for found in results], 250_000)
    columns = cells(
        ((f.layer, _log2(np.asarray(f.lift, np.float64))) for f in shown), ("layer", "expert", "other", "lift")
    )
    count = cells(((f.layer, np.asarray(f.counts)) for f in shown), ("layer", "expert", "other", "count"))["count"]
    columns["count"] = count
    kept = columns["expert"] != columns["other"]
    columns = {name: values[kept] for name, values in columns.items()}
    spec, readout = heat_map(
        Readout("other", "expert"),
        Readout("expert", "expert"),
        Readout("lift", "together / expected, log2", "+.1f"),
        Readout("count", "tokens", ","),
        rows=2 * max(len(found.lift) for found in shown),
        scheme=DIVERGING,
        domain=(-3.0, 3.0),
        height=420,
    )
    pairs = [(found.layer, *pair) for found in results for pair in found.strongest[:1]]
    alt = f"No pair of experts stands out in {many(len(results), 'layer')}."
    if pairs:
        layer, i, j, lift = max(pairs, key=lambda pair: pair[3])
        alt = (
            f"Strongest pair: experts {i} and {j} of layer {layer}, chosen together {lift:.1f} times as often as their "
            "popularity explains."
        )
    caption = (
        "Orange, +1: together twice as often as the popularity of the two explains; blue, -1: half as often. "
        + _left_out(results, shown)
    )
    layers = [found.layer for found in shown]
    title, choices = "Experts chosen together", (layer_choice(layers),)
    return Figure("coactivation", title, caption.strip(), alt, spec, columns, choices, readout, bits=7)


def _log2(lift: Any) -> Any:
    return np.clip(np.log2(np.where(lift > 0, lift, 2.0**-6)), -6, 6)


def _left_out(results: Sequence[Any], shown: Sequence[Any]) -> str:
    if len(shown) == len(results):
        return ""
    return f"{len(shown)} of {len(results)} layers are shown, at even distances, to keep the page small."
