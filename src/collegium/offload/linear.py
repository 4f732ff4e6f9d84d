"""Linear maps of few rows at the speed of memory.

torch multiplies a bfloat16 matrix by one row at half the memory's bandwidth on CPUs without matrix tiles. While a model
decodes, attention and the output layer are such products, and as large as the experts of a token together.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from collegium.experts.compute import jit
from collegium.experts.compute.cpu_kernels import MIN_WIDTH, address
from collegium.experts.compute.cpu_pool import launch
from collegium.experts.compute.cpu_products import LIMITS

__all__ = ["stream_linears"]

_ITEM_ROWS = 192  # of a matrix, that a thread takes at a time


class _Streamed(nn.Linear):
    """A linear map whose sums are float32 over weights as they are stored, each read once."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features).float()
        count, p, q = len(rows), self.out_features, self.in_features
        out = torch.empty(count, p)
        if count <= LIMITS["dot", torch.bfloat16]:
            splits = max(1, p // _ITEM_ROWS)
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


def stream_linears(model: nn.Module) -> int:
    """Let every plain linear map of `model` with bfloat16 weights on the CPU run on our kernels; how many those are.

    Inference only: the results have no gradient.
    """
    if jit.missing is not None:
        return 0
    found = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module.weight.dtype == torch.bfloat16
        and module.weight.device.type == "cpu"
        and min(module.weight.shape) >= MIN_WIDTH
    ]
    for module in found:
        module.__class__ = _Streamed  # parameters, hooks and names stay as they are
    return len(found)
