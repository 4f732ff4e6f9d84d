"""What is read ahead: from a predictor's scores to the experts to load, in the order to load them.

How many of a layer (width) and how far ahead (depth) are numbers, or follow from the moment: Fate loads as many as the
time until they are needed allows; HOBBIT looks past layers whose predicted experts are all in memory, up to the first
that lacks one. The cache decides whether there is room, and demand loads go first.

Legend: E experts of a layer, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from collegium.errors import ConfigError
from collegium.named import parse_settings, settled
from collegium.offload.cache import ExpertCache
from collegium.offload.geometry import Array, Geometry
from collegium.offload.precision.base import PrecisionPolicy
from collegium.offload.predictors.base import FEW, Prediction

__all__ = ["Copies", "Prefetch", "find_prefetch", "for_prompt", "impact_order", "plan"]

_LIKELY = 2
"""Assignments for each expert of a layer: of as many, an even router leaves out one expert in seven."""


@dataclass(frozen=True)
class Prefetch:
    """How much is read ahead.

    Attributes:
        width: experts of a layer: the best `width` by score, of which absent ones are loaded; "top_k" is the layer's K;
            "adaptive" is as many absent ones as can be loaded in time (Fate, 2025), "top_k" where times are not known.
        depth: layers ahead; "adaptive" is up to the first layer with a predicted expert absent (HOBBIT, 2024).
        threshold: experts below this share of the layer's best score are left, 0 to 1.
        order: of the loads: "score" is the nearest layer first and then by score; "impact" is by what each saves of the
            schedules of two processors (HybriMoE, 2025). With one processor each load saves the same.
        prompt: experts of the next layer that are read while a prompt goes through, in place of experts of the layer
            that is done, and at most an eighth of all slots; 0 reads none. It takes no predictor.
    """

    width: int | Literal["top_k", "adaptive"] = "top_k"
    depth: int | Literal["adaptive"] = 1
    threshold: float = 0.0
    order: Literal["score", "impact"] = "score"
    prompt: int = 16

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("depth", self.depth)):
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.prompt < 0:
            raise ConfigError(f"prompt must be at least 0 experts, not {self.prompt}")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold is a share of the best score, 0 to 1, not {self.threshold}")

    def for_one_processor(self) -> Prefetch:
        """These, where one processor computes. Raises ConfigError where the order takes two."""
        if self.order == "impact":
            raise ConfigError(
                "prefetch order=impact goes by the schedule of two processors, which is simulated only: "
                "collegium simulate --schedule hybrimoe. With one, every load saves the same; leave it out"
            )
        return self


def find_prefetch(text: str) -> Prefetch:
    """Settings from ``"key=value,key=value"``, such as ``"width=4,depth=adaptive"``; nothing is the default.

    Raises:
        ConfigError: there is no such setting, or a value is not allowed.
    """
    try:
        found: Prefetch = settled(Prefetch, parse_settings(text))
    except ConfigError as error:
        raise ConfigError(f"prefetch {text!r}: {error}") from error
    return found


@dataclass(frozen=True, eq=False)
class Copies:
    """Which copy of an expert is read ahead, and whether that one is there.

    Attributes:
        precision: names the copies.
        caches: bits -> cache of those copies, the most exact first.
    """

    precision: PrecisionPolicy
    caches: Mapping[int, ExpertCache]

    def bits(self, layer: int, expert: int) -> int:
        """Of the copy to read ahead."""
        return int(self.precision.ahead(layer)[expert])

    def resident(self, layer: int) -> Array:
        """``[E]`` bool: the copy to read ahead is in memory or on its way."""
        return np.logical_or.reduce(
            [(self.precision.ahead(layer) == bits) & cache.is_resident(layer) for bits, cache in self.caches.items()]
        )

    def expect(self, predictions: Sequence[Prediction]) -> None:
        """Tell the policies that ask for predictions; each of the experts whose copies it may get ahead of time, the
        scores of others being -inf."""
        for bits, cache in self.caches.items():
            for prediction in predictions if "predictions" in cache.policy.needs else ():
                own = self.precision.ahead(prediction.layer) == bits
                if own.any():
                    cache.policy.expect(prediction.layer, np.where(own, prediction.scores, -np.inf))


def plan(
    settings: Prefetch,
    predictions: Sequence[Prediction],
    geometry: Geometry,
    resident: Callable[[int], Array],
    *,
    seconds: float | None = None,
    per_load: float | None = None,
) -> list[tuple[int, int]]:
    """What to load, nearest layer first and then by score; of equal scores the lower id first.

    Args:
        predictions: nearest layer first.
        resident: layer -> ``[E]`` bool, what is in memory or on its way.
        seconds: from one layer's request to the next one's.
        per_load: seconds that a load takes.

    Returns:
        ``(layer, expert)`` of absent experts, each once.
    """
    timed = settings.width == "adaptive" and seconds is not None and per_load is not None and per_load > 0
    found: list[tuple[int, int]] = []
    for ahead, prediction in enumerate(predictions, start=1):
        if settings.depth != "adaptive" and ahead > settings.depth:
            break
        there = resident(prediction.layer)
        ranked = np.argsort(-prediction.scores, kind="stable")
        ranked = ranked[prediction.scores[ranked] >= settings.threshold * prediction.scores.max()]
        if timed:
            assert seconds is not None
            assert per_load is not None
            # what is loaded for nearer layers takes its share of the time until this one
            absent = ranked[~there[ranked]][: max(int(ahead * seconds / per_load) - len(found), 0)]
            lacking = not there[ranked[: geometry.top_k[prediction.layer]]].all()
        else:
            width = settings.width if isinstance(settings.width, int) else geometry.top_k[prediction.layer]
            absent = ranked[:width][~there[ranked[:width]]]
            lacking = bool(len(absent))
        found += [(prediction.layer, int(expert)) for expert in absent]
        if settings.depth == "adaptive" and lacking:
            break
    return found


def for_prompt(count: int, cache: ExpertCache, layer: int, tokens: int) -> list[int]:
    """Up to `count` absent experts of the layer after this one, in a pass whose tokens want nearly all of them."""
    geometry, following = cache.geometry, layer + 1
    if not count or tokens <= FEW or following == geometry.num_layers:
        return []
    if tokens * geometry.top_k[following] < _LIKELY * geometry.experts[following]:
        return []
    found: list[int] = np.flatnonzero(~cache.is_resident(following))[: min(count, cache.capacity // 8)].tolist()
    return found


def impact_order(
    candidates: Sequence[tuple[int, int]],
    resident: Callable[[int], Array],
    makespan: Callable[[int, Array], float],
) -> list[tuple[int, int]]:
    """The same loads, in the order of what each saves (HybriMoE, 2025).

    Again and again the candidate is taken whose presence shortens its layer's schedule most, given those taken before;
    of equals the one of the nearest layer, then the one that came first.

    Args:
        candidates: what `plan` found.
        resident: layer -> ``[E]`` bool.
        makespan: ``(layer, resident [E]) -> seconds`` of the layer's schedule, with the loads predicted for it.
    """
    left = list(candidates)
    there = {layer: resident(layer).copy() for layer, _ in left}
    now = {layer: makespan(layer, mask) for layer, mask in there.items()}
    found: list[tuple[int, int]] = []
    while left:
        saved = [now[layer] - makespan(layer, _with(there[layer], expert)) for layer, expert in left]
        layer, expert = left.pop(max(range(len(left)), key=lambda i: (saved[i], -left[i][0], -i)))
        there[layer][expert] = True
        now[layer] = makespan(layer, there[layer])
        found.append((layer, expert))
    return found


def _with(mask: Array, expert: int) -> Array:
    mask = mask.copy()
    mask[expert] = True
    return mask
