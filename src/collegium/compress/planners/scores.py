"""What planners choose by: the importance of each expert of a layer, over the domains a plan is for.

Legend: E experts of a layer, C domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from collegium.compress.importance import Importance
from collegium.errors import ConfigError
from collegium.measure.statistics import Statistics

__all__ = ["Combine", "LayerScores", "layer_scores"]

Combine = Literal["pooled", "sum", "max", "any"]
"""How the domains of a plan go together: "pooled" scores all their tokens as one text, so that the longest domain has
the most say; the others score each domain by itself, as shares of the layer's importance, and take the "sum" or the
"max" of the shares, or the best rank in "any" domain (each domain in turn gets its next best expert)."""


@dataclass(frozen=True, eq=False)
class LayerScores:
    """The scores of one layer.

    Attributes:
        share: ``[E]`` float64 share of the layer's importance, not negative, in sum 1.
        order: expert ids, best first; equal scores by tokens, then by id.
        tokens: ``[E]`` int64 tokens each expert saw.
    """

    layer: int
    share: Tensor
    order: tuple[int, ...]
    tokens: Tensor


def layer_scores(
    statistics: Statistics,
    layer: int,
    importance: Importance,
    *,
    domains: Sequence[str] = (),
    combine: Combine = "sum",
    **settings: Any,
) -> LayerScores:
    """Score the experts of one layer.

    Args:
        domains: those that count; none means all.
        settings: of the importance score.

    Raises:
        ConfigError: a domain or a statistic is not there, a domain has no tokens, or `combine` is none of `Combine`.
    """
    if combine not in get_args(Combine):
        raise ConfigError(f"combine {combine!r} is none of {', '.join(get_args(Combine))}")
    names = tuple(dict.fromkeys(domains)) or statistics.meta.domains
    tokens = torch.stack([statistics.get(layer, "n", name) for name in names])
    empty = [name for name, seen in zip(names, tokens, strict=True) if not bool(seen.any())]
    if domains and empty and importance.needs:
        raise ConfigError(f"domain {empty[0]!r} has no tokens in layer {layer}; nothing can be planned for it")
    every = set(names) == set(statistics.meta.domains)
    if not importance.needs or (combine == "pooled" and every):
        share = _shares(importance(statistics, layer, None, **settings))
        key = share
    elif combine == "pooled" and len(names) > 1:
        raise ConfigError(f"combine 'pooled' takes one domain or all of them, not {', '.join(names)}; use 'sum'")
    else:
        by_domain = torch.stack(
            [_shares(importance(statistics, layer, name, **settings)) for name in names if name not in empty]
            or [torch.full((tokens.shape[1],), 1 / tokens.shape[1], dtype=torch.float64)]
        )
        share = by_domain.amax(0) if combine == "max" else by_domain.sum(0)
        share = share / share.sum()
        # the shares, below 1, order what has one rank
        key = share - _ranks(by_domain).amin(0) if combine == "any" else share
    seen = tokens.sum(0)
    order = sorted(range(len(key)), key=lambda e: (-float(key[e]), -int(seen[e]), e))
    return LayerScores(layer, share, tuple(order), seen)


def _shares(scores: Tensor) -> Tensor:
    """``[E]`` not negative, in sum 1; where all are equal, equal shares."""
    positive = scores - scores.min().clamp(max=0)
    total = positive.sum()
    return positive / total if total > 0 else torch.full_like(positive, 1 / len(positive))


def _ranks(scores: Tensor) -> Tensor:
    """``[C, E]`` rank of each expert in its domain, 0 for the best; equal scores by id."""
    return scores.argsort(dim=1, descending=True, stable=True).argsort(1)
