"""The figures of the page of a smaller model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from collegium.compress.judge_result import Judgement
from collegium.compress.plan import LayerPlan, Plan
from collegium.measure.estimate import Estimate
from collegium.report.figure import Figure, Readout, heat_map, tooltip
from collegium.report.figures._columns import LAYER, many, number, plot_lines, top_of

__all__ = ["expert_map", "loss_by_domain", "loss_increase", "output_error", "shares_by_layer"]

_ORIGINAL = "original"
_CROSS = "M-1,-1L1,1M-1,1L1,-1"

Rows = Sequence[tuple[str, str, float | Estimate]]
"""``(line, domain, value)``."""


def loss_by_domain(judged: Mapping[str, Judgement]) -> Figure | None:
    """Loss of each domain: of the original, and of each that was judged."""
    rows: list[tuple[str, str, float | Estimate]] = []
    source = _against_original(judged)
    if source is not None:
        rows += [(_ORIGINAL, one.domain, number(one.whole_loss)) for one in _all(source)]
    for kind, found in judged.items():
        rows += [(kind, one.domain, one.loss) for one in _all(found)]
    if not rows:
        return None
    spec, columns = _dots(rows, Readout("loss", "nats per token", ".3f"))
    by_domain: dict[str, list[str]] = {}
    for kind, domain, value in rows:
        by_domain.setdefault(domain, []).append(f"{kind.partition(' (')[0]} {number(value):.3f}")
    words = "; ".join(f"{domain}: {', '.join(parts)}" for domain, parts in by_domain.items())
    alt = f"Nats per token of each domain. {words}."
    caption = "Held-out documents; bars are 95 % intervals over documents. Left is better."
    return Figure("loss", "Loss by domain", caption, alt, spec, columns)


def loss_increase(judged: Mapping[str, Judgement]) -> Figure | None:
    """How much each domain loses; differences of the same documents have tighter intervals than losses."""
    rows = [
        (kind, one.domain, one.difference)
        for kind, found in judged.items()
        for one in _all(found)
        if one.difference is not None
    ]
    if not rows:
        return None
    spec, columns = _dots(rows, Readout("more", "more nats per token than the original", "+.3f"), zero=True)
    last = [(domain, value) for kind, domain, value in rows if kind == rows[-1][0]]
    alt = "More nats per token than the original: " + ", ".join(f"{d} {number(v):+.3f}" for d, v in last) + "."
    caption = (
        "The same documents in both models, so that their difficulty cancels; 95 % intervals. At 0 nothing is lost."
    )
    return Figure("increase", "What is lost in each domain", caption, alt, spec, columns)


def _all(found: Judgement) -> list[Any]:
    return [*found.domains, found.overall]


def _against_original(judged: Mapping[str, Judgement]) -> Judgement | None:
    """The last that was compared with the original."""
    found = [one for one in judged.values() if one.whole is not None]
    return found[-1] if found else None


def _dots(rows: Rows, x: Readout, *, zero: bool = False) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """``(spec, columns)`` of one line of dots a domain, one dot a kind, with intervals."""
    columns: dict[str, list[Any]] = {"kind": [], "domain": [], x.column: [], "low": [], "high": []}
    for kind, domain, value in rows:
        ends = getattr(value, "low", np.nan), getattr(value, "high", np.nan)
        for into, entry in zip(columns.values(), (kind, domain, number(value), *ends), strict=True):
            into.append(entry)
    kinds, domains = (list(dict.fromkeys(columns[name])) for name in ("kind", "domain"))
    bounds = [Readout("low", "95 % from", x.format), Readout("high", "95 % to", x.format)]
    fields = tooltip([Readout("domain", "domain"), Readout("kind", "which"), x, *bounds])
    axis = {"format": x.format.replace("f", "~f"), "tickCount": 8}
    # the same colour in every figure, whether the original is in it or not
    coloured = [*(kind for kind in kinds if kind != _ORIGINAL), *(kind for kind in kinds if kind == _ORIGINAL)]
    legend = {"orient": "top", "labelLimit": 400}
    by = {"field": "kind", "type": "nominal", "title": None, "scale": {"domain": coloured}, "legend": legend}
    place = {"field": x.column, "type": "quantitative", "title": x.title, "scale": {"zero": zero}, "axis": axis}
    spec: dict[str, Any] = {
        "data": {"name": "table"},
        "width": 760,
        "height": 13 * len(domains) * (len(kinds) + 1),
        "encoding": {
            "y": {
                "field": "domain",
                "type": "nominal",
                "title": None,
                "sort": domains,
                "scale": {"paddingInner": 0.35},
            },
            "yOffset": {"field": "kind", "sort": kinds},
            "color": by,
        },
        "layer": [
            {
                "transform": [{"filter": "isValid(datum.low)"}],
                "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.6},
                "encoding": {"x": {**place, "field": "low"}, "x2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
                "encoding": {"x": place, "shape": by, "tooltip": fields},
            },
        ],
    }
    return spec, columns


def shares_by_layer(plan: Plan, judged: Mapping[str, Judgement]) -> Figure | None:
    """What the plan expected each layer to keep, beside what routers did."""
    kinds: dict[str, list[tuple[int, Any]]] = {}
    expected = [(one.layer, one.expected) for one in plan.layers if one.expected is not None]
    if expected:
        kinds["importance kept (from the plan)"] = expected
    found = _against_original(judged)
    for name, attribute in (
        ("original's choices still there", "present"),
        ("of those, chosen again", "agreement"),
    ):
        layers = [] if found is None else found.layers
        pairs = [(one.layer, getattr(one, attribute)) for one in layers if getattr(one, attribute) is not None]
        if pairs:
            kinds[name] = pairs
    if not kinds:
        return None
    spec, columns = plot_lines(kinds, Readout("share", "share", ".0%"), top=1.0)
    means = {name: float(np.mean([number(value) for _, value in pairs])) for name, pairs in kinds.items()}
    alt = "Mean over layers: " + ", ".join(f"{name} {value:.0%}" for name, value in means.items()) + "."
    caption = (
        "Choices are still there if the expert a token went to was kept (or is in a merged one). They are chosen again "
        "if the smaller model's router takes it, too, which depends on all layers before."
    )
    return Figure("shares", "Importance kept and routers' choices", caption, alt, spec, columns)


def output_error(judged: Mapping[str, Judgement]) -> Figure | None:
    """Relative error of the output of each MoE block."""
    kinds = {
        kind: [(one.layer, one.output_error) for one in found.layers if one.output_error is not None]
        for kind, found in judged.items()
    }
    kinds = {kind: pairs for kind, pairs in kinds.items() if pairs}
    if not kinds:
        return None
    spec, columns = plot_lines(kinds, Readout("error", "error / length of the output", ".2f"))
    pairs = list(kinds.values())[-1]
    worst = max(pairs, key=lambda pair: number(pair[1]))
    alt = (
        f"The error goes from {number(pairs[0][1]):.2f} in layer {pairs[0][0]} to {number(pairs[-1][1]):.2f} in layer "
        f"{pairs[-1][0]}; it is largest in layer {worst[0]}: {number(worst[1]):.2f}."
    )
    caption = (
        "Length of the difference between both models' outputs of the block, over the length of the original's; mean "
        "over tokens. Both run from the first layer on, so later layers include what differs before them."
    )
    return Figure("output-error", "How far the layers' outputs are off", caption, alt, spec, columns)


def expert_map(plan: Plan, supers: Mapping[int, Sequence[int]]) -> Figure | None:
    """Layer x expert: importance, and which experts went; None where all stay, and only lose neurons."""
    if all(one.op in ("slim", "factor") for one in plan.layers):
        return None
    parts = [_cells(one, supers.get(one.layer, ())) for one in plan.layers]
    columns: dict[str, Any] = {name: [v for part in parts for v in part[name]] for name in parts[0]}
    widest = max(one.num_experts for one in plan.layers)
    scored = any(one.scores for one in plan.layers)
    value = Readout("relative", "importance / even share", ".2f")
    spec, readout = heat_map(
        Readout("expert", "expert"),
        LAYER,
        value,
        Readout("fate", "fate"),
        rows=len(plan.layers),
        domain=(0.0, top_of(np.asarray(columns["relative"], float), 2.0)),
    )
    if not scored:
        spec["layer"][0]["encoding"]["color"]["legend"] = None
    axes = {axis: spec["layer"][0]["encoding"][axis] for axis in ("x", "y")}
    # marks must not be larger than cells
    size = float(np.clip(min(760 / widest, spec["height"] / len(plan.layers)) * 0.55, 3, 14)) ** 2
    for test, mark in (
        ("datum.gone === 1", {"shape": _CROSS, "stroke": "#d55e00", "filled": False, "strokeWidth": 2}),
        ("datum.super === 1", {"shape": "diamond", "stroke": "#ffffff", "fill": "#d55e00", "strokeWidth": 1}),
    ):
        spec["layer"].insert(
            -1,
            {
                "transform": [{"filter": test}],
                "mark": {"type": "point", "size": size, "opacity": 1, "tooltip": None, **mark},
                "encoding": axes,
            },
        )
    caption = "Crosses: experts that went" + (" (or were merged into another)." if _merged(plan) else ".")
    if any(supers.values()):
        caption += " Diamonds: super experts."
    return Figure("experts", "Which experts went", caption, _map_words(plan), spec, columns, (), readout)


def _cells(layer: LayerPlan, supers: Sequence[int]) -> dict[str, list[Any]]:
    E, protected = layer.num_experts, set(layer.protected)
    kept, into = set(layer.keep), {e: group[0] for group in layer.members for e in group[1:]}

    def fate(e: int) -> str:
        if e in into:
            return f"merged into {into[e]}"
        if e not in kept:
            return "gone"
        return "kept, super expert" if e in supers else "kept, protected" if e in protected else "kept"

    return {
        "layer": [layer.layer] * E,
        "expert": list(range(E)),
        "relative": [score * E for score in layer.scores] or [1.0] * E,
        "gone": [int(e not in kept) for e in range(E)],
        "super": [int(e in supers) for e in range(E)],
        "fate": [fate(e) for e in range(E)],
    }


def _merged(plan: Plan) -> bool:
    return any(len(group) > 1 for one in plan.layers for group in one.members)


def _map_words(plan: Plan) -> str:
    words = [
        f"layer {one.layer} keeps {len(one.keep)} of {one.num_experts}"
        + ("" if one.expected is None else f" with {one.expected:.0%} of the importance")
        for one in plan.layers
    ]
    shown = words if len(words) <= 8 else [*words[:8], f"and {many(len(words) - 8, 'layer')} more"]
    return _capital("; ".join(shown) + ".")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
