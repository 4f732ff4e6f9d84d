"""Factorisations: exact at full rank, the best of their rank in their norm, and as large as they say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from collegium.catalog import methods
from collegium.compress.factor import McSmoe, Svd, WhitenedSvd, factor_plan, factors, find_factor
from collegium.compress.factor.parts import RIDGE, rank_of, truncate
from collegium.compress.matrices import LayerExperts
from collegium.compress.plan_layer import LayerPlan
from collegium.errors import ConfigError, NonFiniteError
from collegium.experts.weights import ExpertWeights
from collegium.measure.statistics import Entry, LayerEntry, Statistics, StatisticsMeta
from collegium.models.checkpoint import open_checkpoint
from collegium.models.summary import summarize
from pruning import saved

E, D, F = 4, 12, 9
NAMES = [one.name for one in methods("factor")]


def layer_experts(gated: bool = True, bias: bool = False, seed: int = 0) -> LayerExperts:
    generator = torch.Generator().manual_seed(seed)
    u = 2 * F if gated else F
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return LayerExperts(
        ExpertWeights(
            up=draw(E, u, D), down=draw(E, D, F), activation=torch.relu, gated=gated,
            up_bias=draw(E, u) if bias else None, down_bias=draw(E, D) if bias else None,
        )
    )  # fmt: skip


def layer_plan(keep: tuple[int, ...] = (0, 1, 2, 3)) -> LayerPlan:
    return LayerPlan(
        layer=0, op="factor", num_experts=E, intermediate_size=F, keep=keep, expert_nbytes=1, expert_parameters=1,
        neuron_nbytes=1, neuron_parameters=1,
    )  # fmt: skip


def moments(seed: int = 0, unseen: int | None = None) -> Statistics:
    """Inputs with a few strong directions; hidden values of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, D, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, D, dtype=torch.float64)
    x = x @ torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    hidden = torch.rand(E, F, generator=generator, dtype=torch.float64) ** 6 * 100
    if unseen is not None:
        hidden[unseen] = 0
    entries = (
        Entry(name="c_in", collector="moments", axes=("d", "d")),
        Entry(name="h_sq", collector="moments", axes=("E", "f")),
    )
    meta = StatisticsMeta(
        model="made up", family="none", num_layers=1, data=("numbers",), domains=("all",), tokens=200,
        statistics=entries, collectors={"moments": {}}, created="2026-01-01T00:00:00+00:00", collegium="0",
        layers=(LayerEntry(layer=0, path="layers.0", num_experts=E, top_k=2, hidden_size=D, intermediate_size=F),),
    )  # fmt: skip
    return Statistics(meta, {(0, "c_in"): x.T @ x, (0, "h_sq"): hidden})


def made(name: str, experts: LayerExperts, keep: tuple[int, ...] = (0, 1, 2, 3), **settings: Any) -> list[Any]:
    return list(find_factor(name, settings).factor(layer_plan(keep), experts, moments()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True), (True, True)])
def test_full_rank_is_the_expert_itself(name: str, gated: bool, bias: bool) -> None:
    experts = layer_experts(gated, bias)
    found = made(name, experts, (1, 3), rank=999)
    assert len(found) == 2
    for e, one in zip((1, 3), found, strict=True):
        whole = experts.read(e)
        pairs = [(one.up_proj, whole.up, whole.up_bias), (one.down_proj, whole.down, whole.down_bias)]
        assert (one.gate_proj is None) == (whole.gate is None)
        if whole.gate is not None:
            pairs.append((one.gate_proj, whole.gate, whole.gate_bias))
        for matrix, weight, offset in pairs:
            torch.testing.assert_close(matrix.dense(), weight, rtol=1e-4, atol=1e-4)
            assert (matrix.bias is None) == (offset is None)
            assert offset is None or matrix.bias.equal(offset)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_sizes_are_those_that_were_asked_for_and_announced(name: str, share: float) -> None:
    operator = find_factor(name, {"share": share})
    extra = getattr(operator, "sparse", 0.0)
    for expert in operator.factor(layer_plan(), layer_experts(), moments()):
        for matrix in expert.matrices:
            m, n = matrix.shape
            stored = sum(p.numel() for p in matrix.parameters())
            assert stored == operator.size(m, n)
            # one rank less would be within the share, or it is the least there is
            assert stored <= (share + extra) * m * n + n or matrix.rank == 1
            assert matrix.rank == max(1, int(share * m * n / (m + n)))


@pytest.mark.parametrize("name", NAMES)
def test_settings_that_are_none(name: str) -> None:
    for settings_ in ({"share": 0.0}, {"share": 1.5}, {"rank": 0}, {"nothing": 1}, {"share": "much"}):
        with pytest.raises(ConfigError, match=name):
            find_factor(name, settings_)
    assert {field.name for field in dataclasses.fields(find_factor(name, {}))} >= {"share", "rank"}


def test_the_registry() -> None:
    assert {Svd, WhitenedSvd, McSmoe} <= set(factors())
    with pytest.raises(ConfigError, match="svd"):
        find_factor("none", {})


@torch.no_grad()
def error(weight: Tensor, product: Tensor, moment: Tensor | None) -> float:
    """``||(W - A B) C^(1/2)||``, by the definition."""
    rest = (weight - product).double()
    if moment is None:
        return float(rest.norm())
    C = torch.diag(moment) if moment.dim() == 1 else moment
    C = C + RIDGE * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    return float((rest @ C @ rest.T).trace().sqrt())


