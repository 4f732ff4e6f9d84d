"""What a trace folder holds: ``meta.json`` and Parquet parts, one row a token.

    meta.json                       `TraceMeta` and a checksum over it
    part-00000000-1a2b3c4d.parquet  rows in the order they were recorded; the name ends in the CRC-32 of the file

Columns of every part:

    sequence, document, position    uint32   which sequence, which document, where in the sequence
    token                           uint32   token id
    domain                          string   one of ``meta.domains``
    step                            uint32   forward step of the run
    phase                           string   one of `PHASES`
    request                         uint32   request of a server; equal to sequence in an offline run
    adapter                         string   adapter that was active, or null
    expert_{l}                      list     experts of the token in layer l, logical ids in ``0 .. E-1``
    weight_{l}                      list     their combine weights, float16
    logits_{l}                      list     E router logits, float16 (only if asked for)
    gate_input_{l}                  list     what the router saw, float32 (only if asked for; null where not sampled)

Unused slots are not stored, and ``expert`` holds no assignment that a capacity limit dropped: the lists are then
shorter. Padding is not stored either. A layer that routes several times in a forward lists what it decided in its
iterations one after another, so that an expert may stand there once for each; logits and gate inputs are not stored.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from collegium.errors import TraceError
from collegium.files import atomic_file

__all__ = [
    "META",
    "PHASES",
    "SCHEMA_VERSION",
    "TOKEN_COLUMNS",
    "LayerMeta",
    "TraceMeta",
    "arrow_schema",
    "column_names",
    "read_meta",
    "write_meta",
]

SCHEMA_VERSION = 1
META = "meta.json"
PHASES = ("prefill", "decode", "verify")
"""Phases of inference: the prompt, one token at a time, and drafted tokens of speculative decoding."""

TOKEN_COLUMNS: dict[str, pa.DataType] = {
    "sequence": pa.uint32(),
    "document": pa.uint32(),
    "position": pa.uint32(),
    "token": pa.uint32(),
    "domain": pa.string(),
    "step": pa.uint32(),
    "phase": pa.string(),
    "request": pa.uint32(),
    "adapter": pa.string(),
}
"""Columns that describe the token, and their types."""

_META_LIMIT = 1 << 26  # bytes
_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


class LayerMeta(BaseModel):
    """One MoE layer of the traced model.

    Attributes:
        layer: index of the decoder layer.
        path: module path.
        num_experts: E.
        top_k: K, the nominal slots of a token, those of all iterations together.
        score: score function.
        iterations: how often the layer routes in a forward; not written where it is 1, as most layers do.
    """

    model_config = _STRICT

    layer: int = Field(ge=0)
    path: str
    num_experts: int = Field(ge=1, le=1 << 16)
    top_k: int = Field(ge=1, le=1 << 16)
    score: str
    iterations: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _even(self) -> LayerMeta:
        if self.top_k % self.iterations:
            raise ValueError(f"top_k {self.top_k} must be a multiple of the {self.iterations} iterations")
        return self

    @model_serializer(mode="wrap")
    def _written(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # readers from before there were iterations refuse a field they do not know, and should where it matters only
        body: dict[str, Any] = fields(self)
        if self.iterations == 1:
            body.pop("iterations", None)
        return body


class TraceMeta(BaseModel):
    """What was traced and how.

    Attributes:
        model: name of the model, as a rule its folder.
        fingerprint: identity of the checkpoint, or None if it was not one.
        family: model_type.
        tokenizer: hash of the tokenizer, or None.
        data: what the tokens came from and how they were cut, in words.
        domains: names that the domain column may hold.
        columns: every column of the parts, in order.
        ids: expert ids are logical: before any placement or replication.
        created: ISO 8601, UTC.
        collegium: version that wrote the trace.
        complete: False while a run goes on, and for ever if it was cut short.
        tokens, parts: how many there are, once complete.
    """

    model_config = _STRICT

    schema_version: Literal[1] = 1
    model: str
    fingerprint: str | None = None
    family: str
    layers: tuple[LayerMeta, ...] = Field(min_length=1, strict=False)
    tokenizer: str | None = None
    data: str
    domains: tuple[str, ...] = Field(min_length=1, strict=False)
    columns: tuple[str, ...] = Field(strict=False)
    ids: Literal["logical"] = "logical"
    created: str
    collegium: str
    complete: bool = False
    tokens: int | None = Field(default=None, ge=0)
    parts: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> TraceMeta:
        numbers = [layer.layer for layer in self.layers]
        if numbers != sorted(set(numbers)):
            raise ValueError(f"layers {numbers} must ascend without repeats")
        if len(set(self.domains)) != len(self.domains):
            raise ValueError(f"domains {self.domains} repeat a name")
        asked = {"logits": self.has("logits"), "gate_inputs": self.has("gate_input"), "dropped": self.has("dropped")}
        if self.columns != column_names(numbers, **asked):
            raise ValueError(f"columns {self.columns} do not fit the layers {numbers}")
        several = [layer.layer for layer in self.layers if layer.iterations > 1]
        if several and (self.has("logits") or self.has("gate_input")):
            raise ValueError(f"layers {several} have several iterations, whose logits and gate inputs are not stored")
        if self.complete and (self.tokens is None or self.parts is None):
            raise ValueError("a complete trace must say how many tokens and parts it has")
        return self

    def has(self, kind: Literal["logits", "gate_input", "dropped"]) -> bool:
        """Whether that optional column is there for every layer."""
        return any(name.startswith(f"{kind}_") for name in self.columns)

    def need_one_routing(self, reader: str) -> None:
        """Refuse layers that route several times, in the name of a reader that takes a token's experts for a set.

        Raises:
            TraceError: names the reader and the layer.
        """
        for entry in self.layers:
            if entry.iterations > 1:
                raise TraceError(
                    f"{reader} reads one routing of a layer, and layer {entry.layer} of this trace routes "
                    f"{entry.iterations} times for a token; it has no answer for such a model"
                )

    def layer(self, layer: int) -> LayerMeta:
        """The entry of decoder layer `layer`.

        Raises:
            TraceError: it is not among the traced layers; they are listed.
        """
        for entry in self.layers:
            if entry.layer == layer:
                return entry
        raise TraceError(f"layer {layer} is not in this trace; its layers are {[entry.layer for entry in self.layers]}")


def column_names(layers: list[int], *, logits: bool, gate_inputs: bool, dropped: bool = False) -> tuple[str, ...]:
    """Every column of a trace of these layers, in order."""
    optional = {"dropped": dropped, "logits": logits, "gate_input": gate_inputs}
    kinds = ["expert", "weight", *(kind for kind, wanted in optional.items() if wanted)]
    return (*TOKEN_COLUMNS, *(f"{kind}_{layer}" for layer in layers for kind in kinds))


def arrow_schema(meta: TraceMeta) -> pa.Schema:
    """The exact Arrow schema of every part."""
    fields = [pa.field(name, kind, nullable=name == "adapter") for name, kind in TOKEN_COLUMNS.items()]
    id_types = {str(entry.layer): _smallest(entry.num_experts) for entry in meta.layers}
    for name in meta.columns[len(TOKEN_COLUMNS) :]:
        kind, _, layer = name.rpartition("_")
        ids = id_types[layer]
        element = {"expert": ids, "dropped": ids, "gate_input": pa.float32()}.get(kind, pa.float16())
        items = pa.list_(pa.field("element", element, nullable=False))
        fields.append(pa.field(name, items, nullable=kind == "gate_input"))
    return pa.schema(fields)


def _smallest(num_experts: int) -> pa.DataType:
    return pa.uint8() if num_experts <= 1 << 8 else pa.uint16()


def write_meta(folder: Path, meta: TraceMeta) -> None:
    """Write ``meta.json`` atomically. Raises StorageError."""
    body = meta.model_dump(mode="json")
    with atomic_file(folder / META) as partial:
        partial.write_text(json.dumps({**body, "checksum": _checksum(body)}, indent=1), encoding="utf-8")


def read_meta(folder: Path) -> TraceMeta:
    """Read and check ``meta.json``.

    Raises:
        TraceError: it is missing, damaged, of another schema version, or a field is wrong; the field is named.
    """
    path = folder / META
    if not path.is_file():
        raise TraceError(f"{folder} is not a trace: it has no {META}")
    try:
        if path.stat().st_size > _META_LIMIT:
            raise TraceError(f"{path} is over the limit of {_META_LIMIT} bytes")
        body: Any = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TraceError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(body, dict):
        raise TraceError(f"{path} must be a JSON object")
    version = body.get("schema_version")
    if version != SCHEMA_VERSION:
        raise TraceError(f"{path}: schema_version is {version!r}; this collegium reads version {SCHEMA_VERSION}")
    checksum = body.pop("checksum", None)
    try:
        meta = TraceMeta.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "meta"
        raise TraceError(f"{path}: field {field!r}: {first['msg']}") from error
    if checksum != _checksum(body):
        raise TraceError(f"{path}: field 'checksum': the file was changed after it was written")
    return meta


def _checksum(body: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"
