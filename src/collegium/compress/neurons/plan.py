"""`plan_neurons`: statistics and a neuron score to a `Plan` that keeps the best neurons of every expert.

Legend: E experts of a layer, f expert width.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from collegium.compress.neurons.registry import NeuronScore, find_neuron_score
from collegium.compress.plan import Asked, LayerPlan, Mtp, Plan
from collegium.compress.planners import Uniform, make_plan
from collegium.compress.target import Target
from collegium.errors import ConfigError
from collegium.measure.statistics import Statistics

__all__ = ["Mode", "plan_neurons"]

Mode = Literal["uniform", "per_layer", "ragged"]
"""How many neurons each expert keeps: "uniform", as many everywhere, the best of each expert, so that the result loads
anywhere; "per_layer", as many in all experts of a layer, more where they are worth more; "ragged", whatever one ranking
over all layers and experts leaves it, none at all included."""

Kept = list[Tensor]
"""``[E, f]`` bool for each layer."""

_MULTIPLES = (64, 32, 16, 8)
_STEPS = 8
"""A width is a multiple of 64, so that kernels and quantisers go on to divide it, or of the largest smaller one that
leaves so many widths to choose from."""


def plan_neurons(
    statistics: Statistics,
    target: Target,
    *,
    score: str = "heapr",
    share: float = 0.5,
    mode: Mode = "uniform",
    settings: Mapping[str, Any] | None = None,
    multiple: int | None = None,
    pins: Mapping[int, Iterable[int]] | None = None,
    protect_super_experts: bool = True,
    mtp: Mtp = "refuse",
) -> Plan:
    """Decide which neurons of a model's routed experts are kept. All experts stay, and nothing is changed anywhere.

    Pinned and super experts keep all of their neurons in mode "ragged". In the other modes a layer has one width, so
    that they lose as many as the rest, the least of theirs; a note says so.

    Args:
        statistics: of the model, from a calibration pass.
        target: the model.
        score: name of the neuron score; `settings` are its own.
        share: of the neurons that stay, above 0 and up to 1.
        multiple: widths are multiples of it, in the modes "uniform" and "per_layer"; None means 64, or 32, 16 or 8 for
            narrow experts.
        pins: layer -> experts that are protected.
        protect_super_experts: protect the super experts, where the statistics can tell them.
        mtp: what becomes of multi-token-prediction layers.

    Raises:
        ConfigError: the statistics are of another model or lack something, a setting is out of range, or protected
            experts alone have more neurons than are to stay.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"mode {mode!r} is none of {', '.join(get_args(Mode))}")
    if not 0 < share <= 1 or (multiple is not None and multiple < 1):
        raise ConfigError(f"share is above 0 and up to 1, multiple at least 1; got {share} and {multiple}")
    found, settings = find_neuron_score(score), dict(settings or {})
    # every expert stays: what is checked, protected and noted of a plan is the same
    plan = make_plan(
        statistics,
        target,
        Uniform(1.0),
        importance="random",
        pins=pins,
        protect_super_experts=protect_super_experts,
        mtp=mtp,
    )
    _check_widths(statistics, target)
    scores = [found(statistics, layer.layer, **settings) for layer in plan.layers]
    multiple = multiple or _multiple(min(one.shape[1] for one in scores))
    kept = _choose(found, scores, plan.layers, share, mode, multiple)
    layers = tuple(
        _slim(layer, mask, statistics.meta.layers[i].intermediate_size)
        for i, (layer, mask) in enumerate(zip(plan.layers, kept, strict=True))
    )
    changed = {
        "method": score,
        "settings": {**found.settings, **settings},
        "planner": f"neurons_{mode}",
        "planner_settings": {"share": share, **({} if mode == "ragged" else {"multiple": multiple})},
        "domains": statistics.meta.domains,
        "asked": Asked(what="neurons", value=share),
        "layers": layers,
        "notes": (*plan.notes, *_notes(found, statistics, layers, mode)),
    }
    return Plan.model_validate({**dict(plan), **changed})


def _check_widths(statistics: Statistics, target: Target) -> None:
    for mine, theirs in zip(statistics.meta.layers, target.layers, strict=True):
        if theirs.intermediate_size not in (None, mine.intermediate_size):
            raise ConfigError(
                f"the statistics do not fit {target.model}: experts of layer {mine.layer} have "
                f"{mine.intermediate_size} neurons in the statistics and {theirs.intermediate_size} in the model"
            )


def _multiple(f: int) -> int:
    """Of the widths of experts of width f."""
    return next((one for one in _MULTIPLES if f >= one * _STEPS), _MULTIPLES[-1] if f >= 2 * _MULTIPLES[-1] else 1)


