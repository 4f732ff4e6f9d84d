"""`Statistics`: what a pass over a model learnt about each expert, as named tensors of each layer.

Everything is a sum or a count (or a largest value, or a sample that does not depend on the order), never a mean, so
that passes over other texts, on other machines, can be added. On disk it is a folder:

    statistics.json          `StatisticsMeta` and a checksum over it
    statistics.safetensors   tensors "<layer>.<name>"

Legend: L layers, E experts of a layer, C domains, d model width, f expert width, R rows of a sample.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from collegium.errors import ConfigError, StatisticsError
from collegium.files import atomic_dir

__all__ = ["Coverage", "Entry", "LayerEntry", "Statistics", "StatisticsMeta", "lowest"]

SCHEMA_VERSION = 1
META, TENSORS = "statistics.json", "statistics.safetensors"
STARVED = 32
"""An expert with fewer tokens is starved: its means say little."""

_META_LIMIT = 1 << 24  # bytes
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "int64": torch.int64}
_GOES_WITH = {"where": "max", "rows": "lowest"}
"""How a statistic is merged that follows another -> how that other is."""
_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


class LayerEntry(BaseModel):
    """One MoE layer: index of the decoder layer, module path, E, K, d and f (0 where counts were imported without the
    model)."""

    model_config = _STRICT

    layer: int = Field(ge=0)
    path: str
    num_experts: int = Field(ge=1, le=1 << 16)
    top_k: int = Field(ge=1, le=1 << 16)
    hidden_size: int = Field(ge=0)
    intermediate_size: int = Field(ge=0)


class Entry(BaseModel):
    """One statistic.

    Attributes:
        name: of the tensors, such as "down_max".
        collector: which collector made it.
        axes: of one domain's tensor: "E", "d" and "f" stand for the layer's sizes, "R" for the rows of a sample, at
            most as many as the collector's setting ``rows``.
        dtype: sums are float64, counts int64, samples float32.
        merge: how two passes are added: "sum"; "max"; "where", which takes the rows (first axis) of the pass whose
            statistic `of` is larger there; "lowest", the R smallest distinct keys ``[R]``, ascending; or "rows", the
            rows that belong to the keys `of`. A sample by keys does not depend on how passes are cut or ordered.
        of: for "where" the name of a "max" statistic, for "rows" that of a "lowest" one.
        by_domain: the tensor has one more axis in front, over the domains; only for "sum".
    """

    model_config = _STRICT

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    collector: str
    axes: tuple[Literal["E", "d", "f", "R"] | int, ...] = Field(strict=False)
    dtype: Literal["float64", "float32", "int64"] = "float64"
    merge: Literal["sum", "max", "where", "lowest", "rows"] = "sum"
    of: str | None = None
    by_domain: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Entry:
        if (self.merge in _GOES_WITH) != (self.of is not None):
            raise ValueError(f"statistic {self.name!r}: 'of' belongs to merge 'where' and 'rows', and to them only")
        sampled = self.axes[:1] == ("R",) and "R" not in self.axes[1:]
        if sampled != (self.merge in ("lowest", "rows")) or ("R" in self.axes) != sampled:
            raise ValueError(f"statistic {self.name!r}: the first axis of a sample is 'R', and of a sample only")
        if self.merge == "lowest" and (len(self.axes) > 1 or self.dtype != "int64"):
            raise ValueError(f"statistic {self.name!r}: keys are int64 [R]")
        if self.by_domain and self.merge != "sum":
            raise ValueError(f"statistic {self.name!r}: only sums can be kept by domain")
        return self

    def shape(self, layer: LayerEntry, domains: int, rows: int = 0) -> tuple[int, ...]:
        """Of the tensor of `layer`, where a sample has so many `rows`."""
        sizes = {"E": layer.num_experts, "d": layer.hidden_size, "f": layer.intermediate_size, "R": rows}
        axes = tuple(axis if isinstance(axis, int) else sizes[axis] for axis in self.axes)
        return (domains, *axes) if self.by_domain else axes


class StatisticsMeta(BaseModel):
    """What was measured, on what, and how.

    Attributes:
        model: name of the model.
        fingerprint: identity of the checkpoint, or None if it was not one.
        tokenizer: that of the tokenizer which made the tokens, or None if it is not known.
        family: model_type.
        num_layers: decoder layers of the model, dense ones included.
        layers: its MoE layers, ascending.
        data: what the tokens came from, in words, one entry a pass.
        domains: names along the domain axis.
        tokens: how many were seen, padding left out; 0 where imported counts do not tell.
        statistics: every statistic; each layer has a tensor for each.
        collectors: the settings of each collector.
        created: ISO 8601, UTC.
        collegium: version that wrote it.
    """

    model_config = _STRICT

    schema_version: Literal[1] = 1
    model: str
    fingerprint: str | None = None
    tokenizer: str | None = None
    family: str
    num_layers: int = Field(ge=1)
    layers: tuple[LayerEntry, ...] = Field(min_length=1, strict=False)
    data: tuple[str, ...] = Field(strict=False)
    domains: tuple[str, ...] = Field(min_length=1, strict=False)
    tokens: int = Field(ge=0)
    statistics: tuple[Entry, ...] = Field(min_length=1, strict=False)
    collectors: dict[str, dict[str, Any]]
    created: str
    collegium: str

    @model_validator(mode="after")
    def _consistent(self) -> StatisticsMeta:
        numbers = [layer.layer for layer in self.layers]
        if numbers != sorted(set(numbers)) or numbers[-1] >= self.num_layers:
            raise ValueError(f"layers {numbers} must ascend without repeats, below num_layers {self.num_layers}")
        if len(set(self.domains)) != len(self.domains):
            raise ValueError(f"domains {self.domains} repeat a name")
        kinds = {entry.name: entry.merge for entry in self.statistics}
        if len(kinds) != len(self.statistics):
            raise ValueError("two statistics have one name")
        for entry in self.statistics:
            if entry.of is not None and kinds.get(entry.of) != _GOES_WITH[entry.merge]:
                raise ValueError(
                    f"statistic {entry.name!r} of merge {entry.merge!r} goes with {entry.of!r}, whose merge is not "
                    f"{_GOES_WITH[entry.merge]!r}"
                )
            if entry.collector not in self.collectors:
                raise ValueError(f"statistic {entry.name!r} is of collector {entry.collector!r}, which is not listed")
            if "R" in entry.axes and self.rows(entry) < 1:
                raise ValueError(
                    f"statistic {entry.name!r} is a sample; its collector needs a setting rows, at least 1"
                )
        return self

    def rows(self, entry: Entry) -> int:
        """How many rows a sample has at most; 0 for what is none."""
        found = self.collectors[entry.collector].get("rows")
        return found if "R" in entry.axes and type(found) is int else 0


@dataclass(frozen=True, eq=False)
class Coverage:
    """How many tokens one layer's experts saw. `tokens` is ``[E]`` int64, `starved` the ids below the minimum."""

    layer: int
    tokens: Tensor
    starved: tuple[int, ...]


