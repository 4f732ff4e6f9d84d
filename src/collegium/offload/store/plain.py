"""`PlainExperts`: experts straight out of a Hugging Face checkpoint, so that nothing need be packed to try.

An expert is then several pieces of a file at no aligned place. They are read into a buffer that every thread has, and
copied from there to where the record wants them. There are no checksums. A packed store is faster.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from collegium.errors import CheckpointError, ConfigError, UnsupportedFamilyError
from collegium.experts.stored import ALIGNMENT, ExpertLayout
from collegium.models.checkpoint import open_checkpoint
from collegium.offload.store.blocks import Block, expert_dtype, open_layerwise
from collegium.offload.store.direct import DirectFile, warn_if_indirect
from collegium.offload.store.regions import Region, expert_regions
from collegium.offload.store.source import Bytes, StoredLayer, aligned, check_buffer, layout_of

__all__ = ["PlainExperts", "open_plain"]

_GAP = 1 << 16  # bytes that are rather read for nothing than skipped by a second read
_BITS = {"torch.bfloat16": 16, "torch.float32": 32}
_WORDS = {"BF16": np.uint16, "F32": np.uint32}
_TILE = 128  # rows and columns that are turned at a time, so that they stay in the cache


def open_plain(folder: str | os.PathLike[str]) -> PlainExperts:
    """Open a Hugging Face model folder. See `PlainExperts`."""
    return PlainExperts(folder)


@dataclass(frozen=True)
class _Read:
    """One aligned read, and the regions it holds."""

    file: str
    start: int
    nbytes: int
    regions: tuple[Region, ...]


class PlainExperts:
    """The experts of a checkpoint, an `ExpertSource`, in 16 bits (bfloat16) or 32 (float32) as they are stored.

    Attributes:
        checkpoint: all of the model.
        layers, fingerprint, expert_tensors, scratch_nbytes: as `ExpertSource` says.
        direct: whether reads pass the page cache by.

    Raises:
        NotMoEError, RemoteCodeError: as for `collegium.models.load`.
        UnsupportedFamilyError: the experts are stored in another dtype, or it takes more than moving bytes to make
            records of them.
        CheckpointError: files are missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.checkpoint = open_checkpoint(folder)
        streamed, blocks, self.expert_tensors = open_layerwise(self.checkpoint)
        self.fingerprint = self.checkpoint.fingerprint
        bits = self._bits(blocks, streamed.targets)
        self.layers = tuple(_layer(block, bits) for block in blocks)
        self._reads = [[_reads(regions) for regions in block] for block in expert_regions(streamed, blocks)]
        self._gaps = [_gaps(one.layouts[bits]) for one in self.layers]
        self.scratch_nbytes = max(read.nbytes for block in self._reads for reads in block for read in reads)
        self._scratch = threading.local()
        names = sorted({read.file for block in self._reads for reads in block for read in reads})
        self._files: dict[str, DirectFile] = {}
        try:
            for name in names:
                self._files[name] = DirectFile(self.checkpoint.folder / name)
        except CheckpointError:
            self.close()
            raise
        self.direct = warn_if_indirect(Path(folder), self._files.values())

    def read(self, layer: int, expert: int, bits: int, into: Bytes) -> None:
        """See `ExpertSource.read`."""
        layout = layout_of(self.layers, layer, expert, bits)
        check_buffer(into, layout.nbytes)
        if not self._files:
            raise ConfigError(f"{self.checkpoint.folder} was closed; open it again")
        scratch: Bytes | None = getattr(self._scratch, "buffer", None)
        if scratch is None:
            scratch = self._scratch.buffer = aligned(self.scratch_nbytes)
        for first, last in self._gaps[layer]:
            into[first:last] = 0
        for read in self._reads[layer][expert]:
            file = self._files[read.file]
            where = f"{file.path}: expert {expert} of layer {self.layers[layer].layer} ({self.layers[layer].path})"
            try:
                got = file.read(scratch[: read.nbytes], read.start)
            except OSError as error:
                raise CheckpointError(f"{where} could not be read: {error.strerror}") from error
            for region in read.regions:
                begin = region.offset - read.start
                if begin + region.nbytes > got:
                    raise CheckpointError(f"{where} lies beyond the end of the file, which was cut off")
                _place(into, layout, region, scratch[begin : begin + region.nbytes])

    def close(self) -> None:
        """Close the files. No thread may read any more."""
        files, self._files = self._files, {}
        for file in files.values():
            file.close()

    def _bits(self, blocks: list[Block], targets: dict[str, str]) -> int:
        """Of the matrices; biases are float32 in a record, whatever they were."""
        matrices = {block.parameters[name] for block in blocks for name in ("up", "down")}
        names = [name for name, target in targets.items() if target in matrices]
        stored = sorted({self.checkpoint.tensors[name].dtype for name in self.expert_tensors})
        dtypes = {self.checkpoint.tensors[name].dtype for name in names}
        if len(dtypes) > 1 or not set(stored) <= _WORDS.keys():
            raise UnsupportedFamilyError(
                f"{self.checkpoint.folder} stores experts as {', '.join(stored)}; only bfloat16 or float32 throughout "
                "can be read as it is. Make a store of it with collegium pack"
            )
        return _BITS[str(expert_dtype(self.checkpoint, names))]


