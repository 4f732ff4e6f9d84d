"""What routing costs: the share of a layer's forward pass that is not the computation of its experts.

A layer of OLMoE-1B-7B's shape (width 2048, 64 experts of width 1024, 8 for a token) and 4096 tokens, in 8 sequences; at
inference, and in training mode with autograd recording (forward only). The experts of the layer, and shared ones, are
timed inside the layer's own forward pass, from the moment the sorted assignments are there: the difference of two calls
that take seconds would drown in what the machine does beside. Everything else counts as routing: scores, selection,
weights, capacity, sorting by expert, checks, counts, and zero-computation experts.

* Plain softmax top-k, and sigmoid scores with a selection bias in groups (DeepSeek-V3), in float32 and bfloat16; the
  goal is at most 10 %. Beside them their routers alone against transformers' of the same kind.
* Every system of the catalogue in place of the plain layer. Some have fewer and wider or more and finer experts, or
  other numbers of them for a token, so that shares do not tell who routes fastest: seconds do, which stand beside.

The limit is the product of tokens and router weights at this machine's float32 rate.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DeepseekV3Config, OlmoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

from collegium.benchmarks.harness import Row, Say, gemm_rate, medians
from collegium.catalog import methods
from collegium.experts.modules import Experts
from collegium.layer import MoE
from collegium.models import MoEConfig
from collegium.routing import Router, Routing, RoutingContext

__all__ = ["PLAIN", "ROUTERS", "run"]

PLAIN = {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 1024}
WIDTH, SEQUENCES, LENGTH, DOCUMENT = 2048, 8, 512, 300
"""Width of the model, sequences and their tokens, tokens of a document."""
HEADS = (16, 128)
"""Of the attention by which some routers average, and the width of each."""
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax top-k": {"weigh": {"normalise": True}},
    "sigmoid, bias, groups": {
        "score": "sigmoid",
        "transforms": ["bias", {"group_limit": {"groups": 8, "keep": 4}}],
        "select": {"top_k": 8},
        "weigh": {"normalise": True, "scale": 2.5},
    },
}
MOST = 0.10
SETTINGS = {"ssr": ({"probability": 1.0}, "a step with its plan")}
"""System -> settings other than its own, and what they mean."""
REPEATS, FEW = 5, 3
"""Turns of the two kinds, and of whatever has no goal or is to be quick."""
ALONE = 25
"""Turns of a router alone."""


def run(quick: bool, say: Say) -> Iterator[Row]:
    """The two kinds of routers with their peers, then all systems."""
    say("bench routing: rate of this machine")
    rate, repeats = gemm_rate(torch.float32), FEW if quick else REPEATS
    for dtype in [torch.float32] if quick else [torch.float32, torch.bfloat16]:
        weights = _Weights(dtype)
        short = str(dtype).removeprefix("torch.")
        for name, router in ROUTERS.items():
            layer = weights.layer({**PLAIN, "router": router})
            yield from _overhead(f"{name}, {short}", layer, rate, repeats, MOST, say)
            say(f"bench routing: {name}, {short}, the router alone")
            yield _alone(f"{name} router alone, {short}", layer.gate, _peer(name, layer.gate), rate)
        if not quick and dtype == torch.float32:
            for system in methods("system"):
                settings, word = SETTINGS.get(system.name, ({}, ""))
                layer = weights.layer({**PLAIN, "router": {system.name: settings}})
                name = f"{system.name} ({word})" if word else system.name
                yield from _overhead(name, layer, rate, FEW, None, say)


# ---- layers ----------------------------------------------------------------------------------------------------------


class _Weights:
    """The memory of one set of experts, seen as however many and however wide."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        every = PLAIN["num_experts"] * PLAIN["moe_intermediate_size"] * WIDTH
        self._up, self._down = (torch.empty(n * every, dtype=dtype).normal_(std=0.02) for n in (2, 1))

    def layer(self, moe: Mapping[str, Any]) -> MoE:
        """The layer that the fields of a `MoEConfig` describe."""
        config = MoEConfig(**moe)
        layer = MoE(
            WIDTH,
            1,  # its own experts are replaced
            config.num_experts,
            config.slots,
            shared=config.shared_width,
            shared_gate=config.shared_expert_gate,
            zero_experts=config.zero_experts,
            router=config.build_gates(WIDTH),
            balance=config.balance,
            iterations=config.iterations,
            inner_residual=config.inner_residual,
        )
        layer.reset_parameters()
        layer.experts = self._experts(config.num_experts, config.moe_intermediate_size)
        return layer.to(self.dtype)

    def _experts(self, E: int, f: int) -> Experts:
        with torch.device("meta"):
            experts = Experts(WIDTH, f, E)
        experts.gate_up_proj = nn.Parameter(self._up[: E * 2 * f * WIDTH].view(E, 2 * f, WIDTH))
        experts.down_proj = nn.Parameter(self._down[: E * f * WIDTH].view(E, WIDTH, f))
        return experts


