"""Every compute back end against the oracle: outputs and all gradients, over layouts, dtypes and odd routings."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from collegium.catalog import methods
from collegium.errors import ConfigError
from collegium.experts.activations import KNOWN
from collegium.experts.compute import backends, choose, compute, jit
from collegium.experts.weights import ExpertWeights
from collegium.routing import Routing

BACKENDS = [m.name for m in methods("compute")]
FAST = [name for name in BACKENDS if name != "reference"]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
"""Largest difference relative to the largest value. bfloat16 keeps 8 bits, and sums round more than once."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "gated": {},
    "transposed": {"transposed": True},
    "bias": {"bias": True},
    "plain": {"gated": False},
    "plain transposed bias": {"gated": False, "transposed": True, "bias": True},
    "interleaved clamped bias": {"transposed": True, "bias": True, "interleaved": True},
    "norm": {"norm": True},
    "relu2": {"gated": False, "act": "relu2"},
    "gelu": {"act": "gelu"},
    "tanh gelu": {"act": "gelu_pytorch_tanh"},
    "relu": {"act": "relu"},
    "unknown activation": {"act": None},
}


def make_weights(
    d: int,
    f: int,
    E: int,
    dtype: torch.dtype = torch.float32,
    *,
    gated: bool = True,
    transposed: bool = False,
    bias: bool = False,
    interleaved: bool = False,
    norm: bool = False,
    act: str | None = "silu",
    seed: int = 0,
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    u = 2 * f if gated else f

    def draw(*shape: int) -> Tensor:
        return torch.nn.Parameter((torch.randn(shape, generator=generator) / max(shape[-1], 1) ** 0.5).to(dtype))

    up, down = ((E, d, u), (E, f, d)) if transposed else ((E, u, d), (E, d, f))
    value: Callable[[Tensor], Tensor] = torch.tanh if act is None else KNOWN[act].value

    def activation(h: Tensor) -> Tensor:
        if interleaved:  # as gpt-oss has it
            gate, linear = h[..., ::2].clamp(max=1.5), h[..., 1::2].clamp(-1.5, 1.5)
            return (linear + 1) * gate * torch.sigmoid(1.7 * gate)
        if not gated:
            return value(h)
        gate, linear = h.chunk(2, -1)
        return value(gate) * linear

    return ExpertWeights(
        draw(*up),
        draw(*down),
        activation,
        draw(E, u) if bias else None,
        draw(E, d) if bias else None,
        transposed=transposed,
        gated=gated,
        interleaved=interleaved,
        fused_activation=None if interleaved else act,
        post_norm=(lambda rows: torch.nn.functional.rms_norm(rows, rows.shape[-1:])) if norm else None,
    )


def make_routing(T: int, E: int, K: int, seed: int = 0, ragged: bool = False, dropped: bool = False) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    weight, index = torch.rand(T, E, generator=generator).topk(K, dim=1)
    if ragged:
        index = index.masked_fill(torch.rand(T, K, generator=generator) < 0.4, E)
    routing = Routing.from_topk(index, weight, E)
    leaf = routing.weight.detach().clone().requires_grad_()
    kept = torch.rand(leaf.shape, generator=generator) < 0.7 if dropped else None
    return Routing(routing.expert, leaf, T, E, slots=routing.slots, ragged_token=routing.ragged_token, kept=kept)


def outcome(backend: str, x: Tensor, routing: Routing, weights: ExpertWeights) -> dict[str, Tensor | None]:
    """The output and every gradient to a fixed random projection of it."""
    x = x.detach().clone().requires_grad_()
    leaves = {"x": x, "weight": routing.weight, "up": weights.up, "down": weights.down}
    if weights.up_bias is not None and weights.down_bias is not None:
        leaves |= {"up_bias": weights.up_bias, "down_bias": weights.down_bias}
    y = compute(x, routing, weights, backend)
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    grads = torch.autograd.grad((y * target).sum(), list(leaves.values()), allow_unused=True)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float) -> None:
    for name, want in expected.items():
        have = found[name]
        want = torch.zeros(()) if want is None else want
        have = torch.zeros_like(want) if have is None else have
        assert have.dtype == want.dtype or want.dim() == 0, name
        # sums of terms of size 1 may cancel to next to nothing, their rounding does not
        least = 1e-3 if tolerance < 1e-3 else 0.1
        scale = max(float(want.abs().max()) if want.numel() else 0.0, least)
        worst = float((have.float() - want.float()).abs().max()) if want.numel() else 0.0
        assert worst <= tolerance * scale, f"{name}: differs by {worst} of {scale}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", FAST)
