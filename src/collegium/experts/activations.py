"""The activation functions that back ends know by name: value and derivative.

A name is transformers' name (``ACT2FN``). An activation outside this table still works everywhere: back ends then call
`ExpertWeights.activation` and let autograd differentiate it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

__all__ = ["KNOWN", "Activation", "name_of"]


@dataclass(frozen=True)
class Activation:
    """An elementwise function with its derivative.

    Attributes:
        value: ``x -> act(x)``.
        gradient: ``(grad, x) -> grad * act'(x)``.
    """

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


def _relu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, x, 0)


KNOWN = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_pytorch_tanh": Activation(
        partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")
    ),
    "relu": Activation(F.relu, _relu_gradient),
    "relu2": Activation(lambda x: F.relu(x).square(), lambda grad, x: 2 * grad * F.relu(x)),
}
"""Name -> function. Every one is exactly transformers' function of that name."""

_CLASSES = {type(ACT2FN[name]): name for name in KNOWN} | {nn.SiLU: "silu", nn.ReLU: "relu"}


def name_of(act_fn: Any) -> str | None:
    """The name in `KNOWN` of an activation module, or None when back ends must call the module itself."""
    return _CLASSES.get(type(act_fn))
