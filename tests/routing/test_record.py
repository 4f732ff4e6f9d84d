"""The `Routing` record and its `Dispatch`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.errors import ConfigError
from collegium.routing import Routing, RoutingContext


@st.composite
def topk(draw) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A ``[T, K]`` index without repeats in a row, sentinels anywhere, and its weights."""
    E = draw(st.integers(1, 9))
    K = draw(st.integers(1, E))
    T = draw(st.integers(0, 12))
    rows = [[e if draw(st.integers(0, 3)) else E for e in draw(st.permutations(range(E)))[:K]] for _ in range(T)]
    index = torch.tensor(rows, dtype=torch.int64).reshape(T, K)
    weight = torch.arange(1.0, T * K + 1).reshape(T, K)
    return index, weight.masked_fill(index == E, 0.0), E


def pairs(index: torch.Tensor, weight: torch.Tensor, sentinel: int) -> list[dict[int, float]]:
    """For each token: expert -> weight."""
    return [
        {e: w for e, w in zip(row, weights, strict=True) if e < sentinel}
        for row, weights in zip(index.tolist(), weight.tolist(), strict=True)
    ]


@settings(max_examples=80, deadline=None)
@given(topk())
def test_topk_round_trip(case):
    index, weight, E = case
    routing = Routing.from_topk(index, weight, E)
    back_index, back_weight = routing.to_topk()
    assert pairs(back_index, back_weight, E) == pairs(index, weight, E)
    wide_index, wide_weight = routing.to_topk(slots=index.shape[1] + 2)
    assert wide_index.shape == (index.shape[0], index.shape[1] + 2)
    assert pairs(wide_index, wide_weight, E) == pairs(index, weight, E)
    assert (wide_weight[wide_index == E] == 0).all()


@settings(max_examples=80, deadline=None)
@given(topk(), st.data())
def test_dispatch_is_sorted_stable_and_invertible(case, data):
    index, weight, E = case
    routing = Routing.from_topk(index, weight, E)
    A = routing.expert.numel()
    kept = torch.tensor([data.draw(st.booleans()) for _ in range(A)], dtype=torch.bool)
    for record in (routing, replace(routing, kept=kept)):
        dispatch = record.dispatch()
        assert record.dispatch() is dispatch
        alive = torch.arange(A) if record.kept is None else kept.nonzero().squeeze(1)
        assert sorted(dispatch.order.tolist()) == alive.tolist()
        expert = record.expert[dispatch.order]
        for e in range(E):
            rows = slice(int(dispatch.offsets[e]), int(dispatch.offsets[e + 1]))
            assert (expert[rows] == e).all()
            assert (dispatch.order[rows].diff() > 0).all()
        assert torch.equal(dispatch.token, record.token[dispatch.order])
        assert torch.equal(dispatch.counts, record.counts("kept"))
    inverse = routing.dispatch().inverse
    assert torch.equal(routing.dispatch().order[inverse], torch.arange(A))


def test_dispatch_of_very_many_experts():
    """More experts than a 16-bit sorting key can number."""
    expert = torch.randperm(70_000)[:600]
    dispatch = Routing(expert, torch.ones(600), 300, 70_000, slots=2).dispatch()
    assert torch.equal(expert[dispatch.order], expert.sort().values)


def test_replace_does_not_keep_a_stale_dispatch():
    routing = Routing.from_topk(torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2), 3)
    routing.dispatch()
    dropped = replace(routing, kept=torch.tensor([True, False, True, True]))
    assert dropped.dispatch().counts.tolist() == [1, 1, 1]


def test_counts_before_drops_kept_and_true():
    routing = Routing(
        expert=torch.tensor([0, 1, 1, 3, 0, 3]),
        weight=torch.ones(6),
        num_tokens=3,
        num_experts=4,
        slots=2,
        kept=torch.tensor([True, False, True, True, True, True]),
        num_true=3,
        valid=torch.tensor([True, True, False]),
    )
    assert routing.counts().tolist() == [1, 2, 0, 1]
    assert routing.counts("kept").tolist() == [1, 1, 0, 1]
    assert routing.counts("true").tolist() == [1, 1, 0]
    assert replace(routing, valid=None).counts("kept").tolist() == [2, 1, 0, 2]
    assert replace(routing, num_true=None).counts("true").tolist() == [1, 1, 0, 1]