@given(
    m=st.integers(1, 12), n=st.integers(1, 12), r=st.integers(1, 12), kind=st.integers(0, 2), seed=st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_no_matrix_of_the_rank_is_nearer(m: int, n: int, r: int, kind: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, r = torch.randn(m, n, generator=generator), min(m, n, r)
    x = torch.randn(2 * n, n, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, n, dtype=torch.float64)
    moment = [None, x.T @ x, x.square().sum(0)][kind]
    A, B = truncate(weight, r, moment)
    assert (A.shape, B.shape) == ((m, r), (r, n))
    # the least error there is: what the singular values of the whitened matrix leave
    C = torch.eye(n, dtype=torch.float64) if moment is None else torch.diag(moment) if moment.dim() == 1 else moment
    C = C if moment is None else C + RIDGE * C.diagonal().mean() * torch.eye(n, dtype=C.dtype)
    values = torch.linalg.svdvals(weight.double() @ torch.linalg.cholesky(C))
    least = float(values[r:].square().sum().sqrt())
    assert error(weight, A @ B, moment) <= least + 1e-5 * float(values[0])
    # split between both by square roots
    torch.testing.assert_close(A.norm(dim=0), B.norm(dim=1), rtol=1e-4, atol=1e-5)


def test_whitening_costs_the_plain_norm_and_gains_in_its_own() -> None:
    experts, statistics = layer_experts(), moments()
    plain, white = made("svd", experts, rank=3), made("whitened_svd", experts, rank=3)
    c_in, h_sq = statistics.get(0, "c_in"), statistics.get(0, "h_sq")
    for e in range(E):
        whole = experts.read(e)
        for weight, ours, other, moment in (
            (whole.gate, white[e].gate_proj, plain[e].gate_proj, c_in),
            (whole.up, white[e].up_proj, plain[e].up_proj, c_in),
            (whole.down, white[e].down_proj, plain[e].down_proj, h_sq[e]),
        ):
            assert error(weight, ours.dense(), moment) < 0.9 * error(weight, other.dense(), moment)
            assert error(weight, ours.dense(), None) > error(weight, other.dense(), None)


def test_an_expert_that_no_token_reached_is_truncated_plainly() -> None:
    experts, statistics = layer_experts(), moments(unseen=2)
    white = list(WhitenedSvd(rank=3).factor(layer_plan(), experts, statistics))[2]
    plain = list(Svd(rank=3).factor(layer_plan(), experts, None))[2]
    torch.testing.assert_close(white.down_proj.dense(), plain.down_proj.dense(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="c_in, h_sq"):
        WhitenedSvd().factor(layer_plan(), experts, None)


def test_mc_smoe_keeps_the_longest_rows_of_what_is_left() -> None:
    experts = layer_experts()
    one = made("mc_smoe", experts, rank=2, sparse=0.34)[0]
    whole = experts.read(0)
    for matrix, weight in ((one.up_proj, whole.up), (one.down_proj, whole.down)):
        rest = weight - matrix.A @ matrix.B
        count = round(0.34 * len(weight))
        assert matrix.rows.tolist() == rest.norm(dim=1).topk(count).indices.sort().values.tolist()
        torch.testing.assert_close(matrix.dense()[matrix.rows], weight[matrix.rows])
        gone = [i for i in range(len(weight)) if i not in matrix.rows.tolist()]
        torch.testing.assert_close(matrix.dense()[gone], (matrix.A @ matrix.B)[gone])
    assert made("mc_smoe", experts, sparse=0.0)[0].up_proj.S is None
    assert made("mc_smoe", experts, rank=1, sparse=1.0)[0].up_proj.dense().allclose(whole.up, atol=1e-5)
    with pytest.raises(ConfigError, match="sparse"):
        McSmoe(sparse=1.1)


def test_ranks() -> None:
    assert rank_of(768, 768, 1 / 12, None) == 32  # the scripts' 32 for d = 768
    assert rank_of(10, 4, 1.0, None) == 2
    assert rank_of(10, 4, 1e-9, None) == 1
    assert rank_of(10, 4, 0.5, 99) == 4


def test_damaged_weights_have_no_factors() -> None:
    weight = torch.randn(3, 4)
    weight[1, 1] = torch.inf
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        truncate(weight, 2)


def test_plans(tmp_path: Path) -> None:
    source = saved(tmp_path, "gpt_oss")
    summary = summarize(open_checkpoint(source))
    plan = factor_plan(source, "svd", {"share": 0.5})
    assert not plan.portable
    assert all(layer.op == "factor" and len(layer.keep) == 8 for layer in plan.layers)
    assert plan.operator is not None
    assert plan.operator.settings == {"share": 0.5, "rank": None}
    assert type(plan).model_validate_json(plan.model_dump_json()) == plan
    operator, d, f = Svd(share=0.5), 32, 24
    gone = 3 * d * f - 2 * operator.size(f, d) - operator.size(d, f)
    assert plan.asked.value == pytest.approx(1 - 16 * gone / summary.parameters)
    with pytest.raises(ConfigError, match="c_in, h_sq"):
        factor_plan(source, "whitened_svd")
    with pytest.raises(ConfigError, match="these statistics lack"):
        lacking = moments()
        meta = lacking.meta.model_copy(update={"statistics": lacking.meta.statistics[:1]})
        factor_plan(source, "whitened_svd", statistics=Statistics(meta, {(0, "c_in"): lacking.get(0, "c_in")}))
    with pytest.raises(ConfigError, match="fingerprint"):
        other = moments()
        factor_plan(source, statistics=Statistics(other.meta.model_copy(update={"fingerprint": "abc"}), other.tensors))
