"""Experts computed from stored records: against the oracle in float32, and bit for bit where nothing may change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_records import activation, record
from torch import Tensor
from torch.nn import functional as F

from collegium.errors import ConfigError
from collegium.experts.activations import KNOWN
from collegium.experts.compute import stored, stored_int8
from collegium.experts.compute.stored import StoredExperts, stored_linear
from collegium.experts.stored import ExpertLayout, dequantise, quantise

FORMS = [(32, 0), (16, 0), (8, 0), (4, 32), (4, 64)]
needs_vnni = pytest.mark.skipif(stored_int8.why_not() is not None, reason=str(stored_int8.why_not()))


def experts(layout: ExpertLayout, act: str = "silu", activations: str = "float32") -> StoredExperts:
    fused = None if layout.interleaved else act
    return StoredExperts(layout, activation(layout, act), fused, activations)  # type: ignore[arg-type]


def batch(
    layout: ExpertLayout, sizes: list[int], seed: int = 0
) -> tuple[Tensor, Tensor, list[tuple[Tensor, int, int]]]:
    generator = torch.Generator().manual_seed(seed)
    n, groups, first = sum(sizes), [], 0
    for e, size in enumerate(sizes):
        groups.append((record(layout, seed + e), first, first + size))
        first += size
    x = torch.randn(max(n // 2, 1), layout.d, generator=generator)
    return x, torch.randint(0, len(x), (n,), generator=generator), groups


def error(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("bits", "group"), FORMS)
@pytest.mark.parametrize("act", KNOWN)
def test_every_form_and_activation_is_the_oracle(bits: int, group: int, act: str) -> None:
    layout = ExpertLayout(192, 64, bits=bits, group=group, gated=act != "relu2", bias=act == "gelu")
    own = experts(layout, act)
    x, token, groups = batch(layout, [1, 2, 0, 3, 4, 5, 8, 17])
    out, right = torch.full((2, len(token), layout.d), torch.nan)
    own.run(x, token, groups, out)
    own.reference(x, token, groups, right)
    assert own.products == "float32"
    assert error(out, right) < 2e-6


@settings(max_examples=30, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    d=st.sampled_from([64, 128, 1088]),
    f=st.sampled_from([64, 192]),
    gated=st.booleans(),
    interleaved=st.booleans(),
    bias=st.booleans(),
    sizes=st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 9, 65, 150]), min_size=1, max_size=5),
    act=st.sampled_from(["silu", "gelu"]),
)
def test_any_layout_is_the_oracle(form, d, f, gated, interleaved, bias, sizes, act) -> None:
    layout = ExpertLayout(d, f, gated, gated and interleaved, bias, *form)
    own = experts(layout, act)
    x, token, groups = batch(layout, sizes)
    out, right = torch.full((2, len(token), d), torch.nan)
    own.run(x, token, groups, out)
    own.reference(x, token, groups, right)
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-4)


@needs_vnni
@pytest.mark.parametrize(("bits", "group"), [form for form in FORMS if form[0] <= 8])
@pytest.mark.parametrize("d", [128, 512, 1152])
def test_rounded_rows_are_within_their_tolerance(bits: int, group: int, d: int) -> None:
    layout = ExpertLayout(d, 640, bits=bits, group=group, bias=True)
    own = experts(layout, activations="int8")
    x, token, groups = batch(layout, [1, 2, 0, 5, 66])
    out, right = torch.full((2, len(token), d), torch.nan)
    own.run(x, token, groups, out)
    own.reference(x, token, groups, right)
    assert own.products == "int8"
    assert 1e-4 < error(out, right) < 0.015


@needs_vnni
@pytest.mark.parametrize(("bits", "group"), [form for form in FORMS if form[0] <= 8])
def test_rows_that_eight_bits_hold_are_exact(bits: int, group: int) -> None:
    """Rows of whole numbers up to 127, with 127 in every lane, lose nothing: so it is the products that are tested."""
    codes, scale = quantise(torch.randn(48, 640), bits, group)
    x = torch.randint(-127, 128, (7, 640)).float()
    x[:, ::4] = -127
    x[:, 1::4] = 127
    right = x.double() @ dequantise(codes, scale, bits, group).double().T
    assert error(stored_linear(x, codes, scale, bits, group, "int8").double(), right) < 1e-6


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_nothing_but_its_own_rows_changes_a_result(bits: int, group: int, activations: str, threads: None) -> None:
    layout = ExpertLayout(256, 128, bits=bits, group=group)
    for act in ("silu", "gelu"):
        own = experts(layout, act, activations)
        x, token, groups = batch(layout, [1, 4, 7, 300, 1, 520])
        out, alone, other = torch.full((3, len(token), layout.d), torch.nan)
        own.run(x, token, groups, out)
        for one in groups:
            experts(layout, act, activations).run(x, token, [one], alone)
        torch.set_num_threads(1 if torch.get_num_threads() > 1 else 3)
        own.run(x, token, groups[::-1], other)
        assert torch.equal(out, alone)
        assert torch.equal(out, other)


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_values_that_are_not_finite_stay_in_their_row(activations: str) -> None:
    layout = ExpertLayout(128, 128, bits=8)
    own = experts(layout, activations=activations)
    x, token, groups = batch(layout, [6])
    x[0, 3], x[1, 5], x[2] = torch.nan, torch.inf, 0.0
    token[:] = torch.tensor([0, 1, 2, 2, 1, 0])
    out = torch.empty(6, 128)
    own.run(x, token, groups, out)
    assert out[[0, 1, 4, 5]].isnan().any(1).all()
    assert (out[2:4] == 0).all()


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_tiny_and_large_numbers(activations: str) -> None:
    codes, scale = quantise(torch.randn(16, 128), 8)
    right = torch.ones(1, 128) @ dequantise(codes, scale, 8).T
    for size in (1e-44, 1e-38, 1e-30, 1e30):
        found = stored_linear(torch.full((1, 128), size), codes, scale, 8, 0, activations)
        assert found.isfinite().all()
        if size > 1e-37:
            torch.testing.assert_close(found / size, right, rtol=1e-4, atol=1e-4)


def test_the_activations_are_right_far_from_zero() -> None:
    layout = ExpertLayout(16, 16, gated=False, bits=32)
    made = torch.empty(layout.nbytes, dtype=torch.uint8)
    layout.write(made, torch.eye(16), torch.eye(16))
    x = torch.linspace(-200, 200, 16 * 50).reshape(50, 16)
    for act in KNOWN:
        out = torch.empty(50, 16)
        experts(layout, act).run(x, torch.arange(50), [(made, 0, 50)], out)
        torch.testing.assert_close(out, KNOWN[act].value(x), rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    p=st.integers(1, 90),
    q=st.sampled_from([64, 192, 640, 1024, 2112]),
    n=st.sampled_from([0, 1, 3, 4, 7, 70]),
    activations=st.sampled_from(["float32", "int8"]),
)
def test_linear_is_the_oracle(form, p, q, n, activations) -> None:
    bits, group = form
    w, scale = torch.randn(p, q), None
    codes = w if bits == 32 else w.bfloat16()
    if bits <= 8:
        codes, scale = quantise(w, bits, group)
    x = torch.randn(n, q)
    right = F.linear(x, codes.float() if scale is None else dequantise(codes, scale, bits, group))
    found = stored_linear(x, codes, scale, bits, group, activations)
    assert (found - right).norm() <= (0.02 if activations == "int8" and bits <= 8 else 2e-6) * right.norm()


def test_odd_widths_and_machines_without_numba_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = experts(ExpertLayout(24, 9, bits=8))
    assert odd.products == "reference"
    x, token, groups = batch(odd.layout, [2, 3])
    out, right = torch.empty(2, 5, 24)
    odd.run(x, token, groups, out)
    odd.reference(x, token, groups, right)
    assert torch.equal(out, right)
    monkeypatch.setattr(stored, "missing", ImportError("no Numba"))
    stored._why_not.cache_clear()
    stored._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match="no Numba"):
        assert experts(ExpertLayout(64, 64, bits=8)).products == "reference"
    stored._why_not.cache_clear()


def test_what_is_wrong_is_refused() -> None:
    layout = ExpertLayout(64, 64, bits=8)
    own = experts(layout)
    x, token, groups = batch(layout, [2, 3])
    out, made = torch.empty(5, 64), groups[0][0]
    for bad in (
        (x.double(), token, groups, out),
        (x[:, :32], token, groups, out),
        (x, token.int(), groups, out),
        (x, token, groups, out[:4]),
        (x, token, groups, out.T.contiguous().T),
        (x, token, [(made, 3, 6)], out),
        (x, token, [(made, -1, 2)], out),
        (x, token, [(made[:-1], 0, 2)], out),
        (x, token, [(made.view(torch.int8), 0, 2)], out),
    ):
        with pytest.raises(ConfigError):
            own.run(*bad)
    with pytest.raises(ConfigError, match="int4"):
        StoredExperts(layout, F.silu, None, "int4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"\[n, 64\]"):
        stored_linear(x[:, :32], *quantise(torch.randn(16, 64), 8), 8)
