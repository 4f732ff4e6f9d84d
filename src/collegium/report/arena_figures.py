"""The figures of an arena's page."""

from __future__ import annotations

from typing import Any

import numpy as np

from collegium.arena import LABELS, Results
from collegium.arena.results import SCALES, formatted
from collegium.report.figure import DIVERGING, Figure, Readout, heat_map, tooltip

__all__ = ["arena_figures"]

_SHOWN = (
    "bits_per_byte", "max_violation", "dead_experts", "specialisation", "active_experts", "fluctuation",
    "flops_per_token", "tokens_per_second", "peak_memory",
)  # fmt: skip


def arena_figures(results: Results) -> list[Figure]:
    """All figures, those without anything to draw left out."""
    found = [_numbers(results), _balance(results), _domains(results), _tournament(results)]
    return [figure for figure in found if figure is not None]


def _numbers(results: Results) -> Figure:
    columns: dict[str, list[Any]] = {"number": [], "method": [], "seed": [], "value": [], "mean": []}
    for number in _SHOWN:
        for one in results.entries:
            for seed, value in enumerate(one.numbers.get(number, ())):
                scale = SCALES.get(number, 1.0)
                row = (LABELS[number], one.name, seed, scale * value, scale * one.mean(number))
                for into, entry in zip(columns.values(), row, strict=True):
                    into.append(entry)
    y = {"field": "method", "type": "nominal", "title": None, "sort": [one.name for one in results.entries]}
    x = {"type": "quantitative", "title": None, "scale": {"zero": False, "nice": True}, "axis": {"tickCount": 4}}
    fields = tooltip([Readout("method", "method"), Readout("value", "value", ".4~g"), Readout("mean", "mean", ".4~g")])
    spec: dict[str, Any] = {
        "data": {"name": "table"},
        "columns": 3,
        "facet": {
            "field": "number",
            "type": "nominal",
            "title": None,
            "sort": [LABELS[number] for number in _SHOWN],
            "header": {"labelFontWeight": 600},
        },
        "resolve": {"scale": {"x": "independent"}},
        "spec": {
            "width": 175,
            "height": 15 * len(results.entries),
            "layer": [
                {
                    "mark": {"type": "tick", "thickness": 2.5, "size": 11, "opacity": 1},
                    "encoding": {"x": {**x, "field": "mean", "aggregate": "mean"}, "y": y},
                },
                {
                    "mark": {"type": "point", "filled": True, "size": 22, "opacity": 0.7, "color": "#d55e00"},
                    "encoding": {"x": {**x, "field": "value"}, "y": y, "tooltip": fields},
                },
            ],
        },
    }
    best = results.ranked[0] if results.ranked else results.entries[0]
    alt = (
        f"{best.name} predicts best, {formatted('bits_per_byte', best.numbers['bits_per_byte'])} bits per byte. All "
        "numbers are in the table."
    )
    caption = "A dot for each seed, a bar for their mean. Every scale is its own, and does not begin at 0."
    return Figure("numbers", "Numbers at a glance", caption, alt, spec, columns)


def _balance(results: Results) -> Figure | None:
    ranked = results.ranked
    if not ranked:
        return None
    columns: dict[str, list[Any]] = {
        "method": [one.name for one in ranked],
        "violation": [one.mean("max_violation") for one in ranked],
        "bits": [one.mean("bits_per_byte") for one in ranked],
        "specialisation": [one.mean("specialisation") for one in ranked],
    }
    x, y = Readout("violation", "MaxVio (0 is even)", ".2f"), Readout("bits", "bits per byte", ".3f")
    size = Readout("specialisation", "I(domain; expert), bits", ".2f")
    axes = {
        axis: {"field": r.column, "type": "quantitative", "title": r.title, "scale": {"zero": False, "padding": 12}}
        for axis, r in (("x", x), ("y", y))
    }
    spec: dict[str, Any] = {
        "data": {"name": "table"},
        "width": 700,
        "height": 380,
        "encoding": axes,
        "layer": [
            {
                "mark": {"type": "point", "filled": True, "opacity": 0.9},
                "encoding": {
                    "size": {
                        "field": size.column,
                        "type": "quantitative",
                        "title": size.title,
                        "legend": {"orient": "top"},
                    },
                    "tooltip": tooltip([Readout("method", "method"), x, y, size]),
                },
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 9, "fontSize": 11},
                "encoding": {"text": {"field": "method"}},
            },
        ],
    }
    even = min(ranked, key=lambda one: one.mean("max_violation"))
    alt = (
        f"{ranked[0].name} has the fewest bits per byte at a MaxVio of {ranked[0].mean('max_violation'):.2f}; "
        f"{even.name} is the most even ({even.mean('max_violation'):.2f}) at {even.mean('bits_per_byte'):.3f} bits."
    )
    caption = "Down and to the left is better. Larger dots: experts that serve particular domains. Means over seeds."
    return Figure("balance", "Quality and balance", caption, alt, spec, columns)


