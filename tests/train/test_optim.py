from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from collegium.train import Recipe, build_model
from collegium.train.optim import build_optimizer, clip_, first_non_finite, gradient_norm
from collegium.train.recipe import OptimSpec

Make = Callable[..., Recipe]


def test_only_matrices_that_are_no_router_decay(recipe: Make) -> None:
    model = build_model(
        recipe(moe__router_bias=True, moe__balance={"bias_update_rate": 0.01}, moe__scoring_func="sigmoid")
    )
    optimizer = build_optimizer(model, OptimSpec(weight_decay=0.3))
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decay) == set(names.values())
    assert decay["model.embed_tokens.weight"] == 0.3
    for name, value in decay.items():
        free = ".mlp.gate." in name or "norm" in name
        assert value == (0.0 if free else 0.3), name
    assert sum(".mlp.experts." in name for name in decay) >= 4
    assert not any("e_score_correction_bias" in name for name in decay)


def test_clipping_scales_to_the_limit_and_only_down() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    q = torch.nn.Parameter(torch.zeros(2))
    p.grad, q.grad = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 4.0])
    norm = float(gradient_norm([p, q]))
    assert norm == 5.0
    clip_([p, q], norm, 10.0)
    clip_([p, q], norm, 0.0)
    assert float(gradient_norm([p, q])) == 5.0
    clip_([p, q], norm, 1.0)
    assert float(gradient_norm([p, q])) == pytest.approx(1.0)


def test_the_first_tensor_that_is_not_finite_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert first_non_finite(model) is None
    model[1].weight.grad = torch.full((2, 2), float("inf"))
    assert first_non_finite(model) == "gradient of 1.weight"
    with torch.no_grad():
        model[1].bias[0] = float("nan")
    assert first_non_finite(model) == "parameter 1.bias"
