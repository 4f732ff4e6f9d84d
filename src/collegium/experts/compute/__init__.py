"""Back ends that run experts: each takes ``(x [T, d], routing, weights)`` and gives ``[T, d]``.

* ``reference``: a loop over experts in float32; the oracle.
* ``grouped``: torch's grouped matrix product; any device.
* ``cpu``: streaming kernels and a lean backward; float32 and bfloat16 on the CPU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from collegium.catalog import get, methods
from collegium.errors import ConfigError
from collegium.experts.compute import cpu as _cpu
from collegium.experts.compute import grouped as _grouped
from collegium.experts.compute import jit
from collegium.experts.compute.cpu_memory import release_gradient_memory
from collegium.experts.compute.reference import reference
from collegium.experts.weights import ExpertWeights
from collegium.routing.record import Routing

__all__ = ["backends", "choose", "compute", "reference", "release_gradient_memory"]

_WHY_NOT: dict[str, Callable[[Tensor, ExpertWeights], str | None]] = {
    "cpu": _cpu.why_not,
    "grouped": _grouped.why_not,
    "reference": lambda x, weights: None,
}


def backends() -> list[str]:
    """The names of all back ends."""
    return [m.name for m in methods("compute")]


@functools.cache
def _warn_without_numba(reason: str) -> None:
    warnings.warn(
        f"Numba is not usable here ({reason}): experts on the CPU run through torch's grouped_mm, "
        "without collegium's own kernels that are up to 3 times as fast forward and 10 times backward",
        RuntimeWarning,
        stacklevel=4,
    )


def choose(x: Tensor, weights: ExpertWeights) -> str:
    """The back end that ``"auto"`` takes: ``cpu`` wherever it runs, else ``grouped``, else ``reference``.

    Measured (`collegium bench experts`): on a CPU ``cpu`` is ahead of ``grouped`` at every number of tokens, forward
    and backward, in both dtypes. The exception is not measured but known: a CPU with matrix tiles (AMX) multiplies
    bfloat16 several times as fast as float32, so there large bfloat16 batches go to torch.
    """
    if x.device.type == "cpu" and jit.missing is not None:
        _warn_without_numba(str(jit.missing))
    tiles = (
        torch.cpu._is_amx_tile_supported() and weights.up.dtype == torch.bfloat16 and len(x) > weights.num_experts * 8
    )
    names = ("grouped", "cpu", "reference") if tiles else ("cpu", "grouped", "reference")
    return next(name for name in names if _WHY_NOT[name](x, weights) is None)


def compute(x: Tensor, routing: Routing, weights: ExpertWeights, backend: str = "auto") -> Tensor:
    """The weighted sum of each token's experts: ``y[t] = sum over t's assignments of weight * expert(x[t])``.

    Differentiable in x, the weights and ``routing.weight``; each gradient is computed only if it is needed. Under
    ``torch.autocast`` the experts compute in the dtype of their weights: casting the weights, as a linear layer does,
    would read and write all experts for the few that are hit.

    Args:
        x: ``[T, d]``.
        routing: which token goes to which expert. Tokens without an expert get zeros, and so do assignments that were
            dropped or name an expert beyond ``weights.num_experts``.
        weights: the layer's experts.
        backend: a name from `backends`, or "auto", see `choose`.

    Returns:
        ``[T, d]`` in x's dtype; the sum over experts is taken in float32.

    Raises:
        ConfigError: x does not fit the weights or the routing, or the back end cannot run these tensors.
    """
    d = weights.up_t.shape[1]
    if x.dim() != 2 or x.shape != (routing.num_tokens, d):
        raise ConfigError(f"x {tuple(x.shape)} should be [{routing.num_tokens} tokens, {d}] for these experts")
    if backend == "auto":
        backend = choose(x, weights)
    run = get("compute", backend)
    reason = _WHY_NOT[backend](x, weights)
    if reason is not None:
        raise ConfigError(f"compute back end {backend!r} cannot run this: {reason}; use backend='auto'")
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = run(x, routing, weights)
    return y