def test_layouts(backend: str, layout: str, dtype: torch.dtype) -> None:
    weights, routing = make_weights(32, 24, 5, dtype, **LAYOUTS[layout]), make_routing(23, 5, 2)
    x = torch.randn(23, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert_same(outcome(backend, x, routing, weights), outcome("reference", x, routing, weights), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", FAST)
@settings(deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    T=st.integers(0, 70),
    E=st.integers(1, 9),
    K=st.integers(1, 4),
    d=st.sampled_from([4, 16, 20, 33, 64]),
    f=st.sampled_from([4, 16, 24, 31]),
    layout=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from(list(TOLERANCE)),
    ragged=st.booleans(),
    dropped=st.booleans(),
    seed=st.integers(0, 3),
)
def test_any_shape_and_routing(
    backend: str,
    T: int,
    E: int,
    K: int,
    d: int,
    f: int,
    layout: str,
    dtype: Any,
    ragged: bool,
    dropped: bool,
    seed: int,
) -> None:
    # rounding to bfloat16 moves values across a kink, where the gradient jumps
    assume(dtype == torch.float32 or layout not in ("interleaved clamped bias", "relu"))
    weights = make_weights(d, f, E, dtype, seed=seed, **LAYOUTS[layout])
    routing = make_routing(T, E, min(K, E), seed, ragged, dropped)
    x = torch.randn(T, d, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert_same(outcome(backend, x, routing, weights), outcome("reference", x, routing, weights), TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 12, 13, 32, 33, 40, 41, 64, 65, 128, 129, 600])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_group_sizes_on_both_sides_of_every_kernel_limit(backend: str, dtype: torch.dtype, rows: int) -> None:
    """All tokens on expert 1, one on expert 3, none on the others; widths with tails for every vector length."""
    weights = make_weights(70, 52, 5, dtype)
    expert = torch.tensor([1] * rows + [3])
    weight = torch.rand(rows + 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    routing = Routing(expert, weight, rows + 1, 5, slots=1)
    x = torch.randn(rows + 1, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = outcome(backend, x, routing, weights)
    assert_same(found, outcome("reference", x, routing, weights), TOLERANCE[dtype])
    for grad in (found["up"], found["down"]):
        assert grad is not None
        assert not grad[[0, 2, 4]].any(), "an expert without tokens must have a zero gradient"


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_without_experts_get_zeros(backend: str) -> None:
    weights = make_weights(16, 16, 3)
    routing = Routing.from_topk(torch.full((6, 2), 3), torch.ones(6, 2), 3)
    y = compute(torch.randn(6, 16), routing, weights, backend)
    assert y.shape == (6, 16)
    assert not y.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_beyond_the_experts_compute_nothing(backend: str) -> None:
    """Null experts have ids from the number of true experts on."""
    weights = make_weights(16, 16, 3)
    both = Routing.from_topk(torch.tensor([[0, 4], [2, 3]]), torch.tensor([[0.5, 9.0], [0.25, 9.0]]), 5)
    true = Routing.from_topk(torch.tensor([[0], [2]]), torch.tensor([[0.5], [0.25]]), 5)
    x = torch.randn(2, 16)
    torch.testing.assert_close(compute(x, both, weights, backend), compute(x, true, weights, backend))


@pytest.mark.parametrize("wanted", ["x", "weight", "up", "down"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients_are_made(backend: str, wanted: str) -> None:
    weights, routing = make_weights(16, 16, 3), make_routing(7, 3, 2)
    x = torch.randn(7, 16)
    leaves = {"x": x, "weight": routing.weight, "up": weights.up, "down": weights.down}
    expected = outcome("reference", x, routing, weights)[wanted]
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    y = compute(x, routing, weights, backend)
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    (y * target).sum().backward()
    torch.testing.assert_close(leaves[wanted].grad, expected, rtol=1e-4, atol=1e-5)
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_gradient_is_taken(backend: str) -> None:
    weights, routing = make_weights(16, 16, 3), make_routing(7, 3, 2)
    x = torch.randn(7, 16, requires_grad=True)
    compute(x, routing, weights, backend).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_the_dtype_of_the_weights(backend: str) -> None:
    weights, routing, x = make_weights(16, 16, 3), make_routing(7, 3, 2), torch.randn(7, 16)
    plain = compute(x, routing, weights, backend)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compute(x, routing, weights, backend), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_input_stays_with_its_token(backend: str) -> None:
    weights, routing = make_weights(32, 16, 3), make_routing(7, 3, 2)
    x = torch.randn(7, 32)
    clean = compute(x, routing, weights, backend)
    x[4] = torch.nan
    dirty = compute(x, routing, weights, backend)
    assert dirty[4].isnan().all()
    keep = torch.arange(7) != 4
    torch.testing.assert_close(dirty[keep], clean[keep])


def test_unknown_back_ends_and_shapes_are_refused() -> None:
    weights, routing = make_weights(16, 16, 3), make_routing(7, 3, 2)
    with pytest.raises(ConfigError, match="reference"):
        compute(torch.randn(7, 16), routing, weights, "nonsense")
    with pytest.raises(ConfigError, match="16"):
        compute(torch.randn(7, 17), routing, weights)
    with pytest.raises(ConfigError, match="float64"):
        compute(torch.randn(7, 16).double(), routing, weights, "cpu")
    assert set(backends()) == {"reference", "grouped", "cpu"}


def test_auto_takes_our_kernels_on_a_cpu_and_falls_back_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, routing, x = make_weights(16, 16, 3), make_routing(7, 3, 2), torch.randn(7, 16)
    assert choose(x, weights) == "cpu"
    assert choose(x.double(), make_weights(16, 16, 3, torch.float64)) == "reference"
    expected = compute(x, routing, weights)
    from collegium.experts.compute import cpu

    reason = ImportError("none here")
    monkeypatch.setattr(jit, "missing", reason)
    monkeypatch.setattr(cpu, "missing", reason)
    with pytest.warns(RuntimeWarning, match="none here"):
        assert choose(x, weights) == "grouped"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        torch.testing.assert_close(compute(x, routing, weights), expected, rtol=1e-4, atol=1e-5)


def test_one_and_two_threads_agree() -> None:
    weights, routing, x = make_weights(64, 48, 6), make_routing(50, 6, 2), torch.randn(50, 64)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(outcome("cpu", x, routing, weights))
    finally:
        torch.set_num_threads(before)
    assert_same(found[1], found[0], 1e-6)


def test_same_bits_every_time() -> None:
    weights, routing, x = make_weights(64, 48, 6), make_routing(50, 6, 2), torch.randn(50, 64)
    first, second = (outcome("cpu", x, routing, weights) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first if first[name] is not None)


def test_kernels_are_compiled_once_for_all_processes(tmp_path) -> None:
    """The second process finds the machine code of the first, also outside the package folder."""
    program = (
        "import torch\nfrom collegium.experts.compute import cpu_kernels\n"
        "cpu_kernels.address('combine')\nfrom numba.core import event\n"
        "seen = []\n"
        "with event.install_recorder('numba:compile') as found:\n    cpu_kernels.address('rows_dot_float32')\n"
        "print(len(found.buffer))"
    )
    environment = {"NUMBA_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    compiled = [
        int(
            subprocess.run(
                [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
            ).stdout
        )
        for _ in range(2)
    ]
    assert compiled[0] > 0
    assert compiled[1] == 0
    assert any(tmp_path.rglob("*.nbi"))