def _context(layer: MoE) -> RoutingContext:
    """All that a router may look at."""
    at = torch.arange(SEQUENCES * LENGTH)
    logits = torch.randn(len(at), layer.gate.num_experts)
    first = logits.argmax(-1, keepdim=True)
    return RoutingContext(
        document=at // DOCUMENT,
        position=at % LENGTH,
        mix=_Mix(),
        previous=Routing.from_topk(first, torch.ones_like(first).float(), logits.shape[1], full=True, logits=logits),
    )


class _Mix:
    """Averages over the tokens of a sequence by causal attention, the mean over its heads."""

    def __init__(self) -> None:
        heads, width = HEADS
        self.query, self.key = (torch.randn(SEQUENCES, heads, LENGTH, width) for _ in range(2))

    def __call__(self, values: Tensor) -> Tensor:
        spread = values.view(SEQUENCES, 1, LENGTH, -1).expand(-1, HEADS[0], -1, -1)
        mixed = F.scaled_dot_product_attention(self.query, self.key, spread, is_causal=True)
        return mixed.mean(1).flatten(0, 1)


# ---- shares ----------------------------------------------------------------------------------------------------------


@dataclass
class _Clock:
    """Seconds that a layer's experts compute."""

    seconds: float = 0.0
    _began: float = 0.0

    def attach(self, layer: MoE) -> None:
        for experts in (layer.experts, layer.shared_experts):
            if experts is not None:
                experts.register_forward_pre_hook(self._start)
                experts.register_forward_hook(self._stop)

    def _start(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        for one in inputs:
            if isinstance(one, Routing):
                one.dispatch()  # is part of routing
        self._began = time.perf_counter()

    def _stop(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.seconds += time.perf_counter() - self._began


def _overhead(name: str, layer: MoE, rate: float, repeats: int, most: float | None, say: Say) -> Iterator[Row]:
    """A row at inference and one in training mode."""
    clock, context = _Clock(), _context(layer)
    clock.attach(layer)
    x = torch.randn(SEQUENCES, LENGTH, WIDTH).to(layer.gate.weight.dtype)
    least = _product_flops(layer.gates) / rate
    for training in (False, True):
        mode = "training" if training else "inference"
        say(f"bench routing: {name}, {mode}")
        layer.train(training)
        shares, seconds = [], []
        with torch.enable_grad() if training else torch.inference_mode():
            for turn in range(repeats + 1):
                clock.seconds, start = 0.0, time.perf_counter()
                layer(x, context)
                whole = time.perf_counter() - start
                if turn:
                    seconds.append(whole - clock.seconds)
                    shares.append(1 - clock.seconds / whole)
        routing = statistics.median(seconds)
        limit = f"{routing * 1e3:.1f} ms; its matrix product at {rate / 1e9:,.0f} GFLOP/s {least * 1e3:.1f} ms"
        share = statistics.median(shares)
        yield Row(f"{name}, {mode}", share, None, limit=limit, share=least / routing, most=most, unit="share")


def _product_flops(gates: tuple[Router, ...]) -> float:
    """Floating-point operations of the products of all tokens with the routers' weights."""
    return sum(2.0 * SEQUENCES * LENGTH * gate.weight.numel() for gate in gates)


# ---- routers alone ---------------------------------------------------------------------------------------------------


def _peer(name: str, gate: Router) -> nn.Module:
    """transformers' router of this kind, with the same weights."""
    E, K = PLAIN["num_experts"], PLAIN["num_experts_per_tok"]
    sizes = {"hidden_size": WIDTH, "num_experts_per_tok": K, "norm_topk_prob": True}
    peer: nn.Module
    if name == "softmax top-k":
        peer = OlmoeTopKRouter(OlmoeConfig(num_experts=E, **sizes))
    else:
        peer = DeepseekV3TopkRouter(
            DeepseekV3Config(n_routed_experts=E, n_group=8, topk_group=4, routed_scaling_factor=2.5, **sizes)
        )
    peer.weight = copy.deepcopy(gate.weight)
    return peer


def _alone(name: str, gate: Router, peer: nn.Module, rate: float) -> Row:
    """Seconds of both routers at inference."""
    x = torch.randn(SEQUENCES * LENGTH, WIDTH).to(gate.weight.dtype)
    with torch.inference_mode():
        found = medians({"ours": lambda: gate(x), "peer": lambda: peer(x)}, repeats=ALONE, warmup=3)
    least = _product_flops((gate,)) / rate
    limit = f"GEMM {rate / 1e9:,.0f} GFLOP/s"
    return Row(name, found["ours"], found["peer"], type(peer).__name__, None, limit, least / found["ours"])
