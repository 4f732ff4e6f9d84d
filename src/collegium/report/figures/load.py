"""How evenly the experts are used: over layers, domains, time and positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from collegium.measure.load import Load
from collegium.report.figure import DIVERGING, Choice, Figure, Readout, heat_map
from collegium.report.figures._columns import LAYER, Array, many, number, plot_lines, top_of

__all__ = ["balance", "drift", "drops", "load_difference", "load_map"]

_EXPERT = Readout("expert", "expert")
_ORDER = Choice("place", "order of experts", ("expert", "rank"), ("by id", "by load, busiest first"), copies=True)


def load_map(
    loads: Sequence[Load],
    by_domain: Sequence[Load] = (),
    *,
    name: str = "load",
    title: str = "Load of each expert",
) -> Figure:
    """Layer x expert: load relative to an even share, of all tokens or of one domain's."""
    groups = list(dict.fromkeys(str(load.group) for load in by_domain))
    columns = _columns(
        [(0, load) for load in loads] + [(1 + groups.index(str(load.group)), load) for load in by_domain]
    )
    relative = columns["relative"][columns["group"] == 0]
    spec, readout = heat_map(
        Readout("place", "expert, or place by load"),
        LAYER,
        Readout("relative", "load / even share", ".2f"),
        _EXPERT,
        Readout("share", "share of the layer's assignments", ".2%"),
        Readout("count", "assignments", ","),
        rows=len(loads),
        domain=(0.0, top_of(relative, 2.0)),
    )
    choices = [_ORDER]
    if groups:
        choices.insert(0, Choice("group", "tokens", tuple(range(1 + len(groups))), ("of all domains", *groups)))
    caption = "1 is an even share. Bright: busy experts; dark: idle ones. A layer with fewer experts ends earlier."
    return Figure(name, title, caption, _load_words(loads), spec, columns, tuple(choices), readout)


def _columns(loads: Sequence[tuple[int, Load]]) -> dict[str, Array]:
    parts: dict[str, list[Array]] = {n: [] for n in ("group", "layer", "expert", "rank", "relative", "share", "count")}
    for code, load in loads:
        E = len(load.share)
        rank = np.empty(E, np.int64)
        rank[np.argsort(-load.counts, kind="stable")] = np.arange(E)
        values = (np.full(E, code), np.full(E, load.layer), np.arange(E), rank, load.share * E, load.share, load.counts)
        for into, value in zip(parts.values(), values, strict=True):
            into.append(np.asarray(value))
    return {name: np.concatenate(found) for name, found in parts.items()}


def _load_words(loads: Sequence[Load]) -> str:
    busiest = max(loads, key=lambda load: float((load.share * len(load.share)).max()))
    expert = int(busiest.share.argmax())
    dead = sum(len(load.dead) for load in loads)
    cold = sum(len(load.cold) for load in loads)
    words = (
        f"{many(len(loads), 'layer')}. The busiest expert is number {expert} of layer {busiest.layer}, with "
        f"{busiest.share[expert] * len(busiest.share):.2f} times an even share. "
    )
    if dead:
        return (
            words + f"{many(dead, 'expert')} never used; {cold or 'none'} more got less than a tenth of an even share."
        )
    return words + f"Every expert was used; {cold or 'none'} got less than a tenth of an even share."


def balance(loads: Sequence[Load]) -> Figure:
    """MaxVio of each layer."""
    spec, columns = plot_lines(
        {"": [(load.layer, load.max_violation) for load in loads]},
        Readout("violation", "busiest expert / even share - 1 (MaxVio)", ".2f"),
        more={
            "cv": [number(load.cv) for load in loads],
            "entropy": [number(load.entropy) for load in loads],
            "even_entropy": [float(np.log2(len(load.share))) for load in loads],
        },
    )
    values = np.array(columns["violation"])
    alt = (
        f"The excess of the busiest expert over an even share lies between {values.min():.2f} (layer "
        f"{loads[int(values.argmin())].layer}) and {values.max():.2f} (layer {loads[int(values.argmax())].layer})."
    )
    caption = "0 is perfect balance; 1 means that the busiest expert works twice as much as the average one."
    return Figure("balance", "Imbalance of each layer", caption, alt, spec, columns)


