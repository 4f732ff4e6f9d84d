"""Token embeddings that stay on the disk: a token needs one row of a matrix that is often half a gigabyte.

Legend: V vocabulary, d model width, n distinct tokens of a pass.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from collegium.errors import CheckpointError, NonFiniteError
from collegium.experts.stored import ALIGNMENT
from collegium.layerwise import LayerwiseModel
from collegium.models.checkpoint import TensorInfo
from collegium.offload.store.direct import DirectFile

__all__ = ["close_rows", "leave_on_disk", "stored_embedding"]

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}


def stored_embedding(layerwise: LayerwiseModel) -> str | None:
    """The parameter whose rows can be read one by one; None where it is tied to another matrix, which needs it whole,
    or is no plain ``nn.Embedding`` over a matrix of the checkpoint."""
    model, embedding = layerwise.model, layerwise.embedding
    name = next(path for path, module in model.named_modules() if module is embedding) + ".weight"
    tied = model.all_tied_weights_keys
    if type(embedding) is not nn.Embedding or name in tied or name in tied.values():
        return None
    info = _info(layerwise, name)
    plain = info is not None and info.dtype in _DTYPES and info.shape == tuple(embedding.weight.shape)
    return name if plain else None


def leave_on_disk(layerwise: LayerwiseModel, name: str) -> None:
    """Let the embedding read the rows it needs; the parameter `name`, of `stored_embedding`, is not filled."""
    embedding: Any = layerwise.embedding
    info = _info(layerwise, name)
    assert info is not None
    del embedding.weight
    embedding.__class__ = _StoredEmbedding
    embedding.rows = _Rows(layerwise.checkpoint.folder / info.file, info, name)
    embedding.result = layerwise.dtype


def close_rows(model: Any) -> None:
    """Close the file of an embedding on the disk, if the model has one."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, _StoredEmbedding):
        embedding.rows.close()


def _info(layerwise: LayerwiseModel, name: str) -> TensorInfo | None:
    stored = [on_disk for on_disk, target in layerwise.targets.items() if target == name]
    return layerwise.checkpoint.tensors.get(stored[0]) if len(stored) == 1 else None


class _StoredEmbedding(nn.Embedding):
    """An embedding without a `weight`."""

    rows: _Rows
    result: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        distinct, of = np.unique(input.numpy(), return_inverse=True)
        if len(distinct) and not 0 <= distinct[0] <= distinct[-1] < self.num_embeddings:
            raise IndexError(f"token ids go from 0 to {self.num_embeddings - 1}, not {distinct[0]} to {distinct[-1]}")
        found = self.rows.read(distinct.tolist()).to(self.result)
        return F.embedding(torch.from_numpy(of.reshape(input.shape)), found)


class _Rows:
    """Rows of a matrix ``[V, d]`` in a file.

    Raises:
        CheckpointError: the file cannot be opened.
    """

    def __init__(self, path: Path, info: TensorInfo, name: str) -> None:
        self._file, self._info, self._name = DirectFile(path), info, name
        self._stride = info.nbytes // info.shape[0]
        # a row begins anywhere, direct reads begin and end at multiples of the alignment
        self._buffer = np.frombuffer(mmap.mmap(-1, -(-self._stride // ALIGNMENT) * ALIGNMENT + ALIGNMENT), np.uint8)

    def read(self, rows: list[int]) -> Tensor:
        """``[n, d]`` as stored.

        Raises:
            CheckpointError: the disk cannot, or the file was cut off.
            NonFiniteError: a row has NaN or infinity.
        """
        values = torch.empty(len(rows), self._info.shape[1], dtype=_DTYPES[self._info.dtype])
        found = values.view(torch.uint8).numpy()
        for at, row in enumerate(rows):
            offset = self._info.offset + row * self._stride
            skip = offset % ALIGNMENT
            span = -(-(skip + self._stride) // ALIGNMENT) * ALIGNMENT
            try:
                got = self._file.read(self._buffer[:span], offset - skip)
            except OSError as error:
                raise CheckpointError(f"{self._file.path}: could not read {self._name}: {error.strerror}") from error
            if got < skip + self._stride:
                raise CheckpointError(f"{self._file.path}: {self._name} ends before row {row}; the file was cut off")
            found[at] = self._buffer[skip : skip + self._stride]
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(f"{self._file.path}: {self._name!r} holds NaN or infinity")
        return values

    def close(self) -> None:
        """Close the file; no row can be read any more."""
        self._file.close()
