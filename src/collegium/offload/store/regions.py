"""Where in a checkpoint's files the bytes of one expert lie.

transformers says which tensors on disk become which parameter, and by which operations. Three of those only move bytes:
a list of experts becomes one tensor, gate and up become one matrix, and a matrix is transposed. They are followed here;
a family that needs any other is refused.

Legend: E experts, p rows and q columns of a matrix.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from collegium.errors import CheckpointError, UnsupportedFamilyError
from collegium.layerwise import LayerwiseModel
from collegium.models.checkpoint import TensorInfo
from collegium.offload.store.blocks import Block

__all__ = ["Region", "expert_regions"]


@dataclass(frozen=True)
class Region:
    """A run of bytes of a file, and where it goes.

    Attributes:
        file: name of the shard.
        offset, nbytes: of the bytes in it.
        dtype: safetensors name.
        shape: ``[rows, q]`` as the bytes lie (a bias: ``[p]``).
        field: of the record.
        first: row of the field that it begins at.
        transposed: what the field wants is ``[q, rows]``.
    """

    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    field: str
    first: int = 0
    transposed: bool = False

    @property
    def rows(self) -> int:
        """How many rows of the field it fills."""
        return self.shape[-1] if self.transposed else self.shape[0]


@dataclass(frozen=True)
class _Stored:
    """A tensor on disk: its place among the sources of a conversion, and the conversion (None: stored as it is)."""

    name: str
    info: TensorInfo
    place: int
    converter: Any


def expert_regions(streamed: LayerwiseModel, blocks: Sequence[Block]) -> list[list[tuple[Region, ...]]]:
    """For each block, for each expert, what its record is made of.

    Raises:
        UnsupportedFamilyError: it takes more than moving bytes.
        CheckpointError: tensors are missing, or of other shapes than the config says.
    """
    stored = _stored(streamed, {name for block in blocks for name in block.parameters.values()})
    found = []
    for block in blocks:
        experts: list[list[Region]] = [[] for _ in range(block.weights.num_experts)]
        for field, parameter in block.parameters.items():
            shape = tuple(getattr(block.weights, field).shape)
            transposed = block.weights.transposed and len(shape) == 3
            where = f"{streamed.checkpoint.folder}: {parameter!r}"
            for expert, regions in enumerate(_parameter(stored.get(parameter, []), field, shape, transposed, where)):
                experts[expert] += regions
        found.append([tuple(regions) for regions in experts])
    return found


def _stored(streamed: LayerwiseModel, wanted: set[str]) -> dict[str, list[_Stored]]:
    """Parameter -> the tensors on disk that it is made of."""
    mapping = get_model_conversion_mapping(streamed.model) or []
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    prefix, state = streamed.model.base_model_prefix, streamed.model.state_dict()
    found: dict[str, list[_Stored]] = {}
    for name, info in streamed.checkpoint.tensors.items():
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if streamed.targets[name] not in wanted:
            continue
        # a name that needs no conversion although one would fit it is the model's own
        used = [one for one in converters if pattern in one.source_patterns] if target == streamed.targets[name] else []
        # parts of a model may each bring the same conversion
        if any(_signature(one) != _signature(used[0]) for one in used):
            raise _refusal(f"{streamed.checkpoint.folder}: {name!r}", "one of several conversions")
        place = used[0].source_patterns.index(pattern) if used else 0
        found.setdefault(streamed.targets[name], []).append(_Stored(name, info, place, used[0] if used else None))
    return found


def _signature(converter: Any) -> Any:
    operations = [(type(operation), vars(operation)) for operation in converter.operations]
    return converter.source_patterns, converter.target_patterns, operations


def _parameter(
    stored: list[_Stored], field: str, shape: tuple[int, ...], transposed: bool, where: str
) -> list[list[Region]]:
    """For each expert, the regions of one parameter.

    Args:
        shape: of the parameter, ``[E, p, q]``, or ``[E, q, p]`` if it is transposed (a bias: ``[E, p]``).
    """
    if not stored:
        raise CheckpointError(f"{where} has no tensor in the checkpoint; it is not complete")
    converter = stored[0].converter
    operations = [] if converter is None else converter.operations
    kinds = [type(operation) for operation in operations]
    if converter is not None and len(converter.target_patterns) > 1:
        raise _refusal(where, "a tensor that is taken apart")
    if not operations or kinds == [Transpose]:
        return _whole(stored, operations, field, shape, transposed, where)
    merged = kinds[0] is MergeModulelist and operations[0].dim == 0
    if kinds == [MergeModulelist] and merged and len(converter.source_patterns) == 1:
        return _list(stored, 1, field, shape, transposed, where)
    # gate and up one above the other: rows of the matrix, unless the matrix is transposed
    if kinds == [MergeModulelist, Concatenate] and merged and operations[1].dim == 1 and not transposed:
        return _list(stored, len(converter.source_patterns), field, shape, transposed, where)
    raise _refusal(where, ", ".join(kind.__name__ for kind in kinds))


def _whole(
    stored: list[_Stored], operations: list[Any], field: str, shape: tuple[int, ...], transposed: bool, where: str
) -> list[list[Region]]:
    """Regions of a parameter whose experts are stored in one tensor."""
    info = stored[0].info
    if operations:
        turn = operations[0]
        if {turn.dim0, turn.dim1} != {1, 2}:
            raise _refusal(where, "Transpose of the experts")
        # some families are found both ways, and transformers tells by the shape
        if not turn.check_dims or info.shape != shape:
            shape, transposed = (shape[0], shape[2], shape[1]), not transposed
    if len(stored) > 1 or info.shape != shape:
        raise CheckpointError(f"{where}: {stored[0].name!r} is {list(info.shape)} and should be {list(shape)}")
    nbytes = info.nbytes // shape[0]
    return [
        [Region(info.file, info.offset + e * nbytes, nbytes, info.dtype, shape[1:], field, 0, transposed)]
        for e in range(shape[0])
    ]


def _list(
    stored: list[_Stored], places: int, field: str, shape: tuple[int, ...], transposed: bool, where: str
) -> list[list[Region]]:
    """Regions of a parameter whose experts are tensors of their own, each of so many parts."""
    lists = [sorted((one for one in stored if one.place == place), key=_natural) for place in range(places)]
    if any(len(one) != shape[0] for one in lists):
        raise CheckpointError(
            f"{where} is made of {places} x {shape[0]} tensors, of which {len(stored)} are there; it is not complete"
        )
    experts = []
    for parts in zip(*lists, strict=True):
        regions: list[Region] = []
        for part in parts:
            info, first = part.info, sum(region.rows for region in regions)
            regions.append(
                Region(info.file, info.offset, info.nbytes, info.dtype, info.shape, field, first, transposed)
            )
        rows = sum(region.shape[0] for region in regions)
        if any(region.shape[1:] != shape[2:] for region in regions) or rows != shape[1]:
            raise CheckpointError(
                f"{where}: {parts[0].name!r} is {list(parts[0].info.shape)}, which does not make {list(shape[1:])}"
            )
        experts.append(regions)
    return experts


def _natural(stored: _Stored) -> list[Any]:
    """Sorts experts by number, as transformers does."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", stored.name)]


def _refusal(where: str, what: str) -> UnsupportedFamilyError:
    return UnsupportedFamilyError(
        f"{where} cannot be read expert by expert from this checkpoint ({what}); make a store of it with collegium pack"
    )
