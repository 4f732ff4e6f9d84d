"""What groupings share: who may join whom, how similar two experts are, and joining the most similar.

Legend: E experts of a layer, G routing groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from collegium.compress.grouping.registry import Groups
from collegium.compress.planners.scores import LayerScores
from collegium.errors import ConfigError
from collegium.measure.statistics import Statistics

__all__ = ["Part", "assembled", "join", "logit_cosines", "output_cosines", "parts"]


@dataclass(frozen=True)
class Part:
    """The experts of one routing group, each list best first.

    Attributes:
        alone: those that are kept as they are.
        hosts: the others that are kept; members may join them.
        rest: those that are not kept.
    """

    alone: tuple[int, ...]
    hosts: tuple[int, ...]
    rest: tuple[int, ...]


def parts(scores: LayerScores, keep: tuple[int, ...], protected: frozenset[int], groups: int) -> list[Part]:
    """The routing groups of a layer, of E / `groups` experts each.

    Raises:
        ConfigError: a protected expert is not kept.
    """
    kept, size = frozenset(keep), len(scores.order) // groups
    if lost := sorted(protected - kept):
        raise ConfigError(f"layer {scores.layer}: protected experts {lost} are not among those that are kept")
    found = []
    for group in range(groups):
        members = [e for e in scores.order if e // size == group]
        found.append(
            Part(
                alone=tuple(e for e in members if e in protected),
                hosts=tuple(e for e in members if e in kept - protected),
                rest=tuple(e for e in members if e not in kept),
            )
        )
    return found


def join(part: Part, similarity: Tensor, capacity: int | None = None) -> dict[int, list[int]]:
    """Host -> those of the rest that join it: each the most similar host, of equals the best.

    Args:
        similarity: ``[E, E]`` float64, larger for experts that are more alike.
        capacity: the most that may join one host. The most similar pairs go together first, as long as there is room;
            in all there must be room for the rest.
    """
    joined: dict[int, list[int]] = {host: [] for host in part.hosts}
    if not part.hosts or not part.rest:
        return joined
    between = similarity[list(part.rest)][:, list(part.hosts)]
    if capacity is None:
        for e, host in zip(part.rest, between.argmax(1).tolist(), strict=True):
            joined[part.hosts[host]].append(e)
        return joined
    waiting = set(part.rest)
    for pair in between.flatten().argsort(descending=True, stable=True).tolist():
        e, host = part.rest[pair // len(part.hosts)], part.hosts[pair % len(part.hosts)]
        if e in waiting and len(joined[host]) < capacity:
            joined[host].append(e)
            waiting.remove(e)
    return joined


def assembled(alone: Iterable[int], joined: Iterable[Mapping[int, Iterable[int]]]) -> Groups:
    """The groups of a layer from those that stay alone and, for each routing group, what joined its hosts."""
    found: list[tuple[int, ...]] = [(e,) for e in alone]
    found += [(host, *sorted(members)) for one in joined for host, members in one.items()]
    return tuple(sorted(found))


def logit_cosines(statistics: Statistics, layer: int) -> Tensor:
    """``[E, E]`` float64: the cosine of the router logits of two experts, along the tokens. 0 for one without any."""
    gram = statistics.get(layer, "z_gram").double()
    length = gram.diagonal().clamp(min=0).sqrt()
    scale = length[:, None] * length
    return torch.where(scale > 0, gram / scale, 0)


def output_cosines(statistics: Statistics, layer: int) -> Tensor:
    """``[E, E]`` float64: the mean cosine of the outputs of two experts for the same tokens. 0 where there are none."""
    return statistics.get(layer, "out_cos").double() / statistics.get(layer, "out_cos_n").double().clamp(min=1)