def test_uniform_views_and_ragged_refusal():
    index = torch.tensor([[2, 0], [1, 2]])
    uniform = Routing.from_topk(index, torch.rand(2, 2), 3)
    assert uniform.slots == 2
    assert torch.equal(uniform.index_TK, index)
    assert uniform.index_TK.data_ptr() == uniform.expert.data_ptr()
    assert uniform.token.tolist() == [0, 0, 1, 1]

    ragged = Routing.from_topk(torch.tensor([[2, 3], [1, 2]]), torch.rand(2, 2), 3)
    assert ragged.slots is None
    assert ragged.token.tolist() == [0, 1, 1]
    with pytest.raises(ConfigError, match="differ in their number of experts"):
        _ = ragged.index_TK
    with pytest.raises(ConfigError, match="a token has 2 experts, more than the 1 slots"):
        ragged.to_topk(slots=1)
    with pytest.raises(ConfigError, match="a token has 2 experts, more than the 1 slots"):
        uniform.to_topk(slots=1)


def test_dropped_assignments_become_unused_slots():
    routing = Routing.from_topk(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0.6, 0.4], [0.7, 0.3]]), 3)
    index, weight = replace(routing, kept=torch.tensor([False, True, True, False])).to_topk()
    assert index.tolist() == [[1, 3], [1, 3]]
    torch.testing.assert_close(weight, torch.tensor([[0.4, 0.0], [0.7, 0.0]]))


def test_weights_keep_their_gradient_both_ways():
    weight = torch.rand(2, 2, requires_grad=True)
    _, back = Routing.from_topk(torch.tensor([[2, 3], [1, 2]]), weight, 3).to_topk()
    back.sum().backward()
    assert weight.grad.tolist() == [[1, 0], [1, 1]]


def test_with_assignments_changes_choices_only():
    probs = torch.rand(2, 4)
    routing = Routing.from_topk(torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2), 4, probs=probs)
    routing.dispatch()
    other = replace(routing, kept=torch.ones(4, dtype=torch.bool)).with_assignments(
        torch.tensor([[3, 4], [0, 3]]), torch.full((2, 2), 0.5)
    )
    assert other.probs is probs
    assert other.kept is None
    assert other.expert.tolist() == [3, 0, 3]
    assert other.dispatch().counts.tolist() == [1, 0, 0, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": torch.ones(3)}, r"expert \(4,\) and weight \(3,\)"),
        ({"slots": 3}, "4 assignments are not 2 tokens x 3 slots"),
        ({"slots": None}, "needs ragged_token"),
        ({"valid": torch.ones(1, 2, dtype=torch.bool)}, r"valid must be \[2\].*\(1, 2\)"),
    ],
)
def test_inconsistent_records_are_refused(fields, message):
    good = {
        "expert": torch.tensor([0, 1, 1, 2]),
        "weight": torch.ones(4),
        "num_tokens": 2,
        "num_experts": 3,
        "slots": 2,
    }
    with pytest.raises(ConfigError, match=message):
        Routing(**{**good, **fields})


def test_context_generator_replays_and_separates():
    def draw(context: RoutingContext, purpose: str = "a") -> list[float]:
        return torch.rand(3, generator=context.generator(purpose)).tolist()

    first = draw(RoutingContext(seed=1, step=2, layer=3))
    assert draw(RoutingContext(seed=1, step=2, layer=3)) == first
    for other in (RoutingContext(seed=1, step=3, layer=3), RoutingContext(seed=1, step=2, layer=2)):
        assert draw(other) != first
    assert draw(RoutingContext(seed=1, step=2, layer=3), "b") != first
