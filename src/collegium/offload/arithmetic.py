"""The arithmetic of experts that lie in slots: fast, or exactly that of transformers' own loop over experts.

Legend: T tokens of a pass, A rows (assignments sorted by expert), d model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from collegium.errors import ConfigError
from collegium.experts.compute import jit
from collegium.experts.compute.cpu_products import add_rows
from collegium.experts.compute.stored import Precision, StoredExperts
from collegium.experts.from_module import expert_weights
from collegium.experts.stored import ExpertLayout

__all__ = ["Arithmetic", "Group", "Kind", "Stored", "Unchanged", "arithmetic"]

Kind = Literal["fast", "float32", "exact"]
"""How experts are computed: "fast" with float32 sums, and in copies of 8 and 4 bits with rows that are rounded to 8
bits, as llama.cpp does; "float32" without that rounding; "exact" as transformers computes, bit for bit."""

Group = tuple[Tensor, int, int]
"""Record of an expert, first and last of its rows."""


class Arithmetic(Protocol):
    """What the engine asks of one layer's experts in one layout."""

    def rows(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """``(x as the kernels take it, [A, d] for what the experts give)``."""

    def compute(self, x: Tensor, token: Tensor, groups: Sequence[Group], out: Tensor) -> None:
        """Fill the rows of some experts: ``out[i] = expert(x[token[i]])``."""

    def combine(self, out: Tensor, token: Tensor, weight: Tensor, edges: Sequence[int], like: Tensor) -> Tensor:
        """``[T, d]`` sums of weight * row over each token, in an order that depends on nothing else."""

    def token(self, x: Tensor, groups: Sequence[Group], weight: Tensor) -> Tensor | None:
        """The same for one token whose experts are all there: ``[1, d]`` sums over groups ``(record, i, i + 1)`` with
        weight ``[n]`` float32, bit for bit as by the calls above; None where this arithmetic has no shorter way."""


class Stored:
    """float32 sums over weights as they are stored; see `StoredExperts`. With `rounded`, rows go in as 8 bits where the
    weights have no more."""

    def __init__(self, layout: ExpertLayout, module: nn.Module, rounded: bool) -> None:
        weights = expert_weights(module)
        rows: Precision = "int8" if rounded and layout.bits <= 8 else "float32"
        self._run = StoredExperts(layout, weights.activation, weights.fused_activation, rows)
        self._norm = weights.post_norm

    def rows(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return x.float().contiguous(), torch.empty(count, x.shape[1])

    def compute(self, x: Tensor, token: Tensor, groups: Sequence[Group], out: Tensor) -> None:
        self._run.run(x, token, groups, out)
        if self._norm is not None:
            for _, first, last in groups:
                out[first:last] = self._norm(out[first:last])

    def combine(self, out: Tensor, token: Tensor, weight: Tensor, edges: Sequence[int], like: Tensor) -> Tensor:
        y = torch.zeros(like.shape)
        if jit.missing is None:
            add_rows(y, token, out, weight.float())
        else:
            y.index_add_(0, token, out * weight.float()[:, None])
        return y.to(like.dtype)

    def token(self, x: Tensor, groups: Sequence[Group], weight: Tensor) -> Tensor | None:
        if not self._run.runs_tokens or self._norm is not None or x.dtype != torch.bfloat16:
            return None
        return self._run.token(x.float(), groups, weight)


class Unchanged:
    """The very operations of transformers' loop over experts, in the dtype of the model: bit for bit what
    ``experts_implementation="eager"`` gives, and slow. Where a family keeps its matrices transposed (gpt-oss), sums may
    round otherwise."""

    def __init__(self, layout: ExpertLayout, module: nn.Module) -> None:
        if layout.bits < 16:
            raise ConfigError(f"exact arithmetic needs experts as the checkpoint has them, not in {layout.bits} bits")
        self._layout, self._weights = layout, expert_weights(module)

    def rows(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return x, torch.empty(count, x.shape[1], dtype=x.dtype)

    def compute(self, x: Tensor, token: Tensor, groups: Sequence[Group], out: Tensor) -> None:
        for record, first, last in groups:
            expert = self._layout.views(record)
            up_bias, down_bias = (
                expert[name].to(x.dtype) if self._layout.bias else None for name in ("up_bias", "down_bias")
            )
            rows = x[token[first:last]]
            if self._weights.transposed:  # a product with the other order in memory rounds otherwise
                hidden = self._weights.activation(_plus(rows @ expert["up"].T.contiguous(), up_bias))
                found = _plus(hidden @ expert["down"].T.contiguous(), down_bias)
            else:
                hidden = self._weights.activation(F.linear(rows, expert["up"], up_bias))
                found = F.linear(hidden, expert["down"], down_bias)
            out[first:last] = found if self._weights.post_norm is None else self._weights.post_norm(found)

    def combine(self, out: Tensor, token: Tensor, weight: Tensor, edges: Sequence[int], like: Tensor) -> Tensor:
        y = torch.zeros_like(like)
        for first, last in pairwise(edges):
            y.index_add_(0, token[first:last], (out[first:last] * weight[first:last, None]).to(y.dtype))
        return y

    def token(self, x: Tensor, groups: Sequence[Group], weight: Tensor) -> None:
        return None


def _plus(rows: Tensor, bias: Tensor | None) -> Tensor:
    return rows if bias is None else rows + bias


def arithmetic(kind: Kind, layout: ExpertLayout, module: nn.Module) -> Arithmetic:
    """The arithmetic of that name for one layer's experts module, which need not have its weights.

    Raises:
        ConfigError: there is no such arithmetic, or it cannot take these weights.
    """
    if kind not in get_args(Kind):
        raise ConfigError(f"experts are computed {', '.join(get_args(Kind))}, not {kind!r}")
    return Unchanged(layout, module) if kind == "exact" else Stored(layout, module, rounded=kind == "fast")
