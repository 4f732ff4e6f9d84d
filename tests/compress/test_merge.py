"""Merges: what every one must hold to, and what each of them is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from merging import (
    FIELDS,
    layer_of,
    layer_plan,
    made_up_expert,
    made_up_layer,
    output,
    read_all,
    same,
    shuffled,
)

from collegium.catalog import get, methods
from collegium.compress.collectors import COLLECTORS
from collegium.compress.matrices import Expert, LayerExperts, pack
from collegium.compress.merge import Average, Dern, McSmoe, Merge, SubMoe, find_merge, merges
from collegium.compress.merge.sub_moe import Union
from collegium.errors import ConfigError, NonFiniteError, PlanError
from collegium.measure.statistics import Entry, LayerEntry, Statistics, StatisticsMeta

GROUPS = [[0, 2, 3], [4, 1], [5]]


@dataclass(frozen=True)
class Case:
    """A merge with settings; `aligned`: the order of the neurons of a member that is not dominant does not count."""

    merge: Merge
    aligned: bool = True

    @property
    def groups(self) -> list[list[int]]:
        """Of 6 experts."""
        return GROUPS if self.merge.needs_groups else [[0], [4], [5]]

    def __str__(self) -> str:
        return repr(self.merge)


CASES = [
    Case(Average(), aligned=False),
    Case(McSmoe()),
    Case(SubMoe()),
    Case(SubMoe(align=False), aligned=False),
    Case(SubMoe(rank=0.5)),
    Case(SubMoe(rank=0.5, whiten=True)),
    Case(Dern()),
    Case(Dern(threshold=0.0, include_gate=True)),
]
KINDS: list[dict[str, Any]] = [{}, {"bias": True}, {"gated": False}, {"gated": False, "bias": True}]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def statistics_of(f: int = 8, d: int = 12, experts: int = 6) -> Statistics:
    """What whitening needs, at random; expert 3 saw no token."""
    shapes = {"n": ("E",), "h_sq": ("E", "f"), "c_in": ("d", "d")}
    meta = StatisticsMeta(
        model="made up", family="none", num_layers=1, data=("numbers",), domains=("all",), tokens=100,
        layers=(LayerEntry(layer=0, path="0", num_experts=experts, top_k=2, hidden_size=d, intermediate_size=f),),
        statistics=tuple(
            Entry(name=name, collector="c", axes=axes, dtype="int64" if name == "n" else "float64")
            for name, axes in shapes.items()
        ),
        collectors={"c": {}}, created="", collegium="0",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, d, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, d)
    n = torch.full((experts,), 50)
    h_sq = torch.rand(experts, f, generator=generator, dtype=torch.float64) * 100
    n[3], h_sq[3] = 0, 0
    return Statistics(meta, {(0, "n"): n, (0, "h_sq"): h_sq, (0, "c_in"): x.T @ x})


def merged(case: Case, experts: LayerExperts, statistics: Statistics | None = None, **changes: Any) -> list[Expert]:
    f, d = experts.intermediate_size, experts.hidden_size
    plan = layer_plan(experts.num_experts, case.groups, **changes)
    return list(case.merge.merge(plan, experts, statistics or statistics_of(f, d, experts.num_experts)))


def test_every_merge_is_among_the_cases() -> None:
    assert {type(case.merge) for case in CASES} == set(merges())
    assert [one.name for one in methods("merge")] == [one.name for one in merges()]
    for case in CASES:
        assert get("merge", case.merge.name) is type(case.merge)


def test_a_calibration_pass_can_gather_what_merges_read() -> None:
    there = {entry.name for one in COLLECTORS for entry in one.statistics}
    assert {need for case in CASES for need in case.merge.needs} <= there


@every_case
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_where_nothing_goes_nothing_changes(case: Case, kind: dict[str, Any]) -> None:
    experts = made_up_layer(**kind)
    new = list(case.merge.merge(layer_plan(6, [[e] for e in range(6)]), experts, statistics_of()))
    assert len(new) == 6
    assert all(same(a, b) for a, b in zip(new, read_all(experts), strict=True))


@every_case
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_new_experts_are_finite_and_fit_the_layout(case: Case, kind: dict[str, Any]) -> None:
    experts = made_up_layer(**kind)
    new = merged(case, experts)
    packed = pack(new, experts.weights)
    assert {name: one.shape[1:] for name, one in packed.items()} == {
        name: one.shape[1:] for name, one in pack(read_all(experts), experts.weights).items()
    }
    for one in packed.values():
        assert len(one) == 3
        assert one.isfinite().all()


@every_case
def test_the_same_arguments_give_the_same_bits(case: Case) -> None:
    experts = made_up_layer()
    assert all(same(a, b) for a, b in zip(merged(case, experts), merged(case, experts), strict=True))


@every_case
def test_a_protected_expert_keeps_its_bits_and_another_does_not(case: Case) -> None:
    merge = Dern(threshold=0.0) if isinstance(case.merge, Dern) else case.merge
    experts = made_up_layer()
    new = merged(Case(merge), experts, protected=(5,))
    assert same(new[2], experts.read(5))
    assert not same(new[0], experts.read(0))


@every_case
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_order_of_a_members_neurons_does_not_count_for_those_that_align(case: Case, kind: dict[str, Any]) -> None:
    originals = read_all(made_up_layer(seed=3, **kind))
    # members that are like their dominants, so that DERN has something to move
    originals[1] = shuffled(originals[4], 1, noise=0.1)
    originals[2] = shuffled(originals[0], 2, noise=0.1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))
    permuted = list(originals)
    permuted[2] = originals[2].neurons(order)
    statistics, other = statistics_of(), statistics_of()
    other.tensors[0, "h_sq"][2] = statistics.tensors[0, "h_sq"][2][order]
    x = torch.randn(10, 12, generator=torch.Generator().manual_seed(7))
    before = [output(one, x) for one in merged(case, layer_of(originals), statistics)]
    after = [output(one, x) for one in merged(case, layer_of(permuted), other)]
    close = [torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(before, after, strict=True)]
    assert close == [case.aligned, True, True]


@pytest.mark.parametrize("case", [case for case in CASES if case.merge.needs_groups], ids=str)
def test_experts_in_no_group_are_pruned(case: Case) -> None:
    experts = made_up_layer()
    plan = layer_plan(6, [[1], [2], [5]])
    new = list(case.merge.merge(plan, experts, statistics_of()))
    assert all(same(one, experts.read(e)) for one, e in zip(new, plan.keep, strict=True))


def test_settings_come_from_plain_values_and_wrong_ones_are_named() -> None:
    assert find_merge("sub_moe", {"rank": 0.25, "align": False}) == SubMoe(rank=0.25, align=False)
    assert find_merge("dern", {"threshold": 1}) == Dern(threshold=1.0)
    with pytest.raises(ConfigError, match=r"no merge is named 'blend'; there are average, dern, mc_smoe, sub_moe"):
        find_merge("blend", {})
    with pytest.raises(
        ConfigError,
        match=r"merge 'sub_moe': there is no setting 'ranks'; did you mean 'rank'\? There are rank, align, whiten",
    ):
        find_merge("sub_moe", {"ranks": 3})
    with pytest.raises(ConfigError, match=r"merge 'sub_moe': rank is a share of the singular values.*not 2"):
        find_merge("sub_moe", {"rank": 2})
    with pytest.raises(ConfigError, match=r"merge 'dern': setting 'threshold': .*number"):
        find_merge("dern", {"threshold": "high"})


def test_an_average_is_the_weighted_sum_of_the_matrices() -> None:
    experts = made_up_layer(bias=True)
    plan = layer_plan(6, GROUPS, weights=[[0.5, 0.3, 0.2], [0.25, 0.75], [1.0]])
    first, second, _ = Average().merge(plan, experts, None)
    old = read_all(experts)
    for name in FIELDS:
        a, b = getattr(first, name), getattr(second, name)
        torch.testing.assert_close(
            a, 0.5 * getattr(old[0], name) + 0.3 * getattr(old[2], name) + 0.2 * getattr(old[3], name)
        )
        torch.testing.assert_close(b, 0.25 * getattr(old[4], name) + 0.75 * getattr(old[1], name))


def test_a_weight_that_is_not_finite_is_refused_where_neurons_are_compared() -> None:
    experts = made_up_layer()
    experts.weights.up[2, 3, 4] = torch.inf
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        list(McSmoe().merge(layer_plan(6, GROUPS), experts, None))


# Sub-MoE


@pytest.mark.parametrize(("rows", "columns"), [(6, 10), (40, 10), (21, 10)])
@pytest.mark.parametrize("rank", [1.0, 0.6, 0.01])
def test_the_union_is_the_papers_decomposition(rows: int, columns: int, rank: float) -> None:
    # W_i M_i = Q S V_i^T, all i at once; V* = sum of f_i V_i M_i^-T; W* = Q S V*^T
    generator = torch.Generator().manual_seed(rows)
    matrices = [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(3)]
    factors = [torch.randn(columns, columns, generator=generator, dtype=torch.float64).tril() for _ in range(3)]
    factors = [one + 3 * torch.eye(columns, dtype=torch.float64) for one in factors]
    shares = [0.5, 0.3, 0.2]
    Q, S, Vh = torch.linalg.svd(
        torch.cat([w @ m for w, m in zip(matrices, factors, strict=True)], 1), full_matrices=False
    )
    r = max(1, round(rank * len(S)))
    right = [part @ torch.linalg.inv(m) for part, m in zip(Vh[:r].split(columns, 1), factors, strict=True)]
    expected = (Q[:, :r] * S[:r]) @ sum(f * v for f, v in zip(shares, right, strict=True))

    union = Union(rows, 3 * columns)
    for w, m in zip(matrices, factors, strict=True):
        union.add(w @ m)
    mean = sum(f * w for f, w in zip(shares, matrices, strict=True))
    assert isinstance(mean, torch.Tensor)
    found = union.truncated(mean, rank).double()
    assert (found - expected).norm() < 1e-5 * mean.norm()
    if rank == 1:
        assert (found - mean).norm() < 1e-5 * mean.norm()


def test_sub_moe_without_truncation_is_an_average_and_with_it_has_low_rank() -> None:
    experts, plan = made_up_layer(), layer_plan(6, GROUPS)
    for plain, whole in zip(
        Average().merge(plan, experts, None), SubMoe(align=False).merge(plan, experts, None), strict=True
    ):
        assert same(plain, whole)
    for whiten in (False, True):
        first = next(SubMoe(rank=0.25, whiten=whiten).merge(plan, experts, statistics_of()))
        assert first.gate is not None
        assert [int(torch.linalg.matrix_rank(one, rtol=1e-4)) for one in (first.gate, first.up, first.down)] == [
            2,
            2,
            3,
        ]


def test_whitening_loses_less_of_what_the_inputs_show() -> None:
    originals = read_all(made_up_layer(f=24, d=16))
    originals[1] = shuffled(originals[0], 1, noise=0.5)
    experts, plan, statistics = layer_of(originals), layer_plan(6, [[0, 1]]), statistics_of(24, 16)
    inputs = torch.linalg.cholesky(statistics.get(0, "c_in")).float()
    whole = next(SubMoe().merge(plan, experts, None))
    lost = []
    for whiten in (True, False):
        found = next(SubMoe(rank=0.4, whiten=whiten).merge(plan, experts, statistics))
        lost.append(float(((found.up - whole.up) @ inputs).norm()))
    assert lost[0] < lost[1]


def test_whitening_without_statistics_is_refused() -> None:
    assert SubMoe(whiten=True, rank=0.5).needs == ("c_in", "h_sq", "n")
    assert SubMoe(whiten=True).needs == SubMoe(rank=0.5).needs == ()
    with pytest.raises(ConfigError, match="needs the statistics c_in, h_sq, n"):
        list(SubMoe(rank=0.5, whiten=True).merge(layer_plan(6, GROUPS), made_up_layer(), None))
    zero = statistics_of()
    zero.tensors[0, "c_in"].zero_()
    with pytest.raises(ConfigError, match="c_in of layer 0 is no second moment"):
        list(SubMoe(rank=0.5, whiten=True).merge(layer_plan(6, GROUPS), made_up_layer(), zero))


# DERN


def planted(f: int = 32, d: int = 24, *, flip: bool = True, **kind: Any) -> LayerExperts:
    """Expert 3 is expert 0 with its neurons in another order and 1 % noise."""
    experts = [made_up_expert(e, f, d, **kind) for e in range(4)]
    experts[3] = shuffled(experts[0], 9, flip=flip, noise=0.01)
    return layer_of(experts)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dern_gives_the_neurons_of_a_copy_to_its_original(kind: dict[str, Any]) -> None:
    experts = planted(flip=kind.get("gated", True), **kind)
    plan = layer_plan(4, [[0], [1], [2]])
    share = Dern().moved(plan, experts)
    assert share.shape == (4, 3)
    assert share[:3].equal(torch.eye(3, dtype=torch.float64))
    assert share[3, 0] > 0.99
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
    wanted = output(experts.read(3), x)
    new = list(Dern().merge(plan, experts, None))
    error = [float((output(one, x) - wanted).norm()) for one in new]
    # pruned, the tokens of expert 3 go to experts that have nothing to do with it
    assert error[0] < 0.05 * min(error[1:])
    unaligned = next(Average().merge(layer_plan(4, [[0, 3], [1], [2]]), experts, None))
    assert error[0] < 0.2 * float((output(unaligned, x) - wanted).norm())
    assert not same(new[0], experts.read(0))
    assert same(new[1], experts.read(1))


def test_dern_moves_nothing_to_experts_that_are_not_alike_and_so_prunes() -> None:
    experts, plan = made_up_layer(d=64), layer_plan(6, [[0], [4], [5]])
    dern = Dern(threshold=0.9)
    assert dern.moved(plan, experts).sum() == 3
    assert all(same(one, experts.read(e)) for one, e in zip(dern.merge(plan, experts, None), plan.keep, strict=True))


def test_dern_does_not_move_neurons_to_a_protected_expert() -> None:
    share = Dern().moved(layer_plan(4, [[0], [1], [2]], protected=(0,)), planted())
    assert share[3].sum() < 0.05


@pytest.mark.parametrize("gate", [False, True])
def test_dern_finds_the_same_hosts_by_a_sketch(gate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    experts, plan = planted(f=24, d=64), layer_plan(4, [[0], [1], [2]])
    dern = Dern(include_gate=gate, projection=48)
    exact, new = dern.moved(plan, experts), list(dern.merge(plan, experts, None))
    monkeypatch.setattr("collegium.compress.merge.nearest._EXACT", 0)
    monkeypatch.setattr("collegium.compress.merge.nearest._HELD", 1)
    monkeypatch.setattr("collegium.compress.merge.nearest._PRODUCTS", 100)
    monkeypatch.setattr("collegium.compress.merge.dern._EXACT", 0)
    assert dern.moved(plan, experts).equal(exact)
    assert exact[3].sum() > 0.99
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    for one, other in zip(new, dern.merge(plan, experts, None), strict=True):
        torch.testing.assert_close(output(one, x), output(other, x), rtol=1e-3, atol=1e-2)


def test_dern_mixes_router_rows_by_importance_and_moved_share() -> None:
    experts = planted()
    mixing = Dern().mixing(layer_plan(4, [[0], [1], [2]], scores=(0.3, 0.2, 0.3, 0.2)), experts)
    assert mixing.shape == (3, 4)
    torch.testing.assert_close(mixing.sum(1), torch.ones(3, dtype=torch.float64))
    share = Dern().moved(layer_plan(4, [[0], [1], [2]]), experts)[3, 0]
    torch.testing.assert_close(mixing[0, 3] / mixing[0, 0], share * 0.2 / 0.3)


def test_dern_refuses_groups_and_plans_without_scores() -> None:
    with pytest.raises(PlanError, match=r"layer 0: merge 'dern' decides by itself.*without a grouping"):
        list(Dern().merge(layer_plan(6, GROUPS), made_up_layer(), None))
    with pytest.raises(PlanError, match=r"layer 0: merge 'dern' weighs neurons.*no scores"):
        list(Dern().merge(layer_plan(6, [[0], [1]], scores=()), made_up_layer(), None))
    with pytest.raises(ConfigError, match="threshold is a cosine"):
        Dern(threshold=2)


def test_an_expert_of_no_importance_does_not_pull_its_host() -> None:
    experts = planted()
    new = next(Dern().merge(layer_plan(4, [[0], [1], [2]], scores=(1.0, 0.0, 0.0, 0.0)), experts, None))
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(output(new, x), output(experts.read(0), x), rtol=1e-4, atol=1e-4)
