"""`ExpertSource`: where experts are read from, one record of bytes at a time.

A source counts the MoE layers of a model from 0 in the order they run. The engine, the cache and the reader threads
know nothing else of a disk, so a source for tests may hold everything in memory or fail on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from collegium.errors import ConfigError
from collegium.experts.stored import ALIGNMENT, ExpertLayout

if TYPE_CHECKING:
    from collegium.models.checkpoint import Checkpoint

__all__ = ["Bytes", "ExpertSource", "StoredLayer", "aligned", "check_buffer", "layout_of"]

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class StoredLayer:
    """One MoE layer of a source.

    Attributes:
        path: module path of the MoE block in the model; its experts are the submodule ``experts``.
        layer: number of the decoder layer.
        num_experts, top_k: E and K.
        layouts: bits of a weight -> how a record of them lies.
    """

    path: str
    layer: int
    num_experts: int
    top_k: int
    layouts: Mapping[int, ExpertLayout]


class ExpertSource(Protocol):
    """Reads experts.

    Attributes:
        checkpoint: a folder with the config, the tokenizer and at least the tensors that are no experts.
        layers: the MoE layers, in running order.
        fingerprint: identity of the model.
        expert_tensors: names in ``checkpoint.tensors`` that are matrices of experts.
        scratch_nbytes: what a thread that reads holds beside the record it reads into.
    """

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def layers(self) -> tuple[StoredLayer, ...]: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def expert_tensors(self) -> frozenset[str]: ...

    @property
    def scratch_nbytes(self) -> int: ...

    def read(self, layer: int, expert: int, bits: int, into: Bytes) -> None:
        """Fill `into` with a record; returns when it is there. May be called by several threads at once.

        Args:
            layer: index in `layers`.
            into: uint8 ``[layout.nbytes]`` at an address that is a multiple of 4096. What it holds after an error is
                not defined.

        Raises:
            CheckpointError: the record cannot be read, or is damaged.
            ConfigError: there is no such record, or `into` does not fit it.
        """

    def close(self) -> None:
        """Let go of the files, once no thread reads any more."""


def layout_of(layers: tuple[StoredLayer, ...], layer: int, expert: int, bits: int) -> ExpertLayout:
    """How the record lies that is asked for.

    Raises:
        ConfigError: there is no such record.
    """
    if not 0 <= layer < len(layers) or not 0 <= expert < layers[layer].num_experts:
        raise ConfigError(f"there is no expert {expert} of MoE layer {layer}, counted from 0")
    found = layers[layer].layouts.get(bits)
    if found is None:
        held = ", ".join(map(str, layers[layer].layouts))
        raise ConfigError(f"experts are here in {held} bits, not in {bits}; pack the model with --bits {bits}")
    return found


def check_buffer(into: Bytes, nbytes: int) -> None:
    """Raise ConfigError unless a record of so many bytes can be read into `into` without a copy."""
    fits = into.dtype == np.uint8 and into.shape == (nbytes,) and into.flags.c_contiguous and into.flags.writeable
    if not fits or into.ctypes.data % ALIGNMENT:
        raise ConfigError(
            f"a record of {nbytes} bytes is read into uint8 [{nbytes}], writable and at a multiple of {ALIGNMENT}, not "
            f"into {into.dtype} {list(into.shape)} at {into.ctypes.data % ALIGNMENT} past one"
        )


def aligned(nbytes: int) -> Bytes:
    """``[nbytes]`` uint8 at an address that direct reads take."""
    room = np.empty(nbytes + ALIGNMENT, np.uint8)
    first = -room.ctypes.data % ALIGNMENT
    return room[first : first + nbytes]
