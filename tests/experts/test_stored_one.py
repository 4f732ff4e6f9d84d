"""One row in one launch: bit for bit what the general kernels give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_records import activation, record
from torch import Tensor

from collegium.errors import ConfigError
from collegium.experts.compute import stored_int8, stored_one
from collegium.experts.compute.cpu_products import add_rows
from collegium.experts.compute.stored import StoredExperts, stored_linear, takes_one
from collegium.experts.compute.stored_one import linear_one
from collegium.experts.stored import ExpertLayout, quantise

pytestmark = pytest.mark.skipif(stored_int8.why_not() is not None, reason=str(stored_int8.why_not()))

FORMS = [(8, 0), (4, 32), (4, 64)]


def token(layout: ExpertLayout, n: int, act: str = "silu") -> tuple[StoredExperts, Tensor, list, Tensor]:
    own = StoredExperts(layout, activation(layout, act), act, "int8")
    torch.manual_seed(n)
    groups = [(record(layout, seed), seed, seed + 1) for seed in range(n)]
    return own, torch.randn(1, layout.d), groups, torch.rand(n)


def rows_of_many(own: StoredExperts, x: Tensor, groups: list) -> Tensor:
    """The experts' rows as one of two tokens, which the general kernels compute."""
    n = len(groups)
    out = torch.empty(n, own.layout.d)
    own.run(torch.cat([x, x + 1]), torch.zeros(n, dtype=torch.long), groups, out)
    return out


@settings(max_examples=30, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    d=st.sampled_from([128, 384, 512, 1152]),
    f=st.sampled_from([128, 640]),
    n=st.integers(1, 9),
    gated=st.booleans(),
    bias=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
    act=st.sampled_from(["silu", "relu2", "gelu_pytorch_tanh"]),
)
def test_a_token_is_that_of_the_general_kernels(form, d, f, n, gated, bias, threads, act) -> None:
    bits, group = form
    own, x, groups, weight = token(ExpertLayout(d, f, bits=bits, group=group, gated=gated, bias=bias), n, act)
    assert own.runs_tokens
    rows = rows_of_many(own, x, groups)
    total = torch.zeros(1, d)
    add_rows(total, torch.zeros(n, dtype=torch.long), rows, weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, out = own.token(x, groups[::-1], weight), torch.empty(n, d)
        half = n // 2  # those that are there, then those that had to be read
        for some in (groups[:half], groups[half:]):
            own.run(x, torch.zeros(n, dtype=torch.long), some, out)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, total.bfloat16())
    assert torch.equal(out, rows)


def test_a_token_with_two_rows_of_an_expert_goes_the_general_way() -> None:
    own, x, groups, _ = token(ExpertLayout(128, 128, bits=8), 1)
    out = torch.full((2, 128), torch.nan)
    own.run(x, torch.zeros(2, dtype=torch.long), [(groups[0][0], 0, 2)], out)
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[:1], rows_of_many(own, x, groups))


def test_activations_of_a_familys_own_go_the_general_way() -> None:
    layout = ExpertLayout(128, 128, bits=8)
    own = StoredExperts(layout, activation(layout, "silu"), None, "int8")
    assert not own.runs_tokens
    wide = ExpertLayout(128, stored_one.WIDEST + 128, bits=8)
    assert not StoredExperts(wide, activation(wide, "silu"), "silu", "int8").runs_tokens


def test_what_is_wrong_is_refused() -> None:
    own, x, groups, weight = token(ExpertLayout(128, 128, bits=8), 2)
    for bad in (
        (x.double(), groups, weight),
        (x[:, :64], groups, weight),
        (torch.cat([x, x]), groups, weight),
        (x, groups, weight.double()),
        (x, [(groups[0][0], 1, 3)], weight),
        (x, [(groups[0][0][:-1], 0, 1)], weight),
    ):
        with pytest.raises(ConfigError):
            own.token(*bad)


@settings(max_examples=30, deadline=None)
@given(p=st.integers(16, 700), q=st.sampled_from([128, 512, 640, 2048]), bias=st.booleans())
def test_a_linear_map_is_that_of_the_general_kernels(p: int, q: int, bias: bool) -> None:
    assert takes_one((p, q))
    torch.manual_seed(p)
    codes, scale = quantise(torch.randn(p, q), 8)
    x, added = torch.randn(1, 1, q).bfloat16(), torch.randn(p).bfloat16() if bias else None
    right = stored_linear(x[0].float(), codes, scale, 8, activations="int8")
    right = right if added is None else right + added
    found = linear_one(x, codes, scale, added)
    assert found.shape == (1, 1, p)
    assert torch.equal(found[0], right.bfloat16())


def test_which_matrices_it_takes() -> None:
    assert not takes_one((8, 128))
    assert not takes_one((128, 96))
    assert not takes_one((128, stored_one.WIDEST + 128))