def _domains(results: Results) -> Figure | None:
    base = next((one for one in results.entries if one.name == results.plan.baseline), None)
    ranked = [one for one in results.ranked if one is not base]
    if base is None or not ranked:
        return None
    columns: dict[str, list[Any]] = {"domain": [], "method": [], "more": [], "bits": []}
    for one in ranked:
        for domain, values in one.domains.items():
            bits, than = float(np.mean(values)), float(np.mean(base.domains[domain]))
            for into, entry in zip(columns.values(), (domain, one.name, bits / than - 1, bits), strict=True):
                into.append(entry)
    most = max(0.01, float(np.abs(columns["more"]).max()))
    title = f"bits per byte, against {base.name}"
    spec, readout = heat_map(
        Readout("domain", "domain"),
        Readout("method", ""),
        Readout("more", title, "+.1%"),
        Readout("bits", "bits per byte", ".3f"),
        rows=len(ranked),
        scheme=DIVERGING,
        domain=(-most, most),
        height=22 * len(ranked),
    )
    low = int(np.argmin(columns["more"]))
    high = int(np.argmax(columns["more"]))
    cell = [f"{columns['method'][i]} on {columns['domain'][i]}, {columns['more'][i]:+.1%}" for i in (low, high)]
    alt = f"Least against {base.name}: {cell[0]}; most: {cell[1]}."
    caption = f"Bits per byte of each domain, as a share above (orange) or below (blue) {base.name}'s; mean of seeds."
    return Figure("domains", "Domain by domain", caption, alt, spec, columns, (), readout)


def _tournament(results: Results) -> Figure | None:
    ranking, ranked = results.ranking(), results.ranked
    if ranking is None:
        return None
    columns: dict[str, list[Any]] = {"method": [], "leaving": [], "points": [], "bits": []}
    for leaving, points in zip(ranking.leaving, ranking.points_leaving, strict=True):
        for one, value in zip(ranked, points, strict=True):
            words = "nobody leaves" if not leaving else f"{leaving} leave after each round"
            for into, entry in zip(
                columns.values(), (one.name, words, float(value), one.mean("bits_per_byte")), strict=True
            ):
                into.append(entry)
    order = [ranked[i].name for i in np.argsort(-ranking.points, kind="stable")]
    kinds = list(dict.fromkeys(columns["leaving"]))
    by = {"field": "leaving", "type": "nominal", "title": None, "scale": {"domain": kinds}, "legend": {"orient": "top"}}
    x = Readout("points", f"mean points of {len(ranked[0].domains)}", ".2f")
    spec: dict[str, Any] = {
        "data": {"name": "table"},
        "width": 700,
        "height": 18 * len(ranked),
        "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
        "encoding": {
            "y": {"field": "method", "type": "nominal", "title": None, "sort": order},
            "x": {"field": "points", "type": "quantitative", "title": x.title},
            "color": by,
            "shape": by,
            "tooltip": tooltip([Readout("method", "method"), Readout("leaving", "rule"), x]),
        },
    }
    alt = (
        f"In tournaments over the domains {order[0]} comes first, then {', '.join(order[1:3])}; {order[-1]} comes last."
    )
    caption = (
        "A round for each domain; methods with equal points meet, the fewer bits per byte win. One that falls faster "
        "when the weakest leave is good at few domains."
    )
    return Figure("tournament", "Ranking by Swiss rounds", caption, alt, spec, columns)