def _layer(block: Block, bits: int) -> StoredLayer:
    site, weights = block.site, block.weights
    layout = ExpertLayout(block.d, block.f, weights.gated, weights.interleaved, weights.up_bias is not None, bits)
    return StoredLayer(site.path, site.layer, weights.num_experts, site.top_k, {bits: layout})


def _reads(regions: tuple[Region, ...]) -> tuple[_Read, ...]:
    """As few aligned reads as hold them: regions that are close together share one."""
    groups: list[list[Region]] = []
    for region in sorted(regions, key=lambda one: (one.file, one.offset)):
        last = groups[-1][-1] if groups else None
        if last is not None and last.file == region.file and region.offset - last.offset - last.nbytes <= _GAP:
            groups[-1].append(region)
        else:
            groups.append([region])
    found = []
    for group in groups:
        start = group[0].offset // ALIGNMENT * ALIGNMENT
        end = -(-(group[-1].offset + group[-1].nbytes) // ALIGNMENT) * ALIGNMENT
        found.append(_Read(group[0].file, start, end - start, tuple(group)))
    return tuple(found)


def _gaps(layout: ExpertLayout) -> tuple[tuple[int, int], ...]:
    """(first byte, byte after the last) between the fields of a record and behind them."""
    ends = [first + int(np.prod(shape)) * dtype.itemsize for first, shape, dtype in layout.fields.values()]
    begins = [first for first, _, _ in layout.fields.values()]
    return tuple((end, begin) for end, begin in zip(ends, [*begins[1:], layout.nbytes], strict=True) if end < begin)


def _place(into: Bytes, layout: ExpertLayout, region: Region, content: Bytes) -> None:
    """Put the bytes of a region where the record wants them."""
    first, shape, dtype = layout.fields[region.field]
    field = into[first : first + int(np.prod(shape)) * dtype.itemsize]
    found: np.ndarray[Any, Any] = np.frombuffer(content, _WORDS[region.dtype]).reshape(region.shape)
    if len(shape) == 1:  # a bias, in float32 whatever it was
        rows = field.view(np.uint32)
        rows[region.first : region.first + region.rows] = found.astype(np.uint32) << (32 - 8 * found.itemsize)
        return
    matrix = field.view(found.dtype).reshape(shape)[region.first : region.first + region.rows]
    if not region.transposed:
        matrix[:] = found
        return
    for i in range(0, found.shape[0], _TILE):
        for j in range(0, found.shape[1], _TILE):
            matrix[j : j + _TILE, i : i + _TILE] = found[i : i + _TILE, j : j + _TILE].T
