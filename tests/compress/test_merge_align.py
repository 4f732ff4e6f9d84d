"""Neuron alignment: the assignment is a best one, and experts that are permutations of one another are found to be."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import layer_of, layer_plan, made_up_expert, output, same, shuffled

from collegium.compress.merge import McSmoe, alignment


@given(st.integers(0, 1 << 16), st.integers(1, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_other_order_and_signs_bring_two_experts_nearer(seed: int, f: int, gated: bool) -> None:
    one, other = (made_up_expert(seed + e, f, 3, gated=gated) for e in (0, 1))
    found = alignment(one, other, flips=gated)

    def worth(order: tuple[int, ...], signs: tuple[float, ...]) -> float:
        """Sum of the inner products with `one`, each matrix over the mean lengths of its vectors in both."""
        total = 0.0
        for name, signed in (("gate", False), ("up", True), ("down", True)):
            a, b = getattr(one, name), getattr(other, name)
            if a is not None:
                a, b = (a.T, b.T) if name == "down" else (a, b)
                products = (a * b[list(order)]).sum(1) * (torch.tensor(signs) if signed else 1)
                total += float(products.sum() / (a.norm(dim=1).mean() * b.norm(dim=1).mean()))
        return total

    best = max(
        worth(order, signs)
        for order in permutations(range(f))
        for signs in product(*[(1.0, -1.0) if gated else (1.0,)] * f)
    )
    assert worth(tuple(found.order.tolist()), tuple(found.sign.tolist())) == pytest.approx(best, abs=1e-4)


@given(st.integers(0, 1000), st.integers(2, 5), st.integers(1, 12), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=50, deadline=None)
def test_permutations_of_one_expert_merge_back_to_it(
    seed: int, members: int, f: int, gated: bool, bias: bool, flip: bool
) -> None:
    one = made_up_expert(seed, f, gated=gated, bias=bias)
    experts = [one, *(shuffled(one, seed + e, flip=flip and gated) for e in range(1, members))]
    shares = torch.rand(members, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    layer = layer_plan(members, [range(members)], weights=[(shares / shares.sum()).tolist()])
    (merged,) = McSmoe().merge(layer, layer_of(experts), None)
    for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
        was, now = getattr(one, name), getattr(merged, name)
        assert (was is None) == (now is None)
        assert was is None or (was - now).abs().max() < 1e-5


def test_noise_does_not_hide_a_permutation() -> None:
    one = made_up_expert(0, 64, 32)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    noisy = shuffled(one.neurons(order), 2, flip=True, noise=0.3)
    found = alignment(one, noisy, flips=True)
    assert (found(noisy).gate - one.gate).std() < 0.5  # 1.4 for neurons that have nothing to do with one another
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(output(found(noisy), x), output(noisy, x), rtol=1e-4, atol=1e-3)


def test_where_the_sign_of_up_is_not_free_it_is_left_alone() -> None:
    one = made_up_expert(0, bias=True)
    opposite = shuffled(one, 1, flip=True)
    assert set(alignment(one, opposite, flips=True).sign.tolist()) == {-1.0, 1.0}
    assert set(alignment(one, opposite, flips=False).sign.tolist()) == {1.0}
    layer = layer_plan(2, [[0, 1]])
    free, bound = (next(McSmoe().merge(layer, layer_of([one, opposite], plain=plain), None)) for plain in (False, True))
    torch.testing.assert_close(free.up, one.up)
    assert (bound.up - one.up).abs().max() > 0.1


def test_the_first_member_is_not_touched_by_aligning_others_to_it() -> None:
    one, other = made_up_expert(0), made_up_expert(1)
    layer = layer_plan(2, [[0, 1]], weights=[[1.0, 0.0]])
    (merged,) = McSmoe().merge(layer, layer_of([one, other]), None)
    assert same(merged, one)


def test_alignment_brings_an_average_nearer_to_both() -> None:
    one = made_up_expert(0, 32, 16)
    other = shuffled(one, 1, noise=0.2)
    found = alignment(one, other, flips=True)(other)
    assert (found.up - one.up).norm() < 0.3 * (other.up - one.up).norm()
    assert (found.down - one.down).norm() < 0.3 * (other.down - one.down).norm()
