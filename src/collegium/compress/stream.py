"""`calibrate`: statistics of a checkpoint whose model need not fit in memory.

The calibration tokens go through one decoder layer after the other: only that layer's weights are in memory, and the
hidden states of all tokens wait on disk between layers. For statistics of gradients the layers then run once more, last
to first (`stream_backward`).

Legend: B sequences, S positions of a batch, d model width, L decoder layers.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from collegium._version import __version__
from collegium.compress.stream_backward import Backward, check_gradients
from collegium.compress.stream_forward import Forward, Part, check_layers
from collegium.compress.stream_ranks import add_up, open_group
from collegium.compress.stream_store import PartialRun
from collegium.errors import CheckpointError, ConfigError, DataError
from collegium.layerwise import LayerwiseModel
from collegium.measure.collect import Collector, Counts, Feed, SiteCollection, batch_columns, statistics_meta
from collegium.measure.residual import Residuals
from collegium.measure.statistics import META, Statistics, StatisticsMeta
from collegium.models.checkpoint import Checkpoint, open_checkpoint
from collegium.sites import sites, tap
from collegium.trace.run import Batch, batch_ids, batch_inputs
from collegium.train.ranks import Ranks, open_ranks

__all__ = ["Progress", "calibrate", "check_target"]

Progress = Callable[[int, int, float], None]
"""Called with the steps that are done, the steps in all, and the share of the present one that is done. A step is a
layer; with gradients the logits are one more, and so is each layer on the way back."""


def calibrate(
    source: str | Path | Checkpoint,
    batches: Iterable[Batch],
    collectors: Sequence[Collector],
    out: str | Path,
    *,
    name: str | None = None,
    data: str = "unnamed",
    tokenizer: str | None = None,
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

    If a collector needs gradients, the hidden states of all layers stay there (L times as much), and after the forward
    the gradient of the summed next-token loss goes back through the layers, one in memory at a time. Statistics of
    gradients then equal autograd's on the whole model up to rounding.

    Under torchrun each process streams every n-th batch, and the result is the sum, on each of them; the first one
    writes it.

    Args:
        source: a Hugging Face model folder, not quantised.
        batches: as for `collect`; their tokens are kept in memory. The same on all processes.
        collectors: what to gather; `Counts` is added.
        out: folder for the statistics.
        name: of the model; None means the folder's.
        data, domains, max_tokens: as for `collect`.
        tokenizer: identity of the tokenizer which made the tokens (`collegium.data.tokenize.tokenizer_fingerprint`).
        dtype: of the weights: "auto" means the config's, else that of the weights.
        resume: go on with an unfinished run of the same settings and batches. False deletes it, and replaces
            statistics that are in `out`.

    Raises:
        ConfigError: `out` holds statistics already (and `resume` is set) or something else, or an unfinished run of
            other settings, batches or processes; or a batch, a token id or the collectors do not fit.
        DataError: there is no token.
        NotMoEError, UnsupportedFamilyError: there is nothing to look at, or the family cannot be streamed.
        CheckpointError, NonFiniteError: weights are missing or damaged, or changed while they were read.
        StatisticsError: the unfinished run is damaged.
        StorageError: the disk is full; the unfinished run stays.
    """
    out = Path(out).absolute()
    check_target(out, resume=resume)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    collectors = [Counts(), *(one for one in collectors if not isinstance(one, Counts))]
    with open_ranks() as ranks:
        group = open_group(ranks)
        streamed = LayerwiseModel(checkpoint, dtype)
        check_layers(streamed)
        if gradients := any(map(_needs_gradients, collectors)):
            check_gradients(streamed)
        name = name or checkpoint.folder.resolve().name
        meta = statistics_meta(streamed.model, collectors, name, checkpoint.fingerprint, data, domains)
        parts = list(_parts(streamed, batches, len(domains), max_tokens))
        if not _tokens(parts):
            raise DataError("the calibration data holds no token")
        parts = parts[ranks.rank :: ranks.world]
        meta = meta.model_copy(update={"tokens": _tokens(parts), "tokenizer": tokenizer})
        top = len(streamed.layers) if gradients else None
        store = _open_store(streamed, parts, meta, out, top, resume, ranks)
        _run(streamed, store, parts, collectors, len(domains), progress)
        if open_checkpoint(checkpoint.folder).fingerprint != meta.fingerprint:
            raise CheckpointError(f"{checkpoint.folder} changed while it was read; start again with --fresh")
        statistics = add_up(Statistics(meta, store.statistics()), ranks, group)
        if ranks.first:
            statistics.save(out)
        ranks.barrier()  # what it is made of stays until it is written
        store.remove()
    return statistics


