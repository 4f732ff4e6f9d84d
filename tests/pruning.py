"""Plans and folders for tests that prune: `saved`, `plan_of`, and the oracle `logits`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from collegium.benchmarks.shrink import halve
from collegium.compress.plan import Plan
from collegium.sites import sites
from tiny import correction_biases, tiny_inputs, tiny_model

KEEPS = ((0, 3, 5, 6), (1, 2, 4, 7), (0, 2, 4, 5))
"""Of 8 experts; two of each half, so that they also fit models with two routing groups."""


def saved(root: Path, family: str, *, fused: bool = False, name: str = "source", **overrides: Any) -> Path:
    """A tiny random model of `family` in a folder under `root`; `fused` stores experts as they are in memory."""
    folder = root / name
    model = tiny_model(family, **overrides)
    model.save_pretrained(folder, save_original_format=not fused)
    return folder


def plan_of(folder: Path, keeps: Mapping[int, Collection[int]] | None = None, **changes: Any) -> Plan:
    """A plan for the model in `folder`: the layer's entry of `keeps`, or one of `KEEPS` by turns."""
    record = halve(folder).model_dump(mode="json")
    for number, layer in enumerate(record["layers"]):
        keep = KEEPS[number % len(KEEPS)] if keeps is None else keeps[layer["layer"]]
        op = "identity" if len(keep) == layer["num_experts"] else "prune"
        layer.update(keep=sorted(keep), op=op)
    return Plan.model_validate_json(Plan.model_construct(**record | changes).model_dump_json(warnings=False))


@torch.no_grad()
def logits(model: PreTrainedModel, plan: Plan | None = None) -> Tensor:
    """Of tiny random inputs; last hidden states where there is no head.

    With a plan, the model's routers may not choose the experts it drops: their logits are minus infinity before
    anything is made of them, and so are their selection biases (these stay so).
    """
    if plan is None:
        return model(**tiny_inputs(model))[0]
    gone = {layer.layer: list(layer.dropped) for layer in plan.layers}
    routers = {}
    for site in sites(model):
        for parameter in site.gate.parameters():
            if parameter.shape[:1] == (site.num_experts,) and parameter.dim() == 2:
                routers[parameter.data_ptr()] = gone[site.layer]
        for bias in correction_biases(site.block):
            bias[..., gone[site.layer]] = -torch.inf
    assert len(routers) == len(gone)
    linear = torch.nn.functional.linear
    forbidden = set()

    def forbid(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        z = linear(x, weight, bias)
        if weight.data_ptr() in routers:
            forbidden.add(weight.data_ptr())
            z[..., routers[weight.data_ptr()]] = -torch.inf
        return z

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", forbid)
        found = model(**tiny_inputs(model))[0]
    assert forbidden == routers.keys(), "a router does not go through linear()"
    return found
