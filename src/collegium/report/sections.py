"""The sections of the page: which figures they hold, and what to record where something is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from collegium.report.figure import Figure
from collegium.report.figures import compare, flow, load, locality, router, specialisation, weights
from collegium.report.measured import Measured
from collegium.trace import Trace

__all__ = ["Section", "sections"]


@dataclass(frozen=True, eq=False)
class Section:
    """A part of the page: its anchor, title, the question it answers, its figures, and lines on what is missing."""

    name: str
    title: str
    lead: str
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]


Draw = Callable[[Any], Figure | None]


def sections(measured: Measured, *, expert_bytes: int | None = None) -> list[Section]:
    """All sections, in order; the one that compares only where there is a second trace."""
    found = [
        _section(
            measured,
            ("load", "Load", "How evenly the work is spread over experts, domains and time."),
            ("load", lambda result: load.load_map(result, measured.by_domain), None),
            ("load", load.balance, None),
            ("drift", load.drift, None),
            ("drops", load.drops, "Every token got all of its slots: nothing was dropped."),
        ),
        _section(
            measured,
            ("specialisation", "Specialisation", "What the experts do: which texts and which words go to them."),
            ("domains", specialisation.domain_map, None),
            ("domains", specialisation.domain_bits, None),
            ("tokens", specialisation.token_bits, "No token id is frequent enough to tell what it says about experts."),
        ),
        _section(
            measured,
            ("flow", "Flow", "Where tokens go from layer to layer, and which experts work together."),
            ("affinity", flow.flow, "One MoE layer was traced, so nothing flows between layers."),
            ("affinity", flow.affinity, None),
            ("coactivation", flow.coactivation, "Each token has one expert, so no two are chosen together."),
        ),
        _section(
            measured,
            ("locality", "Locality and caching", "How many experts have to be at hand, and for how long."),
            ("locality", locality.consistency, "No sequence is as long as a segment, so locality cannot be seen."),
            ("locality", locality.consistency_by_layer, None),
            ("cache", lambda result: locality.cache(result, expert_bytes), None),
        ),
        _section(
            measured,
            ("router", "The router", "How sure it is, and whether its choice can be known in advance."),
            ("confidence", router.confidence, None),
            ("confidence", router.needed, None),
            ("confidence", router.changed, "Each layer has one expert, so no other number of them is possible."),
            ("confidence", router.margin, None),
            ("predictability", router.predictability, None),
            ("congestion", router.congestion, "No layer lets balance and quality be told apart."),
        ),
        _section(
            measured,
            ("experts", "The experts themselves", "What only the weights show: super experts and copies."),
            ("super-experts", weights.super_experts, None),
            ("redundancy", weights.redundancy, None),
            ("redundancy", weights.likeness, None),
        ),
    ]
    return found if measured.other is None else [*found, _against(measured, measured.other)]


def _against(measured: Measured, other: Trace) -> Section:
    loads: Sequence[Any] = measured.other_results["load"]
    title = "Load of each expert in the other trace"
    return _section(
        measured,
        ("compare", "Against the other trace", f"Here: {measured.trace.folder.name}; the other: {other.folder.name}."),
        ("load", lambda result: load.load_difference(result, loads), "No layer has as many experts in both."),
        ("load", lambda _: load.load_map(loads, name="load-other", title=title), None),
        ("fluctuation", compare.fluctuation, None),
        ("early-routing", compare.early_routing, None),
    )


def _section(measured: Measured, head: tuple[str, str, str], *parts: tuple[str, Draw, str | None]) -> Section:
    """`parts` are (metric, figure of its result, what to say where the result has nothing to draw)."""
    figures: list[Figure] = []
    notes: list[str] = []
    for name, draw, nothing in parts:
        result = measured.get(name)
        if result is None:
            if name in measured.missing:
                notes.append(f"{name}: {measured.missing[name]}")
            continue
        figure = draw(result) if not isinstance(result, list) or result else None
        if figure is not None:
            figures.append(figure)
        elif nothing is not None:
            notes.append(nothing)
    return Section(*head, tuple(figures), tuple(dict.fromkeys(notes)))
