"""`pack`: a checkpoint becomes an expert store, one expert in memory at a time, or one decoder layer where it must be.

One expert is then one contiguous aligned record, in each precision that was asked for. Everything that is no expert is
copied byte by byte. Experts whose bytes can be found in the files are read from there; others go through transformers'
own conversion, a decoder layer at a time.
"""

from __future__ import annotations

import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from collegium._version import __version__
from collegium.errors import CheckpointError, ConfigError, NonFiniteError, StorageError, UnsupportedFamilyError
from collegium.experts.from_module import expert_weights
from collegium.experts.stored import BITS, ExpertLayout
from collegium.experts.weights import ExpertWeights
from collegium.files import atomic_file
from collegium.layerwise import LayerwiseModel
from collegium.models.checkpoint import Checkpoint, open_checkpoint
from collegium.models.families import lookup
from collegium.models.shards import Piece, check_space, copy_others, shards, source_state, write_shards
from collegium.models.summary import split_extra
from collegium.offload.store.blocks import Block, open_layerwise
from collegium.offload.store.direct import drop_pages
from collegium.offload.store.meta import (
    CHECKSUMS,
    META,
    LayerMeta,
    StoreMeta,
    experts_file,
    is_store,
    stored_layers,
    write_meta,
)
from collegium.offload.store.packed import ExpertStore
from collegium.offload.store.partial import PartialStore, Sums, check_out
from collegium.offload.store.plain import PlainExperts
from collegium.offload.store.source import StoredLayer, aligned

__all__ = ["Progress", "pack"]

_LARGEST = {
    32: torch.finfo(torch.float32).max,
    16: torch.finfo(torch.bfloat16).max,
    8: 127 * torch.finfo(torch.float16).max,
    4: 7 * torch.finfo(torch.float16).max,
}

Progress = Callable[[int, int], None]
"""Called with the bytes that are written, and with all that will be."""


