"""What the experts do: domains, tokens, positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from collegium.measure.specialisation import DomainInformation
from collegium.report.figure import DIVERGING, Figure, Readout, heat_map
from collegium.report.figures._columns import cells, layer_choice, number, plot_lines

__all__ = ["domain_bits", "domain_map", "excess", "favourites", "token_bits"]

_REACH = 3.0  # a domain that uses an expert 8 times as often as domains do on average has the last colour


def domain_map(information: Sequence[DomainInformation]) -> Figure:
    """Domain x expert of a chosen layer: how much more or less often than on average a domain uses an expert."""
    best = max(information, key=excess)
    ordered = [best, *(found for found in information if found is not best)]
    columns: dict[str, Any] = dict(
        cells(((f.layer, f.share) for f in information), ("layer", "row", "expert", "share"))
    )
    columns["lift"] = np.concatenate([_lift(found.share).ravel() for found in information])
    seen = np.concatenate([np.repeat(found.share.sum(1) > 0, found.share.shape[1]) for found in information])
    columns = {name: values[seen] for name, values in columns.items()}
    names = information[0].domains
    columns["domain"] = [names[row] for row in columns.pop("row")]
    spec, readout = heat_map(
        Readout("expert", "expert"),
        Readout("domain", "domain"),
        Readout("lift", "use / mean use, log2", "+.1f"),
        Readout("share", "share of the domain's assignments", ".1%"),
        rows=2 * len(names),
        scheme=DIVERGING,
        domain=(-_REACH, _REACH),
    )
    layers = tuple(found.layer for found in ordered)
    caption = (
        "Orange, +1: twice as often as domains do on average; blue, -1: half as often. First shown: the layer that "
        "tells domains apart best."
    )
    title, choices = "Which experts serve which domain", (layer_choice(layers),)
    return Figure("domains", title, caption, _domain_words(best), spec, columns, choices, readout)


def excess(found: DomainInformation) -> float:
    """Bits about the domain beyond the shuffled control, by which layers are compared."""
    return number(found.bits) - found.control


def _lift(share: Any) -> Any:
    seen = share.sum(1) > 0
    mean = share[seen].mean(0) if seen.any() else share.mean(0)
    ratio = share / np.where(mean > 0, mean, 1)
    return np.clip(np.log2(np.where(ratio > 0, ratio, 2.0**-6)), -6, 6) * (mean > 0)


def favourites(found: DomainInformation, count: int = 2) -> list[tuple[str, list[tuple[int, float]]]]:
    """``(domain, its most used experts with their shares)`` of every domain that has tokens."""
    return [
        (name, [(int(e), float(share[e])) for e in share.argsort(kind="stable")[::-1][:count]])
        for name, share in zip(found.domains, found.share, strict=True)
        if share.sum()
    ]


def _domain_words(found: DomainInformation) -> str:
    parts = [
        f"{name}: " + ", ".join(f"expert {expert} {share:.0%}" for expert, share in experts)
        for name, experts in favourites(found)
    ]
    return f"Layer {found.layer}, the experts each domain uses most. " + "; ".join(parts) + "."


def domain_bits(information: Sequence[DomainInformation]) -> Figure:
    """I(domain; expert) of each layer beside its shuffled control."""
    kinds: dict[str, list[tuple[int, Any]]] = {
        "measured": [(found.layer, found.bits) for found in information],
        "labels shuffled over documents": [(found.layer, found.control) for found in information],
    }
    best = max(information, key=excess)
    beats = sum(number(found.bits) > found.control_high for found in information)
    alt = (
        f"Beyond chance layer {best.layer} tells most about the domain: {number(best.bits):.3f} bits, "
        f"{best.control:.3f} with shuffled labels. {beats} of {len(information)} layers exceed every shuffle."
    )
    spec, columns = plot_lines(kinds, Readout("bits", "bits", ".2f"))
    caption = "Mutual information of the domain of a token and its expert. Only what exceeds the control is structure."
    return Figure("domain-bits", "How much an expert tells about the domain", caption, alt, spec, columns)


def token_bits(results: Sequence[Any]) -> Figure | None:
    """What token id, position, and domain given the token tell about the expert, with controls; None where no token id
    is frequent enough."""
    if not any(found.coverage for found in results):
        return None
    names = {
        "token id": "token",
        "token id, shuffled": "token_control",
        "position": "position",
        "position, shuffled": "position_control",
        "domain, given the token": "domain_given_token",
        "domain given the token, shuffled": "domain_given_token_control",
    }
    kinds: dict[str, list[tuple[int, Any]]] = {
        kind: [(found.layer, getattr(found, name)) for found in results if getattr(found, name) is not None]
        for kind, name in names.items()
    }
    best = max(results, key=lambda found: number(found.token))
    excess = [number(found.token) - number(found.token_control) for found in results]
    alt = (
        f"The token id tells {np.mean(excess):.2f} bits about the expert beyond chance on average over layers, most in "
        f"layer {best.layer}: {number(best.token):.2f} bits, {number(best.token_control):.2f} when shuffled. "
        f"{best.coverage:.0%} of that layer's tokens have ids frequent enough to count."
    )
    spec, columns = plot_lines(kinds, Readout("bits", "bits about the expert", ".2f"))
    caption = (
        "High for the token id: experts follow the vocabulary more than the context. Compare with the shuffled lines."
    )
    return Figure("tokens", "Token, position and context", caption, alt, spec, columns)
