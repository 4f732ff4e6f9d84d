"""``store.json``: what an expert store holds.

    store.json               `StoreMeta`, and a checksum over it
    experts-00003-8.bin      MoE layer 3 (counted from 0 in running order) in 8 bits: record e at e * nbytes
    checksums.safetensors    "3.8": crc32 of each record, uint32 [E]
    config.json, model*.safetensors, tokenizer ...   the rest of the model, as it was

Records lie as `collegium.experts.stored.ExpertLayout` says. Sizes of files follow from the layouts alone.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from collegium.errors import CheckpointError, ConfigError
from collegium.experts.stored import ExpertLayout
from collegium.offload.store.source import StoredLayer

__all__ = [
    "CHECKSUMS",
    "META",
    "LayerMeta",
    "StoreMeta",
    "experts_file",
    "is_store",
    "read_meta",
    "stored_layers",
    "write_meta",
]

META, CHECKSUMS = "store.json", "checksums.safetensors"
SCHEMA_VERSION = 1

_META_LIMIT = 1 << 24  # bytes
_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


class LayerMeta(BaseModel):
    """One MoE layer: number of the decoder layer, module path of the block, E, K, and `ExpertLayout` but for bits."""

    model_config = _STRICT

    layer: int = Field(ge=0)
    path: str
    num_experts: int = Field(ge=1, le=1 << 16)
    top_k: int = Field(ge=1, le=1 << 16)
    d: int = Field(ge=1, le=1 << 20)
    f: int = Field(ge=1, le=1 << 20)
    gated: bool
    interleaved: bool
    bias: bool


class StoreMeta(BaseModel):
    """What was packed.

    Attributes:
        model: name of the folder it was made from.
        fingerprint: identity of that model.
        family: model_type.
        dtype: of the experts before they were packed.
        bits: precisions, side by side.
        group: weights that share a scale in 4 bits; 0 without them.
        layers: the MoE layers, in running order.
        left_out: tensors of layers for multi-token prediction, which no generation here uses.
        checksums: crc32 of `CHECKSUMS`.
        collegium: version that wrote it.
    """

    model_config = _STRICT

    schema_version: Literal[1] = 1
    model: str
    fingerprint: str
    family: str
    dtype: Literal["float32", "bfloat16", "float16"]
    bits: tuple[Literal[32, 16, 8, 4], ...] = Field(min_length=1, max_length=4, strict=False)
    group: Literal[0, 32, 64]
    layers: tuple[LayerMeta, ...] = Field(min_length=1, max_length=1 << 16, strict=False)
    left_out: int = Field(ge=0)
    checksums: str
    collegium: str

    @model_validator(mode="after")
    def _agrees(self) -> StoreMeta:
        if len(set(self.bits)) < len(self.bits):
            raise ValueError("bits are given twice")
        if len({one.path for one in self.layers}) < len(self.layers):
            raise ValueError("two layers have one path")
        if any(one.top_k > one.num_experts for one in self.layers):
            raise ValueError("a layer has fewer experts than slots")
        self.stored()
        return self

    def stored(self) -> tuple[StoredLayer, ...]:
        """The layers with their layouts."""
        return stored_layers(self.layers, self.bits, self.group)


def stored_layers(layers: Sequence[LayerMeta], bits: Sequence[int], group: int) -> tuple[StoredLayer, ...]:
    """Layers with a layout for each of `bits`.

    Raises:
        ConfigError: groups do not divide the widths of one.
    """
    return tuple(
        StoredLayer(one.path, one.layer, one.num_experts, one.top_k, {b: _layout(one, b, group) for b in bits})
        for one in layers
    )


def _layout(one: LayerMeta, bits: int, group: int) -> ExpertLayout:
    try:
        return ExpertLayout(one.d, one.f, one.gated, one.interleaved, one.bias, bits, group if bits == 4 else 0)
    except ConfigError as error:
        raise ConfigError(f"experts of layer {one.layer} ({one.path}) do not go into {bits} bits: {error}") from error


def experts_file(index: int, bits: int) -> str:
    """Name of the file of a MoE layer, counted from 0 in running order."""
    return f"experts-{index:05d}-{bits}.bin"


def is_store(folder: Path) -> bool:
    """Whether a folder is an expert store, whole or not."""
    return (folder / META).is_file()


def write_meta(path: Path, meta: StoreMeta) -> None:
    """Write ``store.json``."""
    body = meta.model_dump(mode="json")
    body["checksum"] = _checksum(body)
    path.write_text(json.dumps(body, indent=1), encoding="utf-8")


def read_meta(folder: Path) -> StoreMeta:
    """Read the ``store.json`` of a folder. Nothing in it is trusted.

    Raises:
        CheckpointError: there is none, or it is damaged, was edited, or has another schema; the field is named.
    """
    path = folder / META
    try:
        if path.stat().st_size > _META_LIMIT:
            raise CheckpointError(f"{path} is over the limit of {_META_LIMIT} bytes")
        body: Any = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no expert store: it has no {META}; make one with collegium pack") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}; pack the model again") from error
    if not isinstance(body, dict):
        raise CheckpointError(f"{path} must be a JSON object; pack the model again")
    if body.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: schema_version is {body.get('schema_version')!r}; this collegium reads version {SCHEMA_VERSION}"
        )
    checksum = body.pop("checksum", None)
    if checksum != _checksum(body):
        raise CheckpointError(f"{path}: field 'checksum' does not fit the rest; it is damaged or was edited")
    try:
        return StoreMeta.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "meta"
        raise CheckpointError(f"{path}: field {field!r}: {first['msg']}") from error


def _checksum(body: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode(errors='surrogatepass')):08x}"
