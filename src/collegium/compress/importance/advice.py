"""What the statistics say about which scores suit a model: numbers, and a rule of thumb that goes with them.

Scores that are sums over an expert's tokens count how much it is used, means do not. The rule is ours: where the load
is uneven, use tells experts apart, so sums; where it is even, it does not, so means. Nothing of it is proven.

Legend: E experts of a layer, C domains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from collegium.measure.statistics import Statistics

__all__ = ["UNEVEN", "Advice", "advise"]

UNEVEN = 0.5
"""A mean coefficient of variation of the load from which on it counts as uneven."""

_SUMS, _MEANS = ("weighted_ean_sum", "easy_ep"), ("reap", "man")


@dataclass(frozen=True)
class Advice:
    """What to prefer, and from what.

    Attributes:
        variation: layer -> coefficient of variation (standard deviation by mean) of the tokens of its experts; 0 is an
            even load.
        mean_variation: over the layers.
        specific: share of the experts that serve one domain: of their tokens, each domain weighing the same, more than
            half-way from an even spread (1/C) to all is from one. None for statistics of one domain.
        prefer: "sums" where `mean_variation` is at least `UNEVEN`, else "means".
        text: the same in words.
    """

    variation: dict[int, float]
    mean_variation: float
    specific: float | None
    prefer: Literal["sums", "means"]
    text: str


def advise(statistics: Statistics) -> Advice:
    """Whether scores that are sums or those that are means suit these statistics, by the rule above."""
    variation = {}
    for layer in statistics.layers:
        n = statistics.get(layer, "n").double()
        variation[layer] = float(n.std(correction=0) / n.mean().clamp(min=1e-12))
    mean = sum(variation.values()) / len(variation)
    specific, uneven = _specific(statistics), mean >= UNEVEN
    prefer: Literal["sums", "means"] = "sums" if uneven else "means"
    spread = f"{mean:.2f} ({min(variation.values()):.2f} to {max(variation.values()):.2f})"
    text = (
        f"the load of the experts varies by {spread} of its mean over {len(variation)} layers, "
        f"{'at least' if uneven else 'below'} {UNEVEN}: a rule of thumb prefers scores that are {prefer} "
        f"({', '.join(_SUMS if uneven else _MEANS)})"
    )
    if specific is not None:
        text += f"; {specific:.0%} of the experts serve mostly one of the {len(statistics.meta.domains)} domains"
    return Advice(variation, mean, specific, prefer, text)


def _specific(statistics: Statistics) -> float | None:
    """Share of the experts with tokens that serve one domain; None with fewer than two domains that have tokens."""
    found = []
    for layer in statistics.layers:
        n = torch.stack([statistics.get(layer, "n", name).double() for name in statistics.meta.domains])
        n = n[n.sum(1) > 0]
        if len(n) < 2:
            return None
        n = n / n.sum(1, keepdim=True)
        n = n[:, n.sum(0) > 0]
        found.append((n / n.sum(0)).amax(0) > (1 + 1 / len(n)) / 2)
    return float(torch.cat(found).double().mean())
