"""Our experts compute against transformers' own, on the expert shapes of three open models.

One module of transformers runs in every way: its ``eager`` loop, ``grouped_mm``, ``batched_mm`` (up to 8 tokens, as it
copies the weights of every slot) and ours, with the same weights and the same uniformly random routing. The peer of a
point is the fastest of transformers' ways. A way that was five times slower than the fastest is not tried again with
more tokens: the backward pass of ``eager`` writes a gradient for all experts once per expert, which takes minutes.

The limit is the larger of two times: reading the hit experts' weights from memory once (for a backward pass: reading
them twice and writing their gradients) and doing the arithmetic at the rate of a large float32 or bfloat16 matrix
product, whichever is higher on this machine. Both rates are measured in the same run.

Legend: T tokens, E experts, K experts per token, d model width, f expert width.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from collegium.benchmarks.harness import Row, Say, gemm_rate, medians, memory_bandwidth
from collegium.sites import register

__all__ = ["run"]

SHAPES = {
    "OLMoE-1B-7B": (2048, 1024, 64, 8),
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "DeepSeek-V2-Lite": (2048, 1408, 64, 6),
}
"""Model -> (d, f, E, K)."""
TOKENS = (1, 8, 64, 512, 4096)
NEVER_BELOW = 0.98
GOALS = {torch.float32: 2.0, torch.bfloat16: 1.6}
"""For T <= 8; above, `NEVER_BELOW`."""
SECONDS = 8.0
"""Spent on a point, as far as 3 to 25 turns allow."""
HOPELESS = 5.0


@dataclass(frozen=True)
class _Machine:
    """Bytes and floating-point operations per second."""

    bandwidth: float
    flops: float


def run(quick: bool, say: Say) -> Iterator[Row]:
    """Forward, and forward with backward, at every shape, dtype and number of tokens."""
    register()
    say("bench experts: rates of this machine")
    machine = _Machine(memory_bandwidth(), max(gemm_rate(torch.float32), gemm_rate(torch.bfloat16)))
    shapes = dict(list(SHAPES.items())[:1]) if quick else SHAPES
    for model, (d, f, E, K) in shapes.items():
        for dtype in GOALS:
            experts = _experts(d, f, E, dtype)
            for backward in (False, True):
                peers = ["batched_mm", "grouped_mm", "eager"]
                for T in TOKENS[:3] if quick else TOKENS:
                    name = f"{model} T={T} {str(dtype).removeprefix('torch.')} {'f+b' if backward else 'forward'}"
                    say(f"bench experts: {name}")
                    yield _point(name, experts, T, K, backward, machine, peers)
            del experts
            gc.collect()


def _experts(d: int, f: int, E: int, dtype: torch.dtype) -> Any:
    config = Qwen3MoeConfig(hidden_size=d, moe_intermediate_size=f, num_experts=E)
    experts = Qwen3MoeExperts(config).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return experts


def _point(name: str, experts: Any, T: int, K: int, backward: bool, machine: _Machine, peers: list[str]) -> Row:
    """Measure one point; ways that are hopeless leave `peers`."""
    E, d, f = experts.num_experts, experts.hidden_dim, experts.intermediate_dim
    dtype = experts.down_proj.dtype
    generator = torch.Generator().manual_seed(T)
    x = torch.randn(T, d, generator=generator).to(dtype)
    weight, index = torch.rand(T, E, generator=generator).topk(K, dim=1)
    weight = (weight / weight.sum(1, keepdim=True)).to(dtype)
    if T > 8 and "batched_mm" in peers:
        peers.remove("batched_mm")
    calls = {way: _call(experts, way, x, index, weight, backward) for way in ("collegium", *peers)}
    found = _race(calls)
    ours = found.pop("collegium")
    fastest = min(found, key=lambda way: found[way])
    peers[:] = [way for way in peers if found[way] < HOPELESS * found[fastest]]
    nbytes = index.unique().numel() * 3 * d * f * dtype.itemsize * (3 if backward else 1)
    flops = 2 * T * K * 3 * d * f * (3 if backward else 1)
    read, arithmetic = nbytes / machine.bandwidth, flops / machine.flops
    limit = (
        f"memory {machine.bandwidth / 1e9:.0f} GB/s" if read > arithmetic else f"GEMM {machine.flops / 1e9:.0f} GFLOP/s"
    )
    goal = GOALS[dtype] if T <= 8 else NEVER_BELOW
    return Row(name, ours, found[fastest], fastest, goal, limit, max(read, arithmetic) / ours)


def _call(experts: Any, way: str, x: Tensor, index: Tensor, weight: Tensor, backward: bool) -> Callable[[], object]:
    experts.requires_grad_(backward)
    gradient = torch.ones_like(x)

    def forward() -> Tensor:
        experts.config._experts_implementation = way
        return experts(x, index, weight)

    def inference() -> Tensor:
        with torch.inference_mode():
            return forward()

    def training() -> None:
        experts.zero_grad(set_to_none=True)
        x.requires_grad_(True).grad = None
        weight.requires_grad_(True).grad = None
        forward().backward(gradient)
        experts.zero_grad(set_to_none=True)

    return training if backward else inference


def _race(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each. Peers that are far behind in their first call stay with that: they decide nothing."""
    first = medians(calls, repeats=1, warmup=0)
    best = min(seconds for way, seconds in first.items() if way != "collegium")
    near = {way: call for way, call in calls.items() if way == "collegium" or first[way] < 3 * best}
    turn = sum(first[way] for way in near)
    return first | medians(near, repeats=min(25, max(3, int(SECONDS / turn))))
