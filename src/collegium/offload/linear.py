"""The matrices besides the experts: read at the speed of memory while a model writes, and, if asked, held in 8 bits.

torch multiplies a bfloat16 matrix by one row at half the memory's bandwidth on CPUs without matrix tiles. While a model
decodes, attention and the output layer are such products, and as large as the experts of a token together. They are
also what must be in memory whatever the budget: in 8 bits they take half of it.

Legend: a matrix is ``[p, q]``, input rows ``[n, q]``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from collegium.experts.compute import jit
from collegium.experts.compute.cpu_kernels import MIN_WIDTH, address
from collegium.experts.compute.cpu_pool import launch
from collegium.experts.compute.cpu_products import LIMITS
from collegium.experts.compute.stored import Precision, stored_linear, takes_one
from collegium.experts.compute.stored_kernels import ITEM_ROWS
from collegium.experts.compute.stored_one import linear_one
from collegium.experts.stored import quantise

__all__ = ["RoundedLinear", "StreamedLinear", "hold_in_8_bits", "stream_linears"]


class StreamedLinear(nn.Linear):
    """A linear map whose sums are float32 over weights as they are stored, each read once."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features).float()
        count, p, q = len(rows), self.out_features, self.in_features
        out = torch.empty(count, p)
        if count <= LIMITS["dot", torch.bfloat16]:
            splits = max(1, p // ITEM_ROWS)
            numbers = (splits, splits, p, q, self.weight.data_ptr(), rows.data_ptr(), out.data_ptr(), 0, 0, count)
            launch(_kernel(), *numbers)
        else:  # a widened copy of each matrix would double the model, so none is kept
            torch.mm(rows, self.weight.T.float(), out=out)
        if self.bias is not None:
            out += self.bias
        return out.to(input.dtype).view(*input.shape[:-1], p)


@functools.cache
def _kernel() -> int:
    return address("rows_dot_bfloat16")


class RoundedLinear(nn.Linear):
    """A linear map with int8 codes and a scale ``[p]``. It has no `weight`: who takes that itself is to fail."""

    codes: Tensor
    scale: Tensor
    rounding: Precision
    one: bool  # whether `linear_one` may be called

    def forward(self, input: Tensor) -> Tensor:
        if self.one and input.numel() == self.in_features and input.dtype == torch.bfloat16:
            return linear_one(input.contiguous(), self.codes, self.scale, self.bias)
        rows = input.reshape(-1, self.in_features).float()
        out = stored_linear(rows, self.codes, self.scale, 8, activations=self.rounding)
        if self.bias is not None:
            out += self.bias
        return out.to(input.dtype).view(*input.shape[:-1], self.out_features)


class _RoundedEmbedding(nn.Embedding):
    """An embedding with int8 codes, a scale ``[V]`` and a dtype of its results, and no `weight`."""

    codes: Tensor
    scale: Tensor
    result: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        found = F.embedding(input, self.codes).float() * self.scale[input][..., None]
        return found.to(self.result)


def stream_linears(model: nn.Module) -> None:
    """Let every plain linear map of `model` with bfloat16 weights on the CPU run on our kernels, where Numba is.

    Inference only: the results have no gradient.
    """
    if jit.missing is not None:
        return
    for module in model.modules():
        if type(module) is nn.Linear and _fits(module.weight):
            module.__class__ = StreamedLinear  # parameters, hooks and names stay as they are


def _fits(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and min(weight.shape) >= MIN_WIDTH


@torch.no_grad()
def hold_in_8_bits(model: nn.Module, rounding: Precision, but: Iterable[nn.Module] = ()) -> None:
    """Round the matrices of plain linear maps and embeddings to 8 bits with a scale a row; tied ones stay tied.

    Norms and whatever else is no plain ``Linear`` or ``Embedding`` stay as they are. What is rounded has no `weight`
    any more, so that a model which takes that itself, instead of calling the module, fails. Inference only.

    Args:
        but: modules whose matrices stay as they are, with all inside them.
        rounding: whether input rows are rounded to 8 bits too ("int8"), see `StoredExperts`.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}
    kept = {module for one in but for module in one.modules()}
    for module in model.modules():
        if type(module) not in (nn.Linear, nn.Embedding) or module in kept:
            continue
        one: Any = module
        weight = one.weight
        if weight.is_meta or min(weight.shape) < MIN_WIDTH:
            continue
        key = weight.data_ptr()
        if key not in made:
            made[key] = quantise(weight, 8)
        del one.weight
        for name, tensor in zip(("codes", "scale"), made[key], strict=True):
            one.register_buffer(name, tensor, persistent=False)
        if isinstance(one, nn.Embedding):
            one.result = weight.dtype
            one.__class__ = _RoundedEmbedding
        else:
            one.rounding = rounding
            bias = one.bias is None or one.bias.dtype == torch.bfloat16
            one.one = bias and rounding == "int8" and takes_one(tuple(one.codes.shape))
            one.__class__ = RoundedLinear