class Statistics:
    """The statistics of every MoE layer of a model.

    Attributes:
        meta: what was measured, on what, and how.
        tensors: ``(layer, name) -> tensor``, on the CPU.

    Raises:
        StatisticsError: a tensor is missing, too many, or not of the shape and dtype its meta asks for, or holds NaN or
            infinity.
    """

    def __init__(self, meta: StatisticsMeta, tensors: Mapping[tuple[int, str], Tensor]) -> None:
        self.meta, self.tensors = meta, dict(tensors)
        wanted = {(layer.layer, entry.name) for layer in meta.layers for entry in meta.statistics}
        odd = sorted(wanted ^ self.tensors.keys())
        if odd:
            state = "is missing" if odd[0] in wanted else "is not in the meta"
            raise StatisticsError(f"statistic {odd[0][1]!r} of layer {odd[0][0]} {state}")
        for layer, entry in self._entries():
            tensor = self.tensors[layer.layer, entry.name]
            shape = entry.shape(layer, len(meta.domains), self._rows(layer, entry))
            where = f"statistic {entry.name!r} of layer {layer.layer}"
            if tuple(tensor.shape) != shape or tensor.dtype != _DTYPES[entry.dtype]:
                raise StatisticsError(
                    f"{where} is {tensor.dtype} {list(tensor.shape)}, not {entry.dtype} {list(shape)}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise StatisticsError(f"{where} holds NaN or infinity")

    def _rows(self, layer: LayerEntry, entry: Entry) -> int:
        """How many rows the sample of `entry` should have: those of its keys, where that is not too many."""
        keys = self.tensors[layer.layer, entry.of or entry.name]
        return min(keys.numel(), self.meta.rows(entry))

    def _entries(self) -> Iterator[tuple[LayerEntry, Entry]]:
        return ((layer, entry) for layer in self.meta.layers for entry in self.meta.statistics)

    @property
    def layers(self) -> list[int]:
        """Decoder layers with statistics."""
        return [layer.layer for layer in self.meta.layers]

    def get(self, layer: int, name: str, domain: str | None = None) -> Tensor:
        """One statistic of one layer: of one domain, or (None) the sum over them.

        Raises:
            ConfigError: there is no such layer, statistic or domain, or it was not kept by domain.
        """
        entry = next((entry for entry in self.meta.statistics if entry.name == name), None)
        if entry is None or (layer, name) not in self.tensors:
            names = ", ".join(entry.name for entry in self.meta.statistics)
            raise ConfigError(f"no statistic {name!r} of layer {layer}; there are {names} of layers {self.layers}")
        tensor = self.tensors[layer, name]
        if domain is None:
            return tensor.sum(0) if entry.by_domain else tensor
        if not entry.by_domain or domain not in self.meta.domains:
            raise ConfigError(
                f"statistic {name!r} of domain {domain!r}: it is {'' if entry.by_domain else 'not '}kept by domain, "
                f"and the domains are {', '.join(self.meta.domains)}"
            )
        return tensor[self.meta.domains.index(domain)]

    def coverage(self, minimum: int = STARVED) -> list[Coverage]:
        """How many tokens each expert saw, layer by layer; those with fewer than `minimum` are listed as starved."""
        found = []
        for layer in self.layers:
            tokens = self.get(layer, "n")
            found.append(Coverage(layer, tokens, tuple((tokens < minimum).nonzero().flatten().tolist())))
        return found

    def add(self, other: Statistics) -> Statistics:
        """Both passes as one; neither is changed. Domains are joined by name.

        Raises:
            ConfigError: they are of different models, or of different collectors or settings.
        """
        for field in (
            "model",
            "fingerprint",
            "tokenizer",
            "family",
            "num_layers",
            "layers",
            "statistics",
            "collectors",
        ):
            mine, theirs = getattr(self.meta, field), getattr(other.meta, field)
            # without a fingerprint the name must do; with one the folder may have moved
            if mine != theirs and not (field == "model" and self.meta.fingerprint is not None):
                raise ConfigError(f"cannot add statistics whose {field} differs: {_short(mine)} and {_short(theirs)}")
        domains = tuple(dict.fromkeys((*self.meta.domains, *other.meta.domains)))
        tensors = {
            (layer.layer, entry.name): self._merged(other, layer.layer, entry, domains)
            for layer, entry in self._entries()
        }
        added = {
            "domains": domains,
            "tokens": self.meta.tokens + other.meta.tokens,
            "data": (*self.meta.data, *other.meta.data),
        }
        return Statistics(self.meta.model_copy(update=added), tensors)

    def _merged(self, other: Statistics, layer: int, entry: Entry, domains: tuple[str, ...]) -> Tensor:
        """One statistic of one layer, of both passes."""
        a, b = self.tensors[layer, entry.name], other.tensors[layer, entry.name]
        if entry.by_domain:
            a, b = _spread(a, self.meta.domains, domains), _spread(b, other.meta.domains, domains)
        if entry.merge == "sum":
            return a + b
        if entry.merge == "max":
            return torch.maximum(a, b)
        mine, theirs = (one.tensors[layer, entry.of or entry.name] for one in (self, other))
        if entry.merge == "where":
            return torch.where((theirs > mine).view(-1, *[1] * (a.dim() - 1)), b, a)
        return torch.cat([a, b])[lowest(torch.cat([mine, theirs]), self.meta.rows(entry))]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the statistics to `folder` as a whole.

        Raises:
            ConfigError: `folder` holds something else, which would be replaced.
            StorageError: a file could not be written; what was in `folder` is untouched.
        """
        folder = Path(folder)
        if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / META).is_file())):
            raise ConfigError(
                f"{folder} exists and holds no statistics; writing there would replace it. Choose another"
            )
        with atomic_dir(folder) as partial:
            tensors = {f"{layer}.{name}": tensor.contiguous() for (layer, name), tensor in self.tensors.items()}
            save_file(tensors, partial / TENSORS)
            body = self.meta.model_dump(mode="json")
            body["checksum"] = _checksum(body, partial / TENSORS)
            (partial / META).write_text(json.dumps(body, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Statistics:
        """Read what `save` wrote. Nothing in the folder is trusted.

        Raises:
            StatisticsError: there are no statistics, or they are damaged or of another schema; the field is named.
        """
        folder = Path(folder)
        meta, checksum = _read_meta(folder / META)
        path = folder / TENSORS
        if not path.is_file():
            raise StatisticsError(f"{folder} has no {TENSORS}")
        try:
            if checksum != _checksum(meta.model_dump(mode="json"), path):
                raise StatisticsError(f"{folder}: field 'checksum' does not fit the files; they are damaged or changed")
            with safe_open(path, framework="pt") as file:
                tensors = {_key(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            return cls(meta, tensors)
        except StatisticsError as error:
            raise StatisticsError(f"{folder}: {error}") from error
        except Exception as error:  # foreign bytes; what their parser raises is not ours to list
            raise StatisticsError(f"{path} is not readable: {error}") from error


def lowest(keys: Tensor, rows: int) -> Tensor:
    """``[R]`` places of the smallest distinct values of ``keys [N]``, ascending, at most `rows` of them."""
    ordered, place = keys.sort(stable=True)
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[1:] = ordered[1:] != ordered[:-1]
    return place[fresh][:rows]


def _spread(tensor: Tensor, names: tuple[str, ...], domains: tuple[str, ...]) -> Tensor:
    """`tensor` over `names`, over `domains` with zeros where a name is new."""
    wide = tensor.new_zeros(len(domains), *tensor.shape[1:])
    wide[[domains.index(name) for name in names]] = tensor
    return wide


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _key(name: str) -> tuple[int, str]:
    layer, _, statistic = name.partition(".")
    if not layer.isdecimal():
        raise StatisticsError(f"tensor {name!r} is named after no layer")
    return int(layer), statistic


def _checksum(body: dict[str, Any], tensors: Path) -> str:
    value = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    with open(tensors, "rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def _read_meta(path: Path) -> tuple[StatisticsMeta, Any]:
    """``(meta, checksum as stored)``."""
    if not path.is_file():
        raise StatisticsError(f"{path.parent} holds no statistics: it has no {META}")
    try:
        if path.stat().st_size > _META_LIMIT:
            raise StatisticsError(f"{path} is over the limit of {_META_LIMIT} bytes")
        body: Any = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StatisticsError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(body, dict):
        raise StatisticsError(f"{path} must be a JSON object")
    if body.get("schema_version") != SCHEMA_VERSION:
        raise StatisticsError(
            f"{path}: schema_version is {body.get('schema_version')!r}; this collegium reads version {SCHEMA_VERSION}"
        )
    checksum = body.pop("checksum", None)
    try:
        return StatisticsMeta.model_validate(body), checksum
    except ValidationError as error:
        first = error.errors()[0]
        raise StatisticsError(
            f"{path}: field {'.'.join(map(str, first['loc'])) or 'meta'!r}: {first['msg']}"
        ) from error