def _choose(
    score: NeuronScore, scores: list[Tensor], layers: Sequence[LayerPlan], share: float, mode: Mode, multiple: int
) -> Kept:
    if mode == "uniform":
        return [_best(one, _nearest(share, one.shape[1], multiple)) for one in scores]
    if not score.in_loss:
        scores = [torch.where(one < 0, one, one / one.clamp(min=0).sum().clamp(min=1e-300)) for one in scores]
    if mode == "per_layer":
        return [_best(one, width) for one, width in zip(scores, _widths(scores, share, multiple), strict=True)]
    return _ragged(scores, layers, share)


def _nearest(share: float, f: int, multiple: int) -> int:
    """The multiple nearest to a share of f, halves up, at least one and at most f."""
    return min(f, multiple * max(1, math.floor(share * f / multiple + 0.5)))


def _best(scores: Tensor, count: int) -> Tensor:
    """``[E, f]`` bool: the best `count` neurons of each expert; equal ones by id."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def _widths(scores: Sequence[Tensor], share: float, multiple: int) -> list[int]:
    """The width of each layer: one multiple each, then one more where the neurons that it lets in are worth most."""
    ranked = [one.clamp(min=0).sort(dim=1, descending=True).values for one in scores]
    widths = [min(multiple, one.shape[1]) for one in scores]
    left = math.floor(share * sum(one.numel() for one in scores) + 0.5)
    left -= sum(len(one) * width for one, width in zip(scores, widths, strict=True))

    def candidate(i: int) -> tuple[float, int]:
        return -float(ranked[i][:, widths[i] : widths[i] + multiple].mean()), i

    waiting = [candidate(i) for i, one in enumerate(ranked) if widths[i] < one.shape[1]]
    heapq.heapify(waiting)
    while waiting:
        _, i = heapq.heappop(waiting)
        E, f = ranked[i].shape
        step = min(multiple, f - widths[i])
        if E * step > left:
            continue  # another layer's step may be smaller
        widths[i] += step
        left -= E * step
        if widths[i] < f:
            heapq.heappush(waiting, candidate(i))
    return widths


def _ragged(scores: Sequence[Tensor], layers: Sequence[LayerPlan], share: float) -> Kept:
    """One ranking over all neurons, those of protected experts in front; equal ones by layer, expert and id."""
    total = sum(one.numel() for one in scores)
    count = math.floor(share * total + 0.5)
    protected = sum(len(layer.protected) * one.shape[1] for layer, one in zip(layers, scores, strict=True))
    if protected > count:
        raise ConfigError(
            f"share {share:g} is {count} of {total} neurons, and the protected experts alone have {protected}; keep "
            "more, or pin fewer"
        )
    flat = []
    for one, layer in zip(scores, layers, strict=True):
        ranked = one.clone()
        ranked[list(layer.protected)] = math.inf
        flat.append(ranked.flatten())
    kept = torch.zeros(total, dtype=torch.bool)
    kept[torch.cat(flat).argsort(descending=True, stable=True)[:count]] = True
    parts = kept.split([one.numel() for one in scores])
    return [part.view_as(one) for part, one in zip(parts, scores, strict=True)]


def _slim(layer: LayerPlan, kept: Tensor, f: int) -> LayerPlan:
    neurons = () if bool(kept.all()) else tuple(tuple(row.nonzero().flatten().tolist()) for row in kept)
    changed = {"op": "slim" if neurons else "identity", "neurons": neurons, "scores": (), "intermediate_size": f}
    return LayerPlan.model_validate({**dict(layer), **changed})


def _notes(score: NeuronScore, statistics: Statistics, layers: Sequence[LayerPlan], mode: Mode) -> list[str]:
    notes = []
    widths = {len(ids) for layer in layers for ids in layer.neurons}
    widths |= {layer.intermediate_size or 0 for layer in layers if not layer.neurons}
    if len(widths) > 1:
        notes.append(
            f"experts keep {min(widths)} to {max(widths)} neurons: no stock engine loads such a checkpoint; save it "
            "for collegium's own loader, or use mode uniform"
        )
    for layer in layers:
        unseen = (statistics.get(layer.layer, "n") == 0).nonzero().flatten().tolist()
        if score.needs and layer.neurons and unseen:
            left = sum(len(layer.neurons[e]) for e in unseen)
            notes.append(
                f"layer {layer.layer}: of the neurons of experts {unseen}, which no token reached, nothing is known; "
                f"they go first, and {left} that stay are the first by id"
            )
        if mode != "ragged" and layer.neurons and layer.protected:
            notes.append(
                f"layer {layer.layer}: the protected experts {list(layer.protected)} lose neurons like the others, "
                "because a layer has one width"
            )
    return notes
