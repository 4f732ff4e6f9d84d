"""Experts one by one: the same numbers as fused ones, widths of their own, factors, and a map from ids to experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_compute import LAYOUTS, make_weights
from torch import Tensor

from collegium.errors import ConfigError
from collegium.experts.compute import reference
from collegium.experts.from_module import expert_weights
from collegium.experts.loose import LooseExpert, LooseExperts, LooseMatrix
from collegium.experts.weights import ExpertWeights
from collegium.routing import Routing
from collegium.sites import sites, tap
from tiny import tiny_inputs, tiny_model

T, K, E, D, F = 7, 3, 5, 8, 6


def taken_apart(weights: ExpertWeights, e: int) -> LooseExpert:
    """Expert e of fused ones, written with the layout's own words rather than with the code under test."""
    rows = weights.up_t[e].detach().T
    bias = None if weights.up_bias is None else weights.up_bias[e].detach()

    def part(first: bool) -> LooseMatrix:
        if not weights.gated:
            choice: Any = slice(None)
        elif weights.interleaved:
            choice = slice(0 if first else 1, None, 2)
        else:
            choice = slice(0, len(rows) // 2) if first else slice(len(rows) // 2, None)
        return LooseMatrix(rows[choice].clone(), bias=None if bias is None else bias[choice].clone())

    down_bias = None if weights.down_bias is None else weights.down_bias[e].detach().clone()
    down = LooseMatrix(weights.down_t[e].detach().T.clone(), bias=down_bias)
    return LooseExpert(part(True) if weights.gated else None, part(False), down)


def loose(weights: ExpertWeights, expert_map: Tensor | None = None) -> LooseExperts:
    return LooseExperts(
        [taken_apart(weights, e) for e in range(weights.num_experts)],
        weights.activation,
        interleaved=weights.interleaved,
        post_norm=weights.post_norm,
        expert_map=expert_map,
    )


def call(seed: int = 0, num_experts: int = E) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(num_experts, generator=generator)[:K] for _ in range(T)])
    return torch.randn(T, D, generator=generator), index, torch.rand(T, K, generator=generator)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_experts_give_what_fused_ones_give(layout: str) -> None:
    weights = make_weights(D, F, E, **LAYOUTS[layout])
    x, index, weight = call()
    index[0, 1] = index[2, 0] = E  # unused slots
    found = loose(weights)(x, index, weight)
    torch.testing.assert_close(found, reference(x, Routing.from_topk(index, weight, E), weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["gated", "plain", "interleaved clamped bias"])
def test_gradients_are_those_of_fused_experts(layout: str) -> None:
    weights = make_weights(D, F, E, **LAYOUTS[layout])
    module = loose(weights)
    x, index, weight = call()
    sides = []
    for run in (lambda x, w: module(x, index, w), lambda x, w: reference(x, Routing.from_topk(index, w, E), weights)):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        run(*leaves).square().sum().backward()
        sides.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(sides[0], sides[1], rtol=1e-4, atol=1e-5)
    grad = weights.down.grad if weights.transposed else weights.down.grad.mT
    for e in index.unique().tolist():
        torch.testing.assert_close(module.experts[e].down_proj.weight.grad.T, grad[e], rtol=1e-4, atol=1e-5)


def factored(rank: int, rows: int, seed: int = 0, bias: bool = True) -> LooseMatrix:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    sparse = {"S": draw(rows, D), "rows": torch.randperm(F, generator=generator)[:rows]} if rows else {}
    return LooseMatrix(A=draw(F, rank), B=draw(rank, D), bias=draw(F) if bias else None, **sparse)


@pytest.mark.parametrize(("rank", "rows"), [(1, 0), (3, 2), (6, 6)])
def test_a_factored_matrix_is_its_dense_one(rank: int, rows: int) -> None:
    matrix = factored(rank, rows)
    x = torch.randn(T, D)
    torch.testing.assert_close(matrix(x), x @ matrix.dense().T + matrix.bias, rtol=1e-5, atol=1e-5)
    assert (matrix.shape, matrix.rank, matrix.kept_rows) == ((F, D), rank, rows)
    if rows:
        plain = matrix.A @ matrix.B
        changed = (matrix.dense() != plain).any(1).nonzero().flatten()
        assert changed.tolist() == matrix.rows.sort().values.tolist()


def test_bytes_are_those_of_what_is_stored() -> None:
    up, down = factored(2, 1, bias=False), LooseMatrix(torch.zeros(D, F))
    expert = LooseExpert(factored(2, 0, bias=False), up, down).to(torch.bfloat16)
    factors = 2 * (F + D)
    assert expert.nbytes == 2 * (factors + factors + D + F * D) + 8  # and one int64 row number


def test_experts_of_several_widths_are_those_of_their_neurons() -> None:
    weights = make_weights(D, F, E)
    whole = loose(weights)
    ids = [[0, 1, 2, 3, 4, 5], [1, 4], [], [2], [0, 5]]

    def slim(e: int) -> LooseExpert:
        one = taken_apart(weights, e)
        return LooseExpert(
            LooseMatrix(one.gate_proj.weight.detach()[ids[e]]),
            LooseMatrix(one.up_proj.weight.detach()[ids[e]]),
            LooseMatrix(one.down_proj.weight.detach()[:, ids[e]]),
        )

    module = LooseExperts([slim(e) for e in range(E)], weights.activation)
    for e in range(E):
        gone = [k for k in range(F) if k not in ids[e]]
        with torch.no_grad():
            whole.experts[e].down_proj.weight[:, gone] = 0
    x, index, weight = call()
    torch.testing.assert_close(module(x, index, weight), whole(x, index, weight), rtol=1e-5, atol=1e-5)
    assert [expert.width for expert in module.experts] == [6, 2, 0, 1, 2]
    module(x, index, weight).sum().backward()
    # what looks at all experts alike sees neurons of zeros
    found = reference(x, Routing.from_topk(index, weight, E), module.weights)
    torch.testing.assert_close(found, module(x, index, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["gated", "plain transposed bias", "interleaved clamped bias", "norm"])
def test_as_fused_weights(layout: str) -> None:
    weights = make_weights(D, F, E, **LAYOUTS[layout])
    x, index, weight = call()
    expert_map = torch.tensor([4, 0, 1, 1, 2, 3])
    module = loose(weights, expert_map)
    index = index.where(index != E, 5)
    routing = Routing.from_topk(index, weight, 6)
    torch.testing.assert_close(reference(x, routing, module.weights), module(x, index, weight), rtol=1e-5, atol=1e-5)


def test_ids_that_share_an_expert_add_their_weights() -> None:
    weights = make_weights(D, F, 2)
    expert_map = torch.tensor([0, 1, 0, 1, 1])
    module = loose(weights, expert_map)
    x, index, weight = call()
    index[0, 2] = E
    weight[0, 2] = 0
    expected = torch.zeros(T, D)
    for t in range(T):
        for k in range(K):
            if index[t, k] < E:
                one = Routing.from_topk(expert_map[index[t, k]].view(1, 1), weight[t, k].view(1, 1), 2)
                expected[t] += reference(x[t : t + 1], one, weights)[0].detach()
    torch.testing.assert_close(module(x, index, weight), expected, rtol=1e-5, atol=1e-5)
    leaf = weight.clone().requires_grad_()
    module(x, index, leaf).sum().backward()
    assert (leaf.grad[1:] != 0).all()
    assert module.num_experts == E


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(2, 3), "A": torch.zeros(2, 1)}, "or A"),
        ({"A": torch.zeros(2, 1)}, "got"),
        ({"A": torch.zeros(2, 2), "B": torch.zeros(1, 3)}, r"\[2, 2\]"),
        ({"A": torch.zeros(2, 1), "B": torch.zeros(1, 3), "S": torch.zeros(1, 3)}, "rows"),
        ({"A": torch.zeros(2, 1), "B": torch.zeros(1, 3), "S": torch.zeros(1, 3), "rows": torch.zeros(2)}, "rows"),
    ],
)
def test_matrices_that_are_none(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LooseMatrix(**change)


def test_experts_that_do_not_fit() -> None:
    one = lambda f, d: LooseMatrix(torch.zeros(f, d))  # noqa: E731
    with pytest.raises(ConfigError, match="gate, up and down"):
        LooseExpert(one(2, 3), one(2, 3), one(2, 3))
    fine = [LooseExpert(None, one(2, d), one(d, 2)) for d in (3, 4)]
    with pytest.raises(ConfigError, match="one model width"):
        LooseExperts(fine, torch.relu)
    with pytest.raises(ConfigError, match="beyond the 1"):
        LooseExperts(fine[:1], torch.relu, expert_map=torch.tensor([0, 1]))


class Seen:
    def __init__(self) -> None:
        self.ids: dict[str, Tensor] = {}

    def __call__(self, site: Any, x: Tensor, routing: Routing) -> None:
        self.ids[site.path] = routing.index_TK


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark_text", "deepseek_v3"])
def test_in_the_place_of_a_familys_experts(family: str) -> None:
    model = tiny_model(family)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        expected = model(**inputs)[0]
    plain = Seen()
    with torch.no_grad(), tap(model, plain):
        model(**inputs)
    for site in sites(model):
        weights = expert_weights(site.experts)
        parts = [taken_apart(weights, e) for e in range(weights.num_experts)]
        site.block.experts = LooseExperts.like(site.experts, parts)
    changed = copy.deepcopy(model)
    del model
    seen = Seen()
    with torch.no_grad(), tap(changed, seen):
        torch.testing.assert_close(changed(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
    assert seen.ids.keys() == plain.ids.keys()
    assert all(seen.ids[path].equal(plain.ids[path]) for path in seen.ids)
    for site in sites(changed):
        names = changed.state_dict().keys()
        assert set(site.checkpoint_names(2).values()) <= names
        assert not any("gate_up_proj" in name or "post_norm" in name for name in names)
