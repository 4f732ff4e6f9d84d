"""Expert records made up for tests, and the activation that belongs to a layout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from collegium.experts.activations import KNOWN
from collegium.experts.stored import ExpertLayout


def activation(layout: ExpertLayout, name: str) -> Callable[[Tensor], Tensor]:
    act = KNOWN[name].value
    if not layout.gated:
        return act
    if layout.interleaved:
        return lambda pre: act(pre[..., ::2]) * pre[..., 1::2]
    return lambda pre: act(pre.chunk(2, -1)[0]) * pre.chunk(2, -1)[1]


def record(layout: ExpertLayout, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.empty(layout.nbytes, dtype=torch.uint8)
    up, down = (torch.randn(m, generator=generator) / m[1] ** 0.5 for m in layout.matrices.values())
    biases = [torch.randn(len(m), generator=generator) if layout.bias else None for m in (up, down)]
    layout.write(made, up, down, *biases)
    return made