def load_difference(loads: Sequence[Load], others: Sequence[Load]) -> Figure | None:
    """Layer x expert: load in this trace minus load in the other, of layers that both have alike."""
    theirs = {load.layer: load for load in others}
    both = [
        (load, theirs[load.layer])
        for load in loads
        if load.layer in theirs and len(theirs[load.layer].share) == len(load.share)
    ]
    if not both:
        return None
    columns = _columns([(0, load) for load, _ in both])
    other = np.concatenate([other.share * len(other.share) for _, other in both])
    columns |= {"other": other, "difference": columns["relative"] - other}
    reach = top_of(np.abs(columns["difference"]), 0.1)
    spec, readout = heat_map(
        _EXPERT,
        LAYER,
        Readout("difference", "difference, in even shares", "+.2f"),
        Readout("relative", "here", ".2f"),
        Readout("other", "other", ".2f"),
        rows=len(both),
        scheme=DIVERGING,
        domain=(-reach, reach),
    )
    worst = int(np.abs(columns["difference"]).argmax())
    moved = [float(np.abs(load.share - other.share).sum() / 2) for load, other in both]
    alt = (
        f"The largest change is in layer {columns['layer'][worst]}, expert {columns['expert'][worst]}: from "
        f"{other[worst]:.2f} even shares in the other trace to {columns['relative'][worst]:.2f} here. On average over "
        f"layers {np.mean(moved):.1%} of the load moved to other experts."
    )
    caption = "Orange: more than in the other trace; blue: less."
    return Figure("load-difference", "Load against the other trace", caption, alt, spec, columns, (), readout)


def drift(drifts: Sequence[Any]) -> Figure:
    """Layer x window: how far the load of a stretch of the trace is from the load of all of it."""
    parts = [(found.layer, np.asarray(found.shift, np.float64)) for found in drifts]
    columns = {
        "layer": np.concatenate([np.full(len(shift), layer) for layer, shift in parts]),
        "window": np.concatenate([np.arange(len(shift)) for _, shift in parts]),
        "shift": np.concatenate([shift for _, shift in parts]),
    }
    spec, readout = heat_map(
        Readout("window", "stretch of the trace, in recording order"),
        LAYER,
        Readout("shift", "load that is elsewhere", ".1%"),
        rows=len(parts),
        domain=(0.0, top_of(columns["shift"], 0.05)),
    )
    most = int(columns["shift"].argmax())
    alt = (
        f"The load of the stretches differs from that of the whole trace by {columns['shift'].mean():.1%} on average, "
        f"{np.mean([found.control for found in drifts]):.1%} with documents in random order; most in layer "
        f"{columns['layer'][most]}, stretch {columns['window'][most]}: {columns['shift'][most]:.1%}."
    )
    caption = (
        "Part of the load that other experts have than in the whole trace. Stripes show where the text, and with it "
        "the work of the experts, changes."
    )
    return Figure("drift", "Load over time", caption, alt, spec, columns, (), readout)


def drops(results: Sequence[Any]) -> Figure | None:
    """Layer x position: part of the slots that tokens did not get; None where every token got all of its slots."""
    ratios = [np.asarray(found.ratio, np.float64) for found in results]
    if not any(np.nansum(ratio) for ratio in ratios):
        return None
    columns = {
        "layer": np.concatenate([np.full(len(r), found.layer) for found, r in zip(results, ratios, strict=True)]),
        "position": np.concatenate([np.asarray(found.position) for found in results]),
        "ratio": np.concatenate(ratios),
    }
    bounds = []
    if all(found.interval is not None for found in results):
        ends = np.concatenate([found.interval for found in results])
        columns |= {"low": ends[:, 0], "high": ends[:, 1]}
        bounds = [Readout("low", "95 % from", ".1%"), Readout("high", "95 % to", ".1%")]
    spec, readout = heat_map(
        Readout("position", "position in the sequence, from"),
        LAYER,
        Readout("ratio", "slots that stayed empty", ".1%"),
        *bounds,
        rows=len(results),
        domain=(0.0, top_of(columns["ratio"], 0.01)),
    )
    most = int(np.nanargmax(columns["ratio"]))
    alt = (
        f"Most slots stayed empty in layer {columns['layer'][most]} from position {columns['position'][most]} on: "
        f"{columns['ratio'][most]:.1%}."
    )
    caption = "Slots that a token did not get: dropped by a capacity limit, or not used by the router."
    return Figure("drops", "Empty slots by position", caption, alt, spec, columns, (), readout)
