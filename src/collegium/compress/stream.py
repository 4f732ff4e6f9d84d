"""`calibrate`: statistics of a checkpoint whose model need not fit in memory.

The calibration tokens go through one decoder layer after the other: only that layer's weights are in memory, and the
hidden states of all tokens wait on disk between layers. What a layer is called with (masks, rotary tables, positions)
is what the model's own forward calls it with: each forward runs the whole model, in which the layers before this one
hand on what they get and the run ends behind it.

Legend: B sequences, S positions of a batch, d model width.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from collegium._version import __version__
from collegium.compress.stream_store import PartialRun
from collegium.compress.stream_weights import LayerwiseModel
from collegium.errors import CheckpointError, ConfigError, DataError, UnsupportedFamilyError
from collegium.measure.collect import Collector, Counts, Feed, SiteCollection, batch_columns, statistics_meta
from collegium.measure.residual import Residuals
from collegium.measure.statistics import META, Statistics
from collegium.models.checkpoint import Checkpoint, open_checkpoint
from collegium.sites import sites, tap
from collegium.trace.run import Batch, batch_ids, batch_inputs

__all__ = ["Progress", "calibrate", "check_target"]

Progress = Callable[[int, int, float], None]
"""Called with the layers that are done, the layers in all, and the share of the present one that is done."""

_LAYER_INPUTS = frozenset({
    "hidden_states", "attention_mask", "position_ids", "position_embeddings", "past_key_values", "use_cache",
    "cache_position", "output_attentions", "output_router_logits", "conv_mask", "attention_scaling",
})  # fmt: skip
"""What a decoder layer may take: all of it comes from the token ids, masks and positions. Anything else could come from
an earlier layer, which does not run again."""


def calibrate(
    source: str | Path | Checkpoint,
    batches: Iterable[Batch],
    collectors: Sequence[Collector],
    out: str | Path,
    *,
    name: str | None = None,
    data: str = "unnamed",
    domains: Sequence[str] = ("unknown",),
    dtype: str | torch.dtype = "auto",
    max_tokens: int | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> Statistics:
    """Gather the statistics `collegium.measure.collect` would, with one decoder layer in memory at a time.

    On the CPU and in the same dtype the result is the same to the last bit, given the same batches and a model with
    ``experts_implementation="collegium"``. Until it is done, ``<out>.partial`` holds the hidden states that go into the
    present layer and those that come out of it (B * S * d numbers each) and the statistics so far; a run that was
    killed goes on from there with the layer it was at.

    Args:
        source: a Hugging Face model folder, not quantised.
        batches: as for `collect`; their tokens are kept in memory.
        collectors: what to gather; `Counts` is added.
        out: folder for the statistics.
        name: of the model; None means the folder's.
        data, domains, max_tokens: as for `collect`.
        dtype: of the weights: "auto" means the config's, else that of the weights.
        resume: go on with an unfinished run of the same settings and batches. False deletes it, and replaces
            statistics that are in `out`.

    Raises:
        ConfigError: `out` holds statistics already (and `resume` is set) or something else, or an unfinished run of
            other settings or batches; or a batch, a token id or the collectors do not fit.
        DataError: there is no token.
        NotMoEError, UnsupportedFamilyError: there is nothing to look at, or the family cannot be streamed.
        CheckpointError, NonFiniteError: weights are missing or damaged, or changed while they were read.
        StatisticsError: the unfinished run is damaged.
        StorageError: the disk is full; the unfinished run stays.
    """
    out = Path(out).absolute()
    check_target(out, resume=resume)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    fingerprint = checkpoint.fingerprint
    collectors = [Counts(), *(one for one in collectors if not isinstance(one, Counts))]
    streamed = LayerwiseModel(checkpoint, dtype)
    _check_layers(streamed)
    name = name or checkpoint.folder.resolve().name
    meta = statistics_meta(streamed.model, collectors, name, fingerprint, data, domains)
    parts = list(_parts(streamed, batches, len(domains), max_tokens))
    tokens = sum(int(part.columns["valid"].sum()) for part in parts)
    if not tokens:
        raise DataError("the calibration data holds no token")
    meta = meta.model_copy(update={"tokens": tokens})
    layers = [layer.layer for layer in meta.layers]
    run = {
        "fingerprint": fingerprint,
        "tokens": _digest(parts),
        "domains": list(domains),
        "collectors": meta.collectors,
        "dtype": str(streamed.dtype),
        "collegium": __version__,
    }
    store = PartialRun(out, run, layers, resume=resume)
    _Pass(streamed, store, parts, collectors, len(domains), progress).run()
    if open_checkpoint(checkpoint.folder).fingerprint != fingerprint:
        raise CheckpointError(f"{checkpoint.folder} changed while it was read; start again with --fresh")
    statistics = Statistics(meta, store.statistics(layers))
    statistics.save(out)
    store.remove()
    return statistics


@dataclass(frozen=True, eq=False)
class _Part:
    """One batch: what the model is called with, the columns of its tokens, and B and S."""

    inputs: dict[str, Any]
    columns: dict[str, Tensor]
    shape: tuple[int, int]


def _parts(
    streamed: LayerwiseModel, batches: Iterable[Batch], num_domains: int, max_tokens: int | None
) -> Iterator[_Part]:
    accepts = inspect.signature(streamed.model.forward).parameters
    seen = 0
    for batch in batches:
        if max_tokens is not None and seen >= max_tokens:
            return
        ids, mask = batch_ids(batch, torch.device("cpu"))
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < streamed.vocabulary:
            raise ConfigError(
                f"token ids go from {int(ids.min())} to {int(ids.max())}, the model has {streamed.vocabulary} tokens: "
                "tokenizer and model do not belong together"
            )
        columns = batch_columns(batch, ids, mask, num_domains)
        if max_tokens is not None:
            columns["valid"] &= columns["valid"].cumsum(0) <= max_tokens - seen
        seen += int(columns["valid"].sum())
        yield _Part(batch_inputs(ids, mask, batch, accepts), columns, (ids.shape[0], ids.shape[1]))


def _digest(parts: Sequence[_Part]) -> str:
    """Identity of the batches."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        for key, value in [*part.inputs.items(), *part.columns.items()]:
            digest.update(f"{key}\0{tuple(value.shape) if isinstance(value, Tensor) else value}\0".encode())
            if isinstance(value, Tensor):
                digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Pass:
    """One pass of the batches through the layers, from the one the store is at to the last with experts."""

    def __init__(
        self,
        streamed: LayerwiseModel,
        store: PartialRun,
        parts: Sequence[_Part],
        collectors: Sequence[Collector],
        num_domains: int,
        progress: Progress | None,
    ) -> None:
        self.streamed, self.store, self.parts = streamed, store, parts
        self.collectors, self.num_domains, self.progress = collectors, num_domains, progress
        self.forward = _Forward(streamed)
        self.sites = {site.layer: site for site in sites(streamed.model)}
        self.last = max(self.sites)

    def run(self) -> None:
        model = self.streamed.model
        needs = {need for one in self.collectors for need in one.needs}
        residuals = Residuals(model, self.sites.values()) if "residual" in needs else None
        feed = Feed({}, residuals)
        with self.forward.installed(), torch.no_grad():
            first = self.store.first
            if first is None:
                first = 0
                self._embed()
            with residuals or nullcontext(), tap(model, feed, logits="logits" in needs):
                for number in range(first, self.last + 1):
                    self._layer(number, feed)

    def _embed(self) -> None:
        with self.streamed.embedding_loaded(), self.store.write_hidden(0) as write:
            for part in self.parts:
                write(self.forward.embed(part))

    def _layer(self, number: int, feed: Feed) -> None:
        site = self.sites.get(number)
        shapes = [(*part.shape, self.forward.width) for part in self.parts]
        self._report(number, 0.0)
        with self.streamed.layer_loaded(number):
            collection = None if site is None else SiteCollection(site, self.collectors, self.num_domains)
            feed.collections = {} if site is None or collection is None else {site.path: collection}
            hidden = self.store.read_hidden(number, shapes, self.streamed.dtype)
            with nullcontext(_drop) if number == self.last else self.store.write_hidden(number + 1) as write:
                for count, (part, x) in enumerate(zip(self.parts, hidden, strict=True), 1):
                    feed.columns = part.columns
                    write(self.forward.layer(number, x, part))
                    self._report(number, count / len(self.parts))
            self.store.finish_layer(number, {} if collection is None else collection.finish())

    def _report(self, number: int, share: float) -> None:
        if self.progress is not None:
            self.progress(number, self.last + 1, share)


