"""`load_offloaded`: a transformers model that computes its experts from a store, in a number of bytes that is kept.

The model is the plain one of its family: attention, routers, cache, templates and ``generate`` are transformers' own.
Its experts modules are there without weights, and their forward is the engine's, by way of transformers' own registry
of experts implementations.

Legend: T tokens of a pass, L MoE layers, K slots of a token, d model width, u rows of an expert's first matrix.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from collegium.errors import CheckpointError, ConfigError, NonFiniteError, UnsupportedFamilyError
from collegium.experts.loose import FUSED
from collegium.layerwise import LayerwiseModel
from collegium.models.attention import use_lean_attention
from collegium.offload.arithmetic import Kind
from collegium.offload.budget import Budget, parse_bytes, share_slots
from collegium.offload.embedding import close_rows, leave_on_disk, stored_embedding
from collegium.offload.engine import Engine, Watcher
from collegium.offload.fused import fuse_layers, fuse_routers
from collegium.offload.geometry import Geometry
from collegium.offload.linear import hold_in_8_bits, stream_linears
from collegium.offload.measuring import measure, trim
from collegium.offload.norm import fuse_norms
from collegium.offload.policies import PolicySettings
from collegium.offload.policies.lfu import LFU
from collegium.offload.pool import Done, Pool
from collegium.offload.precision.base import PrecisionSettings
from collegium.offload.precision.fixed import Fixed
from collegium.offload.precision.table import Table
from collegium.offload.predictors.base import Predictor
from collegium.offload.prefetch import Prefetch
from collegium.offload.slots import SlotPool
from collegium.offload.store import ExpertSource, ReadQueue, open_source
from collegium.process import resident_memory
from collegium.routing import Routing
from collegium.routing.scores import Sigmoid, Softmax
from collegium.sites import Site, sites, tap

__all__ = ["CHUNK", "NAME", "Offloaded", "Settings", "load_offloaded"]

NAME = "collegium-offload"
"""Of the experts implementation."""

CHUNK = 512
"""Tokens of a prompt that go through the model at once; longer prompts go in several passes."""

_CACHE_BLOCK = 256
_PROBE, _ALIKE = 16, 0.95
"""Tokens that a model is compared on before and after rounding, and the least cosine of its logits."""
_ENGINE = "_collegium_engine"
_PART = 1 << 20  # numbers that are looked at together


@dataclass(frozen=True)
class Settings:
    """How a model is to run.

    Attributes:
        memory: bytes that the whole process may hold; None is no limit.
        experts: slots for experts there may be at most; None is as many as the memory gives.
        sequences: that run together.
        policy, precision: of the cache.
        predictor: what is read ahead; None for demand only. Fitted by the caller.
        prefetch: how far ahead.
        kind: of arithmetic, see `Kind`.
        dense_bits: 8 holds matrices besides the experts in 8 bits; None as they are.
        readers: threads that read.
        chunk: see `CHUNK`.
    """

    memory: int | None = None
    experts: int | None = None
    sequences: int = 1
    policy: PolicySettings = field(default_factory=LFU)
    precision: PrecisionSettings = field(default_factory=Fixed)
    predictor: Callable[[Any, Geometry], Predictor] | None = None
    prefetch: Prefetch = field(default_factory=Prefetch)
    kind: Kind = "fast"
    dense_bits: int | None = None
    readers: int = 3
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        for name in ("experts", "sequences", "readers", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.kind not in get_args(Kind):
            raise ConfigError(f"experts are computed {', '.join(get_args(Kind))}, not {self.kind!r}")
        if self.dense_bits not in (None, 8):
            raise ConfigError(
                f"weights besides the experts are held in 8 bits or as they are, not in {self.dense_bits}"
            )
        self.prefetch.for_one_processor()
        if self.dense_bits is not None and self.kind == "exact":
            raise ConfigError("exact arithmetic takes all weights as they are; leave dense_bits out")


class Offloaded:
    """A model whose experts are read as they are needed.

    Attributes:
        model: of transformers, in eval mode; ``generate`` works.
        engine: what computes its experts.
        budget: what the memory was planned for.
        source: where experts are read from.
        context, chunk: as planned.
    """

    def __init__(
        self,
        model: Any,
        engine: Engine,
        budget: Budget,
        source: ExpertSource,
        context: int,
        chunk: int,
        taps: ExitStack,
    ) -> None:
        self.model, self.engine, self.budget, self.source = model, engine, budget, source
        self.context, self.chunk = context, chunk
        self._taps = taps

    def counters(self) -> dict[str, float]:
        """See `Engine.counters`."""
        return self.engine.counters()

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """See `Engine.watch`."""
        return self.engine.watch(watcher)

    def close(self) -> None:
        """End the reader threads and let go of the files. The model cannot run any more."""
        self._taps.close()
        self.engine.close()
        close_rows(self.model)

    def __enter__(self) -> Offloaded:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def load_offloaded(
    path: str | Path,
    *,
    memory: int | str | None = None,
    context: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> Offloaded:
    """Open a store, or a plain model folder, to run with its experts on the disk.

    Args:
        path: written by `collegium.offload.store.pack`, or any Hugging Face MoE checkpoint in float32 or bfloat16.
        memory: bytes for the whole process, or text such as "6GiB"; None keeps every expert once it was read.
        context: tokens of a sequence, prompt included; None is the model's own length, at most 4096.
        say: told what goes on.
        settings: other fields of `Settings`.

    Raises:
        ConfigError: the memory is too little (the message has the smallest that works), or settings do not fit.
        CheckpointError, NotMoEError, UnsupportedFamilyError, NonFiniteError: the model cannot be used.
    """
    nbytes = parse_bytes(memory) if isinstance(memory, str) else memory
    source = open_source(path)
    try:
        return _load(source, Settings(memory=nbytes, **settings), context, say)
    except BaseException:
        source.close()
        raise


def _load(source: ExpertSource, settings: Settings, context: int | None, say: Callable[[str], None]) -> Offloaded:
    if settings.memory is not None and not resident_memory():
        raise ConfigError("a budget of memory is kept on Linux only, where a process can see what it holds")
    geometry = Geometry(
        experts=tuple(layer.num_experts for layer in source.layers),
        top_k=tuple(layer.top_k for layer in source.layers),
        layers=tuple(layer.layer for layer in source.layers),
    )
    asked = settings.precision
    if isinstance(asked, Table):  # a plan of another model is refused
        asked = replace(asked, fingerprint=source.fingerprint)
    precision = asked.build(geometry, tuple(sorted(source.layers[0].layouts, reverse=True)))
    layerwise = LayerwiseModel(source.checkpoint)
    rows = None if settings.memory is None else stored_embedding(layerwise)
    _refuse_hopeless(layerwise, source, settings, rows)
    kept = "" if rows is None else ", but for token embeddings, whose rows are read as they are needed"
    say(f"reading the weights besides the experts{kept}")
    model, found = _build(layerwise, source, rows)
    if settings.dense_bits is not None:
        _round_dense(model, found, settings)
    if settings.kind != "exact":
        stream_linears(model)
        use_lean_attention(model)
        fuse_norms(model)
        count = fuse_layers(model, layerwise.layers)
        say(f"{count} of {len(layerwise.layers)} decoder layers take a token in two launches")
        fuse_routers(found)
    trim()
    context = _context(model, context)
    chunk = min(settings.chunk, context)
    say("measuring what a pass takes")
    weights = sum(tensor.nbytes for tensor in _unique(model))
    room = -(-context // _CACHE_BLOCK) * _CACHE_BLOCK  # a cache grows by blocks
    needs = measure(model, found, source, precision, settings.kind, chunk)
    growing = needs.cache_token * room / len(layerwise.layers)  # while it grows, one of its layers is there twice
    budget = share_slots(
        settings.memory,
        process=max(needs.resident - weights, 0),
        weights=weights,
        cache=int(settings.sequences * (needs.cache_start + needs.cache_token * room) + growing),
        working=needs.working + settings.readers * source.scratch_nbytes,
        slot={bits: SlotPool.slot_bytes(_sizes(source, bits)) for bits in precision.used_bits},
        most=geometry.total if settings.experts is None else min(settings.experts, geometry.total),
        least=max(geometry.num_layers, max(geometry.top_k)),
    )
    reader = ReadQueue(source, settings.readers)
    done: Done = queue.SimpleQueue()
    pools = [
        Pool(geometry, bits, _sizes(source, bits), settings.policy.build(geometry, count), reader, done)
        for bits, count in budget.slots.items()
    ]
    predictor = None if settings.predictor is None else settings.predictor(model, geometry)
    engine = Engine(geometry, source, reader, pools, done, precision, predictor, settings.prefetch, kind=settings.kind)
    taps = _connect(model, found, engine)
    return Offloaded(model, engine, budget, source, context, chunk, taps)


def _sizes(source: ExpertSource, bits: int) -> list[int]:
    return [layer.layouts[bits].nbytes for layer in source.layers]


def _refuse_hopeless(layerwise: LayerwiseModel, source: ExpertSource, settings: Settings, rows: str | None) -> None:
    """Before the weights are read that would not fit themselves, so that no exact number can be measured."""
    there = {name: info for name, info in source.checkpoint.tensors.items() if name not in source.expert_tensors}
    weights = sum(info.nbytes for name, info in there.items() if rows is None or layerwise.targets.get(name) != rows)
    if settings.memory is not None and weights > settings.memory:
        least = weights // (1 if settings.dense_bits is None else 2) + resident_memory()
        advice = "" if settings.dense_bits else "; dense_bits=8 (--dense-bits 8) halves them once they are read"
        raise ConfigError(
            f"{settings.memory / 2**30:.2f} GiB is too little even to read the weights besides the experts, "
            f"{weights / 2**30:.2f} GiB{advice}; no less than {-(-max(least, weights) // 2**20)}MiB can work"
        )


def _context(model: Any, asked: int | None) -> int:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    if asked is not None and not 1 <= asked <= longest:
        raise ConfigError(f"a context of {asked} tokens; this model takes 1 to {longest}")
    return min(longest, 4096) if asked is None else asked


@torch.inference_mode()
def _round_dense(model: Any, found: list[Site], settings: Settings) -> None:
    """Hold matrices besides experts and routers in 8 bits, and make sure that the model still computes the same: some
    families take a weight itself instead of calling its module."""
    ids = torch.arange(_PROBE)[None] % model.get_input_embeddings().num_embeddings
    before = model(input_ids=ids).logits.float()
    hold_in_8_bits(model, "int8" if settings.kind == "fast" else "float32", but=[site.gate for site in found])
    try:
        alike = float(torch.nn.functional.cosine_similarity(before, model(input_ids=ids).logits.float(), -1).median())
        reason = None if alike > _ALIKE else f"logits agree to {alike:.3f} only"
    except AttributeError as error:
        reason = str(error)
    if reason is not None:
        raise UnsupportedFamilyError(
            f"the weights of family {found[0].family!r} cannot be held in 8 bits ({reason}); leave dense_bits out"
        )


# ---- the model without its experts -----------------------------------------------------------------------------------


def _build(layerwise: LayerwiseModel, source: ExpertSource, rows: str | None) -> tuple[Any, list[Site]]:
    """The model with its weights besides the experts, whose modules compute zeros; and its sites, as the source has.

    Args:
        rows: the parameter of token embeddings that are to stay on the disk.
    """
    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_forward)
    model = layerwise.model
    by_path = {site.path: site for site in sites(model)}
    missing = [layer.path for layer in source.layers if layer.path not in by_path]
    if missing or len(by_path) != len(source.layers):
        raise CheckpointError(f"{source.checkpoint.folder}: its MoE blocks are not those of the store: {missing[:4]}")
    found = [by_path[layer.path] for layer in source.layers]
    names = {module: path for path, module in model.named_modules()}
    fused = [f"{names[site.experts]}.{name}" for site in found for name in FUSED if hasattr(site.experts, name)]
    layerwise.fill(*fused, *([] if rows is None else [rows]))
    if rows is not None:
        leave_on_disk(layerwise, rows)
    _drop_pages(source)
    for site in found:
        experts: Any = site.experts
        experts.config._experts_implementation = NAME
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta and name not in fused:
            raise CheckpointError(f"{source.checkpoint.folder}: {name!r} is not in the checkpoint")
        if not tensor.is_meta and tensor.is_floating_point() and not _finite(tensor):
            raise NonFiniteError(f"{source.checkpoint.folder}: {name!r} holds NaN or infinity")
    if (source.checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.checkpoint.folder, local_files_only=True)
    return model, found


def _finite(tensor: Tensor) -> bool:
    """Part by part: of an output layer the intermediate results would be hundreds of megabytes."""
    return all(bool(torch.isfinite(part).all()) for part in tensor.flatten().split(_PART))


def _drop_pages(source: ExpertSource) -> None:
    """What was read of the weight files has been copied; in the page cache it would count against the budget."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in {info.file for info in source.checkpoint.tensors.values()}:
        handle = os.open(source.checkpoint.folder / file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _unique(model: nn.Module) -> list[Tensor]:
    tensors = [*model.parameters(), *model.buffers()]
    return list({tensor.data_ptr(): tensor for tensor in tensors if not tensor.is_meta}.values())


def _experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of an experts module's own forward."""
    connected = module.__dict__.get(_ENGINE)
    if connected is None:  # while the passes are measured that experts have no part in
        return torch.zeros_like(hidden_states)
    engine, layer = connected
    return engine.run(layer, module, hidden_states, top_k_index, top_k_weights)


def _connect(model: Any, found: list[Site], engine: Engine) -> ExitStack:
    """Let the model call the engine; what must be closed with it."""

    def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            engine.new_sequence()
        engine.begin(torch.empty(0).numpy() if ids is None else ids.reshape(-1).numpy())

    model.register_forward_pre_hook(start, with_kwargs=True)
    for layer, site in enumerate(found):
        setattr(site.experts, _ENGINE, (engine, layer))
    inputs, probabilities = engine.sees_gates
    taps = ExitStack()
    if inputs or probabilities:
        taps.enter_context(tap(model, _Gates(engine), logits=probabilities))
    return taps


class _Gates:
    """A tap that tells the engine what routers saw and how likely each expert was. Of scores that are unknown here it
    tells no probabilities."""

    view = "gate"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, site: Site, x: Tensor, routing: Routing) -> None:
        score = _SCORES.get(site.score) if routing.logits is not None else None
        self._engine.see_gate(x, None if score is None else score(routing.logits.float()))  # type: ignore[union-attr]


_SCORES = {"softmax": Softmax(), "sigmoid": Sigmoid()}