def pack(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    bits: Sequence[int] = (16,),
    group: int = 32,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExpertStore:
    """Write the experts of a Hugging Face folder as records, and the rest of it beside them.

    16 bits are bfloat16; 8 and 4 are integers with a scale for each row or group (see
    `collegium.experts.stored.ExpertLayout`), rounded to nearest. Beside `out` there is ``out.partial`` until it is
    done; a run that was killed goes on from there, and the layers that are complete and undamaged are kept. Layers for
    multi-token prediction are left out.

    Args:
        bits: precisions to hold side by side.
        group: weights that share a scale in 4 bits, 32 or 64.
        overwrite: replace a store that is there, and what is left of an unfinished one with other settings.

    Returns:
        The store, open.

    Raises:
        ConfigError: `out` holds something else, the settings are not allowed, or 4 bits do not fit the widths.
        NotMoEError, UnsupportedFamilyError: there are no experts, or none that can be run from a disk.
        NonFiniteError: an expert holds NaN or infinity, or a number too large for the precision; it is named.
        CheckpointError: the source is incomplete or damaged, or changed while it was read.
        StorageError: the disk is full; the unfinished store stays.
    """
    folder, out = Path(model), Path(out).absolute()
    _check_settings(bits, group)
    check_out(out, overwrite=overwrite)
    if is_store(folder):
        raise ConfigError(f"{folder} is an expert store already; pack the model it was made from")
    state = source_state(folder) if folder.is_dir() else {}
    checkpoint = open_checkpoint(folder)
    streamed, blocks, names = open_layerwise(checkpoint)
    meta, rest = _describe(streamed, blocks, names, bits, group)
    work = _Work(streamed, blocks, _plain(folder), meta, progress, sum(piece.nbytes for piece in rest))
    partial = PartialStore(out, {"meta": meta.model_dump(mode="json"), "source": state}, overwrite=overwrite)
    try:
        sums = work.experts(partial)
        _write_rest(checkpoint, partial.folder, rest, work.count)
        _write_meta(partial.folder, meta, sums)
        ExpertStore(partial.folder).close()
        if source_state(folder) != state:
            raise CheckpointError(f"{folder} was changed while it was read; pack it again with --overwrite")
        partial.finish()
    finally:
        partial.close()
        work.close()
    return ExpertStore(out)


def _check_settings(bits: Sequence[int], group: int) -> None:
    if not bits or len(set(bits)) < len(bits) or not set(bits) <= set(BITS):
        raise ConfigError(f"bits must be some of {', '.join(map(str, BITS))}, each once, not {list(bits)}")
    if group not in (32, 64):
        raise ConfigError(f"group must be 32 or 64, not {group}")


def _describe(
    streamed: LayerwiseModel, blocks: Sequence[Block], names: frozenset[str], bits: Sequence[int], group: int
) -> tuple[StoreMeta, list[Piece]]:
    """What the store will hold: records, and tensors that are copied."""
    checkpoint = streamed.checkpoint
    main, extra = split_extra(checkpoint.tensors, lookup(checkpoint.config, "layers"))
    if 32 in bits and streamed.dtype == torch.bfloat16:
        raise ConfigError(f"the experts of {checkpoint.folder} are bfloat16, which 16 bits hold exactly; leave 32 out")
    layers = tuple(_layer_meta(block) for block in blocks)
    stored_layers(layers, bits, group)
    meta = StoreMeta(
        model=checkpoint.folder.resolve().name,
        fingerprint=checkpoint.fingerprint,
        family=streamed.family,
        dtype=str(streamed.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        bits=tuple(bits),  # type: ignore[arg-type]
        group=group if 4 in bits else 0,  # type: ignore[arg-type]
        layers=layers,
        left_out=len(extra),
        checksums="",
        collegium=__version__,
    )
    rest = [
        Piece(name, info.dtype, info.shape, info.file, ((info.offset, info.nbytes),))
        for name, info in main.items()
        if name not in names
    ]
    return meta, rest


def _layer_meta(block: Block) -> LayerMeta:
    site, weights = block.site, block.weights
    return LayerMeta(
        layer=site.layer,
        path=site.path,
        num_experts=weights.num_experts,
        top_k=site.top_k,
        d=block.d,
        f=block.f,
        gated=weights.gated,
        interleaved=weights.interleaved,
        bias=weights.up_bias is not None,
    )


class _Work:
    """Writes the layers of a store."""

    def __init__(
        self,
        streamed: LayerwiseModel,
        blocks: Sequence[Block],
        plain: PlainExperts | None,
        meta: StoreMeta,
        progress: Progress | None,
        rest: int,
    ) -> None:
        self.streamed, self.blocks, self.plain = streamed, blocks, plain
        self.layers, self.progress = meta.stored(), progress
        self.done, self.total = 0, rest + sum(map(_nbytes, self.layers))

    def count(self, nbytes: int) -> None:
        """Note that so many bytes are there."""
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)

    def experts(self, partial: PartialStore) -> list[Sums]:
        """Write what is not there yet; the checksums of all layers."""
        sums: dict[int, Sums] = {}
        for index, layer in enumerate(self.layers):
            if (kept := partial.kept(index, layer)) is not None:
                sums[index] = kept
                self.count(_nbytes(layer))
        check_space(partial.folder, self.total - self.done)
        todo = [index for index in range(len(self.layers)) if index not in sums]
        for number, group in groupby(todo, lambda index: self.layers[index].layer):
            with nullcontext() if self.plain else self.streamed.layer_loaded(number):
                for index in group:
                    sums[index] = self._layer(partial, index)
        return [sums[index] for index in range(len(self.layers))]

    @torch.no_grad()
    def _layer(self, partial: PartialStore, index: int) -> Sums:
        layer = self.layers[index]
        sums = {bits: np.zeros(layer.num_experts, np.uint32) for bits in layer.layouts}
        records = {bits: aligned(layout.nbytes) for bits, layout in layer.layouts.items()}
        with ExitStack() as stack:
            files = {
                bits: stack.enter_context(_written(partial.folder / experts_file(index, bits)))
                for bits in layer.layouts
            }
            for expert, matrices in enumerate(self._matrices(index)):
                where = f"{self.streamed.checkpoint.folder}: expert {expert} of layer {layer.layer} ({layer.path})"
                for bits, layout in layer.layouts.items():
                    _fill(records[bits], layout, matrices, where)
                    sums[bits][expert] = zlib.crc32(records[bits].data)
                    _write(files[bits], records[bits])
                    self.count(layout.nbytes)
        partial.finish_layer(index, sums)
        return sums

    def _matrices(self, index: int) -> Iterator[dict[str, Tensor]]:
        """Matrices ``[out, in]`` and biases of each expert, by the names of `ExpertLayout.write`."""
        if self.plain is None:
            weights = expert_weights(self.blocks[index].site.experts)
            for expert in range(weights.num_experts):
                yield _parts(weights, expert)
            return
        one = self.plain.layers[index]
        (bits, layout), *_ = one.layouts.items()
        record = aligned(layout.nbytes)
        for expert in range(one.num_experts):
            self.plain.read(index, expert, bits, record)
            yield layout.views(torch.from_numpy(record))

    def close(self) -> None:
        """Close the source."""
        if self.plain is not None:
            self.plain.close()


def _nbytes(layer: StoredLayer) -> int:
    return layer.num_experts * sum(layout.nbytes for layout in layer.layouts.values())


def _plain(folder: Path) -> PlainExperts | None:
    """The experts as they lie in the files, if that takes no conversion."""
    try:
        return PlainExperts(folder)
    except UnsupportedFamilyError:
        return None


def _parts(weights: ExpertWeights, expert: int) -> dict[str, Tensor]:
    found = {"up": weights.up_t[expert].T, "down": weights.down_t[expert].T}
    if weights.up_bias is not None and weights.down_bias is not None:
        found |= {"up_bias": weights.up_bias[expert], "down_bias": weights.down_bias[expert]}
    return found


def _fill(record: np.ndarray[Any, Any], layout: ExpertLayout, matrices: dict[str, Tensor], where: str) -> None:
    """Make a record of an expert.

    Raises:
        NonFiniteError: a weight is NaN or infinite, or would be once it is rounded.
    """
    for name, matrix in matrices.items():
        low, high = map(float, torch.aminmax(matrix))  # one pass, and NaN is handed on
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NonFiniteError(
                f"{where} holds NaN or infinity in {name}; the checkpoint is damaged or its training diverged"
            )
        # scales are numbers of float16, and the largest of float32 are infinite in bfloat16
        if name in layout.matrices and max(-low, high) > _LARGEST[layout.bits]:
            raise NonFiniteError(f"{where} has weights in {name} too large for {layout.bits} bits; use more bits")
    layout.write(torch.from_numpy(record), **matrices)


@contextmanager
def _written(target: Path) -> Iterator[IO[bytes]]:
    """A file that appears as a whole, is on the disk then, and not in the page cache."""
    with atomic_file(target) as path, open(path, "wb", buffering=0) as file:
        yield file
        os.fsync(file.fileno())
        drop_pages(file.fileno())


def _write(file: IO[bytes], record: np.ndarray[Any, Any]) -> None:
    view = record.data
    while view:  # a call may take a part of it
        view = view[file.write(view) :]


def _write_rest(checkpoint: Checkpoint, out: Path, pieces: list[Piece], count: Callable[[int], None]) -> None:
    """Copy what is no expert: tensors, config, tokenizer and so on."""
    try:
        write_shards(shards(pieces), checkpoint.folder, out, count)
        for left in out.iterdir():
            if left.is_dir():  # of a run that was killed while it copied
                shutil.rmtree(left)
        copy_others(checkpoint.folder, out, ("README.md",))  # it describes another folder
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"could not write {out}: {error.strerror}; what is done stays, to go on from") from error


def _write_meta(out: Path, meta: StoreMeta, sums: list[Sums]) -> None:
    with atomic_file(out / CHECKSUMS) as path:
        content = save({f"{index}.{bits}": value for index, layer in enumerate(sums) for bits, value in layer.items()})
        path.write_bytes(content)
    with atomic_file(out / META) as path:
        write_meta(path, meta.model_copy(update={"checksums": f"{zlib.crc32(content):08x}"}))
