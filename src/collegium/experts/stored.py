"""`ExpertLayout`: how one expert lies in memory or on disk as one record of bytes, in 32, 16, 8 or 4 bits a weight.

An expert that is loaded on demand is one contiguous read into one slot, and a kernel computes from the slot. So a
record holds everything of the expert, at offsets that follow from the layout alone.

Legend: d model width, f expert width, u = 2f for gated experts (gate and up in one matrix) and f for plain ones; a
matrix is ``[p, q]`` as `up` ``[u, d]`` and `down` ``[d, f]``, never transposed; g weights of a group.

* 32 bits: float32 ``[p, q]``.
* 16 bits: bfloat16 ``[p, q]``.
* 8 bits: int8 codes ``[p, q]`` in -127 .. 127 and float32 scales ``[p]``; a weight is ``code * scale``.
* 4 bits: codes 0 .. 15 in uint8 ``[p, q / 2]``, where in each group of g codes byte j holds code j in its low half and
  code j + g/2 in its high half, and float16 scales ``[p, q / g]``; a weight is ``(code - 8) * scale``.

Scales are numbers that float16 can hold, so records convert to GGUF's Q8_0 and (g = 32) Q4_0 without a loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from collegium.errors import ConfigError

__all__ = ["ALIGNMENT", "BITS", "ExpertLayout", "dequantise", "quantise"]

BITS = (32, 16, 8, 4)
ALIGNMENT = 4096
"""Bytes that a record begins and ends at multiples of: direct reads from a disk ask for that."""

_FIELD_ALIGNMENT = 64
_CLIPS = torch.linspace(0.7, 1.0, 13).tolist()  # shares of the largest weight that the search for a scale tries
_ROWS = 32  # quantised at a time: what is computed for them stays in the cache


@dataclass(frozen=True)
class ExpertLayout:
    """The layout of one expert.

    Attributes:
        d, f: widths.
        gated: `up` holds gate and up.
        interleaved: gate and up rows alternate instead of following one another.
        bias: there are `up_bias` and `down_bias`, float32.
        bits: of a weight, one of `BITS`.
        group: g of 4 bits, 32 or 64; 0 otherwise.

    Raises:
        ConfigError: there are no such bits, or groups do not divide d and f.
    """

    d: int
    f: int
    gated: bool = True
    interleaved: bool = False
    bias: bool = False
    bits: int = 16
    group: int = 0

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"experts are stored in {', '.join(map(str, BITS))} bits a weight, not {self.bits}")
        if (self.bits == 4) != (self.group in (32, 64)) or (self.bits != 4 and self.group):
            raise ConfigError(f"group must be 32 or 64 with 4 bits and 0 otherwise, not {self.group}")
        if self.group and (self.d % self.group or self.f % self.group):
            raise ConfigError(
                f"groups of {self.group} weights do not divide d {self.d} and f {self.f}; use 8 bits or another group"
            )

    @property
    def u(self) -> int:
        """Rows of `up`."""
        return 2 * self.f if self.gated else self.f

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """``[p, q]`` of `up` and `down`."""
        return {"up": (self.u, self.d), "down": (self.d, self.f)}

    @cached_property
    def fields(self) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:
        """Name -> (first byte, shape, dtype) of everything in a record, in order."""
        found: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        end = 0

        def add(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
            nonlocal end
            found[name] = (end, shape, dtype)
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            end += -(-nbytes // _FIELD_ALIGNMENT) * _FIELD_ALIGNMENT

        for name, (p, q) in self.matrices.items():
            if self.bits == 4:
                add(name, (p, q // 2), torch.uint8)
                add(f"{name}_scale", (p, q // self.group), torch.float16)
            elif self.bits == 8:
                add(name, (p, q), torch.int8)
                add(f"{name}_scale", (p,), torch.float32)
            else:
                add(name, (p, q), torch.float32 if self.bits == 32 else torch.bfloat16)
            if self.bias:
                add(f"{name}_bias", (p,), torch.float32)
        return found

    @cached_property
    def nbytes(self) -> int:
        """Of a record, a multiple of `ALIGNMENT`."""
        first, shape, dtype = list(self.fields.values())[-1]
        return -(-(first + torch.Size(shape).numel() * dtype.itemsize) // ALIGNMENT) * ALIGNMENT

    def views(self, record: Tensor) -> dict[str, Tensor]:
        """The fields of a record ``[nbytes]`` uint8, as tensors on its memory."""
        return {
            name: record[first : first + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
            for name, (first, shape, dtype) in self.fields.items()
        }

    def write(
        self, record: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None = None, down_bias: Tensor | None = None
    ) -> None:
        """Fill a record ``[nbytes]`` with an expert, rounded to the layout's bits; gaps between fields become zeros.

        Args:
            up, down: ``[u, d]`` and ``[d, f]``, any floating dtype.
            up_bias, down_bias: ``[u]`` and ``[d]`` where the layout has them.
        """
        record.zero_()
        into = self.views(record)
        for name, matrix, bias in (("up", up, up_bias), ("down", down, down_bias)):
            if tuple(matrix.shape) != self.matrices[name] or (bias is None) == self.bias:
                raise ConfigError(f"{name} {list(matrix.shape)} is not {self.matrices[name]}, or lacks its bias")
            if self.bits <= 8:
                codes, scale = quantise(matrix, self.bits, self.group)
                into[name].copy_(codes)
                into[f"{name}_scale"].copy_(scale)
            else:
                into[name].copy_(matrix)
            if bias is not None:
                into[f"{name}_bias"].copy_(bias)

    def read(self, record: Tensor) -> dict[str, Tensor]:
        """The matrices (and biases) of a record in float32, dequantised: the oracle of every kernel."""
        views = self.views(record)
        found = {}
        for name in self.matrices:
            found[name] = (
                dequantise(views[name], views[f"{name}_scale"], self.bits, self.group)
                if self.bits <= 8
                else views[name].float()
            )
            if self.bias:
                found[f"{name}_bias"] = views[f"{name}_bias"]
        return found


def quantise(matrix: Tensor, bits: int, group: int = 0) -> tuple[Tensor, Tensor]:
    """Round-to-nearest codes and scales of ``matrix [p, q]``, in the form the module docstring says.

    A scale is the one of a few clips of the largest weight of its row (8 bits) or group (4 bits) that has the least
    squared error; a row of zeros has scale 0. With 8 bits a clip would gain nothing, so none is tried.

    Returns:
        ``(codes, scales)``.

    Raises:
        ConfigError: a weight is so large that float16 cannot hold its scale.
    """
    parts = [_quantise(rows, bits, group) for rows in matrix.split(_ROWS)]
    codes, scale = (torch.cat(found) for found in zip(*parts, strict=True))
    if not bool(torch.isfinite(scale).all()):
        raise ConfigError(f"weights up to {float(matrix.abs().max()):.3g} cannot be stored in {bits} bits")
    return codes, scale


def _quantise(matrix: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    p, q = matrix.shape
    w = matrix.float().reshape(p, -1, group) if bits == 4 else matrix.float().reshape(p, 1, q)
    top, low = (7, -8) if bits == 4 else (127, -127)
    largest = w.abs().amax(2, keepdim=True)
    best = (largest / top).half().float()
    if bits == 4:
        best_error = torch.full_like(largest, torch.inf)
        for clip in _CLIPS:
            scale = (largest * clip / top).half().float()
            error = (_codes(w, scale, low, top) * scale - w).square().sum(2, keepdim=True)
            best = torch.where(error < best_error, scale, best)
            best_error = torch.minimum(error, best_error)
    codes = _codes(w, best, low, top).reshape(p, q)
    if bits == 8:
        return codes.to(torch.int8), best.reshape(p)
    low_half, high_half = (codes + 8).to(torch.uint8).reshape(p, -1, 2, group // 2).unbind(2)
    return (low_half | (high_half << 4)).reshape(p, q // 2), best.reshape(p, -1).half()


def _codes(w: Tensor, scale: Tensor, low: int, top: int) -> Tensor:
    return torch.where(scale > 0, w / scale, 0.0).round_().clamp_(low, top)


def dequantise(codes: Tensor, scale: Tensor, bits: int, group: int = 0) -> Tensor:
    """``[p, q]`` float32: what `quantise` made codes and scales of, rounded."""
    if bits == 8:
        return codes.float() * scale[:, None]
    p = codes.shape[0]
    packed = codes.view(p, -1, group // 2)
    return ((torch.cat([packed & 15, packed >> 4], 2).float() - 8) * scale.float()[:, :, None]).reshape(p, -1)
