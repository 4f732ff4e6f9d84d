"""What the CPU back end keeps for the backward pass, and where gradients live."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from collegium.experts.compute import compute, cpu_memory, cpu_pool, release_gradient_memory
from collegium.experts.modules import Experts
from collegium.routing.record import Routing

T, E, K, D, F = 20, 4, 2, 32, 24


def _experts() -> Experts:
    torch.manual_seed(0)
    experts = Experts(D, F, E)
    experts.reset_parameters(std=0.3)
    experts.compute = "cpu"
    return experts


def _routing(hit: int = E) -> Routing:
    """Every token to the first K of `hit` experts, shifted from token to token."""
    index = (torch.arange(T)[:, None] + torch.arange(K)) % hit
    return Routing.from_topk(index, torch.rand(T, K), E)


def test_only_the_input_and_the_preactivations_are_kept() -> None:
    experts, x = _experts(), torch.randn(T, D, requires_grad=True)
    routing = _routing()
    own = {t.data_ptr() for t in (x, routing.weight, *experts.parameters())}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Any:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        experts(x, routing)
    extra = {t.data_ptr(): t.numel() * t.element_size() for t in kept if t.data_ptr() not in own}
    assert sum(extra.values()) == T * K * 2 * F * 4  # the pre-activations of every assignment, once


def test_a_freed_gradient_is_used_again_and_given_back_on_request() -> None:
    gc.collect()  # what other tests have left must not end in the middle of this one
    release_gradient_memory()
    experts, x = _experts(), torch.randn(T, D)
    places = []
    for _ in range(2):
        experts(x, _routing()).sum().backward()
        assert experts.down_proj.grad is not None
        places.append(experts.down_proj.grad.data_ptr())
        experts.zero_grad(set_to_none=True)
        gc.collect()
    assert places[0] == places[1]
    assert sum(len(blocks) for blocks in cpu_memory._idle.values()) == 2
    release_gradient_memory()
    assert not cpu_memory._idle


def test_a_gradient_that_is_still_held_is_never_used_again() -> None:
    release_gradient_memory()
    experts, x = _experts(), torch.randn(T, D)
    experts(x, _routing()).sum().backward()
    assert experts.down_proj.grad is not None
    view = experts.down_proj.grad[0, 1:]
    before = view.clone()
    experts.zero_grad(set_to_none=True)
    gc.collect()
    experts(3 * x, _routing()).sum().backward()
    assert torch.equal(view, before)


@pytest.mark.parametrize("hit", [2, 3], ids=["some", "most"])
def test_memory_that_is_used_again_has_no_old_gradients_in_it(hit: int) -> None:
    experts, x = _experts(), torch.randn(T, D)
    experts(x, _routing()).sum().backward()
    experts.zero_grad(set_to_none=True)
    gc.collect()
    experts(x, _routing(hit)).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert parameter.grad[:hit].any()
        assert not parameter.grad[hit:].any()


def test_memory_of_other_models_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    release_gradient_memory()
    monkeypatch.setattr(cpu_memory, "_MAX_AGE", 2)
    cpu_memory.gradient_like(torch.empty(2, 3, 5), [0, 1])
    gc.collect()
    assert len(cpu_memory._idle[30 * 4]) == 1
    for _ in range(3):
        cpu_memory.gradient_like(torch.empty(2, 7, 5), [0, 1])
    assert not cpu_memory._idle[30 * 4]


def test_accumulated_gradients_add_up() -> None:
    experts, x = _experts(), torch.randn(T, D)
    routing = _routing()
    experts(x, routing).sum().backward()
    assert experts.gate_up_proj.grad is not None
    once = experts.gate_up_proj.grad.clone()
    experts(x, routing).sum().backward()
    torch.testing.assert_close(experts.gate_up_proj.grad, 2 * once)


@pytest.mark.parametrize("act", ["silu", "mish"], ids=["fused", "by torch"])
def test_a_second_derivative_is_refused(act: str) -> None:
    experts, x = Experts(D, F, E, hidden_act=act), torch.randn(T, D, requires_grad=True)
    experts.compute = "cpu"
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(experts(x, _routing()).sum(), x, create_graph=True)


def test_plain_threads_do_where_torch_has_no_openmp_of_this_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, x, routing = _experts(), torch.randn(T, D), _routing()
    expected = compute(x, routing, experts.weights, "cpu")
    monkeypatch.setattr(cpu_pool, "_openmp", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(compute(x, routing, experts.weights, "cpu"), expected)
