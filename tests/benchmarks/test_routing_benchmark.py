"""The benchmark of routing: what it times, on layers that show which systems there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from collegium.benchmarks import routing
from collegium.catalog import methods
from collegium.layer import MoE
from collegium.routing import Router

SYSTEMS = [system.name for system in methods("system")]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers of experts, of a width that takes no time."""
    monkeypatch.setattr(routing, "WIDTH", 32)
    monkeypatch.setattr(routing, "PLAIN", {**routing.PLAIN, "moe_intermediate_size": 16})
    monkeypatch.setattr(routing, "LENGTH", 8)
    monkeypatch.setattr(routing, "HEADS", (2, 8))


@pytest.fixture
def weights() -> routing._Weights:
    torch.manual_seed(0)
    return routing._Weights(torch.float32)


def layer_of(weights: routing._Weights, system: str) -> MoE:
    settings, _ = routing.SETTINGS.get(system, ({}, ""))
    return weights.layer({**routing.PLAIN, "router": {system: settings}})


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_runs_on_the_same_memory(weights: routing._Weights, system: str) -> None:
    layer = layer_of(weights, system)
    assert layer.experts.gate_up_proj.data_ptr() == weights._up.data_ptr()
    assert layer.experts.down_proj.data_ptr() == weights._down.data_ptr()
    used = layer.experts.gate_up_proj.numel() / weights._up.numel()
    assert used == {"deepseek_moe": 255 / 256}.get(system, 1)
    rows = list(routing._overhead(system, layer, 1e9, 2, None, lambda line: None))
    assert [row.name for row in rows] == [f"{system}, inference", f"{system}, training"]
    for row in rows:
        assert 0 < row.ours < 1
        assert row.unit == "share"
        assert row.met is None


def test_numbers_and_widths_follow_the_system(weights: routing._Weights) -> None:
    sizes = {
        name: (layer.experts.num_experts, layer.experts.intermediate_size, layer.gate.top_k)
        for name, layer in ((name, layer_of(weights, name)) for name in ("switch", "deepseek_moe", "adamoe", "moge"))
    }
    assert sizes == {"switch": (8, 128, 1), "deepseek_moe": (255, 4, 31), "adamoe": (64, 16, 16), "moge": (64, 16, 8)}


class _Slow:
    """The clock moves only while experts compute, or while something else does."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_experts_are_timed_without_sorting(weights: routing._Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, clock = layer_of(weights, "deepseek_moe"), _Slow()
    monkeypatch.setattr(routing, "time", clock)

    def takes(seconds: float, call: Any) -> Any:
        def slow(*args: Any) -> Any:
            clock.now += seconds
            return call(*args)

        return slow

    dispatch = routing.Routing.dispatch
    seen: set[int] = set()

    def sort(self: Any) -> Any:
        clock.now += 0.0 if id(self) in seen else 1.0
        seen.add(id(self))
        return dispatch(self)

    monkeypatch.setattr(routing.Routing, "dispatch", sort)
    monkeypatch.setattr(layer.gate, "forward", takes(2.0, layer.gate.forward))
    monkeypatch.setattr(layer.experts, "forward", takes(5.0, layer.experts.forward))
    monkeypatch.setattr(layer.shared_experts, "forward", takes(12.0, layer.shared_experts.forward))
    keep: list[Any] = []  # so that no routing gets the id of an earlier one
    monkeypatch.setattr(layer, "_check", keep.append)
    rows = list(routing._overhead("x", layer, 1e9, 2, 0.1, lambda line: None))
    assert [row.ours for row in rows] == pytest.approx([3 / 20, 3 / 20])
    assert [row.met for row in rows] == [False, False]
    flops = 2 * 64 * 255 * 32
    assert [row.share for row in rows] == pytest.approx([flops / 1e9 / 3] * 2)


def test_training_records_what_backward_needs(weights: routing._Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(weights, "loss_free")
    seen: list[tuple[bool, bool, bool]] = []

    def look(module: Any, inputs: Any, output: Tensor) -> None:
        seen.append((module.training, output.requires_grad, output.is_inference()))

    layer.register_forward_hook(look)
    list(routing._overhead("x", layer, 1e9, 1, None, lambda line: None))
    assert seen == [(False, False, True)] * 2 + [(True, True, False)] * 2
    assert layer.balance is not None
    assert layer.balance.stats.sync().sum() == 2 * 64 * 8


@pytest.mark.parametrize("name", list(routing.ROUTERS))
def test_peers_choose_and_weigh_as_ours(weights: routing._Weights, name: str) -> None:
    gate = weights.layer({**routing.PLAIN, "router": routing.ROUTERS[name]}).gate
    peer = routing._peer(name, gate)
    x = torch.randn(50, 32)
    found, (_, weight, index) = gate(x), peer(x)
    order, theirs = found.index_TK.argsort(1), index.argsort(1)  # some leave the K unsorted
    assert torch.equal(found.index_TK.gather(1, order), index.gather(1, theirs))
    torch.testing.assert_close(found.weight_TK.gather(1, order), weight.gather(1, theirs))
    row = routing._alone(name, gate, peer, 1e9)
    assert (row.peer is not None, row.peer_name) == (True, type(peer).__name__)


@pytest.fixture
def rows_only(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No layer runs; the names that were asked for."""
    asked: list[str] = []
    monkeypatch.setattr(routing, "gemm_rate", lambda dtype: 1e9)

    def overhead(name: str, layer: MoE, rate: float, repeats: int, most: float | None, say: Any) -> list[Any]:
        asked.append(f"{name} {most}")
        return []

    monkeypatch.setattr(routing, "_overhead", overhead)
    monkeypatch.setattr(routing, "_alone", lambda name, gate, peer, rate: asked.append(name))
    return asked


def test_what_is_measured(rows_only: list[str]) -> None:
    list(routing.run(True, lambda line: None))
    short = ["softmax top-k, float32 0.1", "softmax top-k router alone, float32"]
    short += ["sigmoid, bias, groups, float32 0.1", "sigmoid, bias, groups router alone, float32"]
    assert rows_only == short
    rows_only.clear()
    list(routing.run(False, lambda line: None))
    every = [f"{name} (a step with its plan) None" if name == "ssr" else f"{name} None" for name in SYSTEMS]
    assert rows_only == short + every + [name.replace("float32", "bfloat16") for name in short]


def test_the_routers_are_those_they_are_named_after() -> None:
    routers = [
        routing._Weights(torch.float32).layer({**routing.PLAIN, "router": r}).gate for r in routing.ROUTERS.values()
    ]
    assert all(isinstance(gate, Router) for gate in routers)
    assert [[type(part).__name__ for part in gate.parts] for gate in routers] == [
        ["Softmax", "TopK", "Renormalised"],
        ["Sigmoid", "SelectionBias", "GroupLimit", "TopK", "Renormalised"],
    ]
    assert routers[1].routed_scaling_factor == 2.5
