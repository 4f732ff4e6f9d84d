"""What the tests of merging share: made-up experts, what they compute, and plans of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from collegium.compress.matrices import Expert, LayerExperts
from collegium.compress.plan_layer import LayerPlan
from collegium.experts.weights import ExpertWeights

FIELDS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


def made_up_expert(seed: int, f: int = 8, d: int = 12, *, gated: bool = True, bias: bool = False) -> Expert:
    """Random matrices, no two neurons of one length."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (f, d), "up": (f, d), "down": (d, f), "gate_bias": (f,), "up_bias": (f,), "down_bias": (d,)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in FIELDS:
        if (name.startswith("gate") and not gated) or (name.endswith("bias") and not bias):
            values[name] = None  # type: ignore[assignment]
    return Expert(**values)


def layer_of(experts: Sequence[Expert], *, plain: bool = False) -> LayerExperts:
    """A layer of these experts. `plain` is about their activation: whether it is exactly ``act(gate) * up``."""

    def rows(one: Expert, kind: str) -> Tensor:
        parts = [getattr(one, f"gate{kind}"), getattr(one, f"up{kind}")]
        return torch.cat([part for part in parts if part is not None])

    first = experts[0]
    biased = first.up_bias is not None
    weights = ExpertWeights(
        up=torch.stack([rows(one, "") for one in experts]),
        down=torch.stack([one.down for one in experts]),
        activation=torch.nn.functional.silu,  # not looked at
        up_bias=torch.stack([rows(one, "_bias") for one in experts]) if biased else None,
        down_bias=torch.stack([one.down_bias for one in experts]) if biased else None,  # type: ignore[misc]
        gated=first.gate is not None,
        fused_activation=None if plain else "silu",
    )
    return LayerExperts(weights)


def made_up_layer(experts: int = 6, f: int = 8, d: int = 12, seed: int = 0, **kind: Any) -> LayerExperts:
    """Random experts."""
    return layer_of([made_up_expert(100 * seed + e, f, d, **kind) for e in range(experts)])


def read_all(experts: LayerExperts) -> list[Expert]:
    return [experts.read(e) for e in range(experts.num_experts)]


def output(expert: Expert, x: Tensor) -> Tensor:
    """``[T, d]`` what an expert computes of ``x [T, d]`` with SiLU."""

    def linear(matrix: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, matrix, bias)

    h = linear(expert.up, expert.up_bias)
    if expert.gate is None:
        h = torch.nn.functional.silu(h)
    else:
        h = torch.nn.functional.silu(linear(expert.gate, expert.gate_bias)) * h
    return torch.nn.functional.linear(h, expert.down, expert.down_bias)


def shuffled(expert: Expert, seed: int, *, flip: bool = False, noise: float = 0.0) -> Expert:
    """The same expert with its neurons in another order, half of them with another sign, and noise on everything."""
    generator = torch.Generator().manual_seed(seed)
    f = expert.width
    moved = expert.neurons(torch.randperm(f, generator=generator))
    values = {name: getattr(moved, name) for name in FIELDS}
    if flip:
        sign = torch.where(torch.rand(f, generator=generator) < 0.5, -1.0, 1.0)
        values["up"], values["down"] = values["up"] * sign[:, None], values["down"] * sign
        values["up_bias"] = None if values["up_bias"] is None else values["up_bias"] * sign
    for name, value in values.items():
        if value is not None and noise:
            values[name] = value + noise * value.std() * torch.randn(value.shape, generator=generator)
    return Expert(**values)


def same(a: Expert, b: Expert) -> bool:
    """Bit for bit."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in FIELDS]
    return all((x is None and y is None) or (x is not None and y is not None and x.equal(y)) for x, y in pairs)


def layer_plan(
    experts: int, groups: Sequence[Sequence[int]], *, weights: Sequence[Sequence[float]] | None = None, **changes: Any
) -> LayerPlan:
    """A layer that is merged into `groups`, by equal shares if no others are given; without any, nothing happens."""
    members = tuple(tuple(one) for one in groups)
    shares = weights or [[1 / len(one)] * len(one) for one in members]
    keep = tuple(one[0] for one in members)
    fields: dict[str, Any] = {
        "layer": 0,
        "op": "identity" if len(keep) == experts else "merge",
        "num_experts": experts,
        "keep": keep,
        "groups": members if any(len(one) > 1 for one in members) else (),
        "weights": tuple(tuple(one) for one in shares) if any(len(one) > 1 for one in members) else (),
        "scores": tuple((e + 1) / sum(range(1, experts + 1)) for e in range(experts)),
        "expert_nbytes": 0,
        "expert_parameters": 0,
    }
    return LayerPlan(**(fields | changes))