def _drop(hidden: Tensor) -> None:
    """What comes out of the last layer is not needed."""


class _Done(Exception):
    """Ends a forward behind the layer that was to run."""


class _Forward:
    """Runs the embeddings, or one decoder layer, the way the model's own forward does."""

    def __init__(self, streamed: LayerwiseModel) -> None:
        self.streamed = streamed
        self.width = streamed.model.config.get_text_config().hidden_size
        self._number: int | None = None
        self._shape: tuple[int, ...] = ()
        self._hidden: Tensor | None = None
        self._passed: Tensor | None = None
        self._output: Any = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the context the model's layers do what this object says."""
        modules = [self.streamed.embedding, *self.streamed.layers]
        self.streamed.embedding.forward = partial(self._at_embedding, self.streamed.embedding.forward)
        for number, layer in enumerate(self.streamed.layers):
            layer.forward = partial(self._at_layer, number, layer.forward)
        try:
            yield
        finally:
            for module in modules:
                del module.forward  # the class has its own

    def embed(self, part: _Part) -> Tensor:
        """``[B, S, d]`` what goes into layer 0. The embeddings must be loaded."""
        return self._run(None, None, part)

    def layer(self, number: int, hidden: Tensor, part: _Part) -> Tensor:
        """``[B, S, d]`` what comes out of a layer for ``hidden [B, S, d]``. It must be loaded."""
        return self._run(number, hidden, part)

    def _run(self, number: int | None, hidden: Tensor | None, part: _Part) -> Tensor:
        self._number, self._hidden, self._shape = number, hidden, (*part.shape, self.width)
        with suppress(_Done):
            self.streamed.model(**part.inputs)
        output, self._output, self._hidden, self._passed = self._output, None, None, None
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if shape != self._shape or output.dtype != self.streamed.dtype:
            where = "the embeddings" if number is None else f"layer {number}"
            raise self._refusal(
                f"what comes out of {where} is {getattr(output, 'dtype', None)} {shape}, not "
                f"{self.streamed.dtype} {self._shape}"
            )
        return output

    def _at_embedding(self, forward: Callable[..., Tensor], ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._number is None:
            return forward(ids, *args, **kwargs)
        # what the first layer gets is not used
        return torch.zeros(*ids.shape, self.streamed.embedding.weight.shape[1], dtype=self.streamed.dtype)

    def _at_layer(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if self._number is None:
            self._output = hidden
            raise _Done
        if number == 0:
            self._passed = hidden
        elif hidden is not self._passed:
            raise self._refusal(f"something happens to the hidden states between layers {number - 1} and {number}")
        if number < self._number:
            return hidden
        other = [key for key, value in kwargs.items() if key not in _LAYER_INPUTS and not _plain(value)]
        if other:
            raise self._refusal(f"its decoder layers are also given {', '.join(other)}")
        self._output = forward(self._hidden, *args[1:], **kwargs)
        raise _Done

    def _refusal(self, why: str) -> UnsupportedFamilyError:
        return _refusal(self.streamed, why)


def _refusal(streamed: LayerwiseModel, why: str) -> UnsupportedFamilyError:
    return UnsupportedFamilyError(
        f"family {streamed.family!r} cannot be streamed layer by layer: {why}; load the whole model and use "
        "collegium.measure.collect"
    )


def _plain(value: Any) -> bool:
    """Whether it is a setting, not something computed."""
    return value is None or isinstance(value, bool | int | float | str)


def _check_layers(streamed: LayerwiseModel) -> None:
    """Refuse decoder layers that take more than a layer can be given on its own."""
    for layer in streamed.layers:
        taken = inspect.signature(layer.forward).parameters
        named = {name for name, one in taken.items() if one.kind is not inspect.Parameter.VAR_KEYWORD}
        if named - _LAYER_INPUTS:
            raise _refusal(streamed, f"its decoder layers also take {', '.join(sorted(named - _LAYER_INPUTS))}")


def check_target(out: Path, *, resume: bool) -> None:
    """Before hours of work, refuse a target that could not be written at the end. Raises ConfigError."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / META).is_file()):
        raise ConfigError(f"{out} exists and holds no statistics; writing there would replace it. Choose another")
    if resume and (out / META).is_file():
        raise ConfigError(f"{out} holds statistics already; replace them (--fresh), or choose another")
