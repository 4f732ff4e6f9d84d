"""`make_plan`: statistics, a score and a planner to a `Plan`.

Legend: E experts of a layer, K experts a token chooses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from collegium._version import __version__
from collegium.compress.grouping.registry import Grouping
from collegium.compress.importance import find_importance
from collegium.compress.importance.advice import advise
from collegium.compress.merge.registry import find_merge
from collegium.compress.plan import LayerPlan, Mtp, Operator, Plan, RouterEdit
from collegium.compress.planners.choose import Choice, Planner, Protected
from collegium.compress.planners.scores import Combine, LayerScores, layer_scores
from collegium.compress.target import Target
from collegium.errors import ConfigError
from collegium.measure.statistics import STARVED, Statistics
from collegium.measure.super_experts import super_experts

__all__ = ["make_plan", "statistics_checksum"]


def make_plan(
    statistics: Statistics,
    target: Target,
    planner: Planner,
    *,
    importance: str = "reap",
    settings: Mapping[str, Any] | None = None,
    domains: Sequence[str] = (),
    combine: Combine = "sum",
    pins: Mapping[int, Iterable[int]] | None = None,
    protect_super_experts: bool = True,
    grouping: Grouping | None = None,
    operator: Operator | None = None,
    router: RouterEdit | None = None,
    mtp: Mtp = "refuse",
) -> Plan:
    """Decide which experts of a model are kept, and what becomes of the others. Nothing is changed anywhere.

    Args:
        statistics: of the model, from a calibration pass.
        target: the model.
        planner: such as ``Uniform(keep=0.5)``.
        importance: name of the score; `settings` are its own.
        domains: those of the statistics that the plan is for; none means all.
        combine: how they go together, see `Combine`.
        pins: layer -> experts that must be kept.
        protect_super_experts: keep the super experts, where the statistics can tell them.
        grouping: which of the others join which kept one; they are dropped without.
        operator: how the members of a group become one expert.
        router: how the routers follow; by default only the kept experts' rows stay.
        mtp: what becomes of multi-token-prediction layers.

    Raises:
        ConfigError: the statistics are of another model or lack something, the budget cannot be met, a pin names no
            expert, or there is an operator without a grouping where it needs one, or the other way round.
    """
    _check_same(statistics, target)
    _check_merge(grouping, operator, statistics)
    score, settings = find_importance(importance), dict(settings or {})
    scores = [
        layer_scores(statistics, layer.layer, score, domains=domains, combine=combine, **settings)
        for layer in target.layers
    ]
    pinned = _pins(pins or {}, target)
    supers, notes = _super_experts(statistics, protect_super_experts)
    protected = {one.layer: frozenset(pinned.get(one.layer, set()) | supers.get(one.layer, set())) for one in scores}
    layers = _layer_plans(scores, planner.choose(scores, target, protected), protected, target)
    if operator is not None:
        layers = _merge_plans(scores, layers, statistics, target, grouping)
    return Plan(
        model=target.model,
        fingerprint=target.fingerprint,
        family=target.family,
        statistics=statistics_checksum(statistics),
        method=importance,
        settings={**score.settings, **settings, "combine": combine},
        planner=planner.name,
        planner_settings=asdict(planner),
        data=statistics.meta.data,
        domains=tuple(dict.fromkeys(domains)) or statistics.meta.domains,
        asked=planner.asked,
        top_k=target.top_k,
        groups=target.groups,
        top_groups=target.top_groups,
        nbytes=target.nbytes,
        parameters=target.parameters,
        layers=layers,
        operator=operator if any(one.op == "merge" for one in layers) else None,
        router=router or RouterEdit(),
        mtp=mtp,
        notes=(
            *_model_notes(layers, mtp, statistics, target),
            *notes,
            *_coverage_notes(scores, layers),
            advise(statistics).text,
        ),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        collegium=__version__,
    )


def _layer_plans(
    scores: Sequence[LayerScores], keep: Choice, protected: Protected, target: Target
) -> tuple[LayerPlan, ...]:
    return tuple(
        LayerPlan(
            layer=layer.layer,
            op="identity" if len(keep[layer.layer]) == layer.num_experts else "prune",
            num_experts=layer.num_experts,
            keep=keep[layer.layer],
            protected=tuple(sorted(protected[layer.layer])),
            scores=tuple(one.share.tolist()),
            expert_nbytes=layer.expert_nbytes,
            expert_parameters=layer.expert_parameters,
            intermediate_size=layer.intermediate_size,
            neuron_nbytes=layer.neuron_nbytes,
            neuron_parameters=layer.neuron_parameters,
        )
        for one, layer in zip(scores, target.layers, strict=True)
    )


def _merge_plans(
    scores: Sequence[LayerScores],
    layers: Sequence[LayerPlan],
    statistics: Statistics,
    target: Target,
    grouping: Grouping | None,
) -> tuple[LayerPlan, ...]:
    """The layers with their groups. A grouping may take other dominants than the planner, but as many."""
    found = []
    for one, layer in zip(scores, layers, strict=True):
        if layer.op == "identity":
            found.append(layer)
            continue
        changes: dict[str, Any] = {"op": "merge"}
        if grouping is not None:
            protected = frozenset(layer.protected)
            groups = sorted(grouping.group(one, layer.keep, statistics, protected, target.groups))
            changes |= {
                "keep": tuple(group[0] for group in groups),
                "groups": tuple(groups),
                "weights": tuple(grouping.weights(one, group, statistics) for group in groups),
            }
        found.append(LayerPlan.model_validate({**dict(layer), **changes}))
    return tuple(found)


def _check_merge(grouping: Grouping | None, operator: Operator | None, statistics: Statistics) -> None:
    if grouping is not None and operator is None:
        raise ConfigError("a grouping needs an operator that makes one expert of a group; name a merge")
    if operator is None:
        return
    merge = find_merge(operator.name, operator.settings)
    if grouping is None and merge.needs_groups:
        raise ConfigError(f"the merge {operator.name!r} makes one expert of a group; name a grouping")
    there = {entry.name for entry in statistics.meta.statistics}
    needs = (*merge.needs, *(grouping.needs if grouping is not None else ()))
    if lacking := [need for need in needs if need not in there]:
        raise ConfigError(
            f"merging by {operator.name!r} needs {', '.join(lacking)}, which these statistics lack; calibrate again "
            "for it"
        )


def statistics_checksum(statistics: Statistics) -> str:
    """Identity of statistics: of what was measured, not of when or where."""
    digest = hashlib.blake2b(digest_size=16)
    meta = statistics.meta.model_dump(mode="json", exclude={"created", "collegium", "model"})
    digest.update(json.dumps(meta, sort_keys=True).encode())
    for _, tensor in sorted(statistics.tensors.items()):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _check_same(statistics: Statistics, target: Target) -> None:
    meta = statistics.meta
    if meta.fingerprint is not None and target.fingerprint is not None and meta.fingerprint != target.fingerprint:
        raise ConfigError(
            f"the statistics are of {meta.model} with fingerprint {meta.fingerprint}; {target.model} has "
            f"{target.fingerprint}: calibrate this model"
        )
    mine = {one.layer: (one.num_experts, one.top_k) for one in meta.layers}
    theirs = {one.layer: (one.num_experts, target.top_k) for one in target.layers}
    if mine != theirs:
        odd = min(layer for layer in mine.keys() | theirs.keys() if mine.get(layer) != theirs.get(layer))
        raise ConfigError(
            f"the statistics do not fit {target.model}: layer {odd} has (experts, top-k) {mine.get(odd, 'none')} in "
            f"the statistics and {theirs.get(odd, 'none')} in the model; calibrate this model"
        )


def _pins(pins: Mapping[int, Iterable[int]], target: Target) -> dict[int, set[int]]:
    sizes = {one.layer: one.num_experts for one in target.layers}
    found = {layer: set(experts) for layer, experts in pins.items()}
    for layer, experts in found.items():
        if layer not in sizes:
            raise ConfigError(f"a pin names layer {layer}; the MoE layers are {', '.join(map(str, sizes))}")
        if odd := [e for e in sorted(experts) if not 0 <= e < sizes[layer]]:
            raise ConfigError(f"a pin names expert {odd[0]} of layer {layer}, which has {sizes[layer]}")
    return found


def _super_experts(statistics: Statistics, wanted: bool) -> tuple[dict[int, set[int]], list[str]]:
    """``(layer -> super experts, notes)``."""
    if not wanted:
        return {}, ["super experts are not protected"]
    if not any(entry.name == "down_max" for entry in statistics.meta.statistics):
        return {}, ["super experts are not protected: the statistics have no down_max to tell them by"]
    layers: dict[int, set[int]] = {}
    for one in super_experts(statistics).found:
        layers.setdefault(one.layer, set()).add(one.expert)
    return layers, [f"layer {layer}: super experts {sorted(found)} are kept" for layer, found in sorted(layers.items())]


def _coverage_notes(scores: Sequence[LayerScores], layers: Sequence[LayerPlan]) -> list[str]:
    """What is known too little about, by layer: unseen and starved experts, and what becomes of them."""
    notes = []
    for one, layer in zip(scores, layers, strict=True):
        tokens = one.tokens.tolist()
        for text, ids in (
            ("no token reached", [e for e, count in enumerate(tokens) if count == 0]),
            (f"fewer than {STARVED} tokens reached", [e for e, count in enumerate(tokens) if 0 < count < STARVED]),
        ):
            kept = [e for e in ids if e in layer.keep]
            dropped = [e for e in ids if e not in layer.keep]
            if ids:
                parts = [f"{listed} ({fate})" for listed, fate in ((kept, "kept"), (dropped, "dropped")) if listed]
                notes.append(f"layer {layer.layer}: {text} experts {' and '.join(parts)}")
    return notes


def _model_notes(layers: Sequence[LayerPlan], mtp: Mtp, statistics: Statistics, target: Target) -> list[str]:
    notes, counts = [], [len(one.keep) for one in layers]
    if len(set(counts)) > 1:
        notes.append(
            f"layers keep {min(counts)} to {max(counts)} experts: no stock engine loads such a checkpoint; apply the "
            "plan as a mask, or use the uniform planner"
        )
    if statistics.meta.fingerprint is None or target.fingerprint is None:
        notes.append("the model has no fingerprint; that the statistics are of these weights was not checked")
    if target.mtp:
        fate = {
            "refuse": "applying this plan is refused until mtp is 'keep' or 'drop'",
            "keep": "their experts are all kept",
            "drop": "they are dropped",
        }
        notes.append(f"the checkpoint has multi-token-prediction layers: {fate[mtp]}")
    return notes
