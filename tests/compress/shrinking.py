"""What the tests of shrinking share: made-up statistics, targets and plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from collegium.compress.collectors import COLLECTORS
from collegium.compress.plan import Asked, LayerPlan, Plan
from collegium.compress.target import Target, TargetLayer
from collegium.measure.statistics import LayerEntry, Statistics, StatisticsMeta

D = 6


def made_up_statistics(
    layers: int = 3,
    experts: int = 8,
    *,
    domains: Sequence[str] = ("code", "prose"),
    top_k: int = 2,
    seed: int = 0,
    untouched: Sequence[int] = (),
    values: Mapping[str, Any] | None = None,
    fingerprint: str | None = "abc",
) -> Statistics:
    """Statistics of every collector with random values; `untouched` experts saw no token in any layer.

    Args:
        values: statistic -> ``[L, C, E]`` (or what broadcasts to it) in place of random values.
    """
    entries = [entry for collector in COLLECTORS for entry in collector.statistics]
    meta = StatisticsMeta(
        model="made up", fingerprint=fingerprint, family="none", num_layers=layers, data=("numbers",),
        domains=tuple(domains), tokens=1000, statistics=tuple(entries),
        layers=tuple(
            LayerEntry(layer=i, path=f"layers.{i}", num_experts=experts, top_k=top_k, hidden_size=D,
                       intermediate_size=4)
            for i in range(layers)
        ),
        collectors={collector.name: asdict(collector()) for collector in COLLECTORS},
        created="2026-01-01T00:00:00+00:00", collegium="0",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in meta.layers:
        for entry in entries:
            shape = entry.shape(layer, len(domains), rows=5)
            if entry.dtype == "int64":
                tensor = torch.randint(40, 400, shape, generator=generator)
            else:
                tensor = torch.rand(shape, generator=generator, dtype=getattr(torch, entry.dtype)) + 0.5
            if values is not None and entry.name in values:
                given = torch.as_tensor(values[entry.name])
                given = given[layer.layer] if given.dim() == 3 else given
                given = given[0] if given.dim() == 2 and not entry.by_domain else given
                tensor = given.to(tensor.dtype).expand(shape).clone()
            if entry.axes[:1] == ("E",):
                along = 1 if entry.by_domain else 0
                tensor.index_fill_(along, torch.tensor(list(untouched), dtype=torch.long), 0)
            if entry.name == "n_tokens":
                tensor.fill_(1000)
            tensors[layer.layer, entry.name] = tensor
    return Statistics(meta, tensors)


def made_up_target(layers: int = 3, experts: int = 8, **changes: Any) -> Target:
    """Experts of 100 parameters in 200 bytes; the rest of the model is as large as 2 experts a layer."""
    fields: dict[str, Any] = {
        "model": "made up",
        "fingerprint": "abc",
        "family": "none",
        "top_k": 2,
        "layers": tuple(TargetLayer(i, experts, 200, 100) for i in range(layers)),
        "nbytes": layers * (experts + 2) * 200,
        "parameters": layers * (experts + 2) * 100,
    }
    return Target(**(fields | changes))


def made_up_plan(keep: Sequence[Sequence[int]], experts: int = 8, **changes: Any) -> Plan:
    """A plan that keeps ``keep[i]`` in layer i."""
    target = made_up_target(len(keep), experts)
    layers = tuple(
        LayerPlan(
            layer=i,
            op="identity" if len(ids) == experts else "prune",
            num_experts=experts,
            keep=tuple(ids),
            expert_nbytes=200,
            expert_parameters=100,
        )
        for i, ids in enumerate(keep)
    )
    fields: dict[str, Any] = {
        "model": target.model, "fingerprint": target.fingerprint, "family": target.family, "method": "made up",
        "planner": "by hand", "asked": Asked(what="keep", value=0.5), "top_k": 2, "nbytes": target.nbytes,
        "parameters": target.parameters, "layers": layers, "created": "2026-01-01T00:00:00+00:00", "collegium": "0",
    }  # fmt: skip
    return Plan(**(fields | changes))


def batches(count: int = 2, length: int = 10, seed: int = 0) -> list[dict[str, Tensor]]:
    """Two sequences each, of two domains; the second has four tokens of padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -4:] = 0
    return [
        {
            "input_ids": torch.randint(3, 64, (2, length), generator=generator),
            "attention_mask": mask,
            "domain": torch.tensor([0, 1]),
        }
        for _ in range(count)
    ]