def _needs_gradients(collector: Collector) -> bool:
    return "gradients" in collector.needs


def _tokens(parts: Iterable[Part]) -> int:
    return sum(int(part.columns["valid"].sum()) for part in parts)


def _open_store(
    streamed: LayerwiseModel,
    parts: Sequence[Part],
    meta: StatisticsMeta,
    out: Path,
    top: int | None,
    resume: bool,
    ranks: Ranks,
) -> PartialRun:
    run = {
        "fingerprint": meta.fingerprint,
        "tokens": _digest(parts),
        "domains": list(meta.domains),
        "tokenizer": meta.tokenizer,
        "collectors": meta.collectors,
        "dtype": str(streamed.dtype),
        "collegium": __version__,
    }
    layers = [layer.layer for layer in meta.layers]
    return PartialRun(out, run, layers, resume=resume, top=top, rank=ranks.rank, world=ranks.world)


def _parts(
    streamed: LayerwiseModel, batches: Iterable[Batch], num_domains: int, max_tokens: int | None
) -> Iterator[Part]:
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
        yield Part(batch_inputs(ids, mask, batch, accepts), columns, (ids.shape[0], ids.shape[1]))


def _digest(parts: Sequence[Part]) -> str:
    """Identity of the batches."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        for key, value in [*part.inputs.items(), *part.columns.items()]:
            digest.update(f"{key}\0{tuple(value.shape) if isinstance(value, Tensor) else value}\0".encode())
            if isinstance(value, Tensor):
                digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _run(
    streamed: LayerwiseModel,
    store: PartialRun,
    parts: Sequence[Part],
    collectors: Sequence[Collector],
    num_domains: int,
    progress: Progress | None,
) -> None:
    """Do what is still to do, up to the point where the store has all statistics."""
    plain, graded = ([one for one in collectors if _needs_gradients(one) == wanted] for wanted in (False, True))
    forward = Forward(streamed)

    def report(done: int, share: float) -> None:
        if progress is not None:
            progress(done, steps, share)

    there = _Pass(streamed, forward, store, parts, plain, num_domains, report)
    back = None
    steps = there.end
    if store.top is not None:
        back = Backward(
            streamed, forward, store, parts, graded, num_domains, lambda done, share: report(there.end + done, share)
        )
        steps += back.steps
    there.run()
    if back is not None:
        back.run()


class _Pass:
    """One pass of the batches through the layers, from the one the store is at to the last with experts, or to the last
    of all if the way back is to begin there.

    Attributes:
        end: the number of layers it takes.
    """

    def __init__(
        self,
        streamed: LayerwiseModel,
        forward: Forward,
        store: PartialRun,
        parts: Sequence[Part],
        collectors: Sequence[Collector],
        num_domains: int,
        report: Callable[[int, float], None],
    ) -> None:
        self.streamed, self.forward, self.store, self.parts = streamed, forward, store, parts
        self.collectors, self.num_domains, self.report = collectors, num_domains, report
        self.sites = {site.layer: site for site in sites(streamed.model)}
        self.end = max(self.sites) + 1 if store.top is None else store.top

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
                for number in range(first, self.end):
                    self._layer(number, feed)

    def _embed(self) -> None:
        with self.streamed.embedding_loaded(), self.store.write_hidden(0) as write:
            for part in self.parts:
                write(self.forward.embed(part))

    def _layer(self, number: int, feed: Feed) -> None:
        site = self.sites.get(number)
        shapes = [(*part.shape, self.forward.width) for part in self.parts]
        wanted = number + 1 < self.end or self.store.top is not None
        self.report(number, 0.0)
        with self.streamed.layer_loaded(number):
            collection = None if site is None else SiteCollection(site, self.collectors, self.num_domains)
            feed.collections = {} if site is None or collection is None else {site.path: collection}
            hidden = self.store.read_hidden(number, shapes, self.streamed.dtype)
            with self.store.write_hidden(number + 1) if wanted else nullcontext(_drop) as write:
                for count, (part, x) in enumerate(zip(self.parts, hidden, strict=True), 1):
                    feed.columns = part.columns
                    write(self.forward.layer(number, x, part))
                    self.report(number, count / len(self.parts))
            self.store.finish_layer(number, {} if collection is None else collection.finish())


def _drop(hidden: Tensor) -> None:
    """What comes out of the last layer is not needed."""


def check_target(out: Path, *, resume: bool) -> None:
    """Before hours of work, refuse a target that could not be written at the end. Raises ConfigError."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / META).is_file()):
        raise ConfigError(f"{out} exists and holds no statistics; writing there would replace it. Choose another")
    if resume and (out / META).is_file():
        raise ConfigError(f"{out} holds statistics already; replace them (--fresh), or choose another")
