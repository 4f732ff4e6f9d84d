"""Collectors: what gathers statistics about each expert while a model runs, and the pass that feeds them.

A collector sees one MoE block at a time, and each `start` makes the state of one block, so the same collectors serve a
model that fits in memory (`collect`) and one that is streamed through it layer by layer (`SiteCollection`).

Legend: T tokens, E experts, A assignments of the tokens that count, d model width, f expert width, C domains.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from collegium._version import __version__
from collegium.errors import ConfigError, ModelError, NonFiniteError, UnsupportedFamilyError
from collegium.measure.batches import batch_columns, trace_batches
from collegium.measure.residual import Residuals
from collegium.measure.site_batch import SiteBatch, apply_experts, weights_of
from collegium.measure.statistics import Entry, LayerEntry, Statistics, StatisticsMeta
from collegium.routing import Routing
from collegium.sites import Order, Site, sites, tap
from collegium.trace.run import Batch, batch_ids, batch_inputs

__all__ = [
    "Collector",
    "Counts",
    "Feed",
    "Need",
    "SiteBatch",
    "SiteCollection",
    "apply_experts",
    "batch_columns",
    "collect",
    "layer_entry",
    "statistics_meta",
    "trace_batches",
    "weights_of",
]

Need = Literal["outputs", "hidden", "logits", "residual", "gradients"]


class Collector(Protocol):
    """Gathers one or a few statistics. A frozen dataclass whose fields are its settings, plain data.

    Attributes:
        name: in the meta.
        needs: "outputs" if it reads ``batch.outputs`` or what is made of them, "hidden" if it reads ``batch.hidden``,
            "logits" if it reads ``batch.routing.logits``, "residual" if it reads ``batch.residual``, "gradients" if it
            reads what only a backward pass gives.
        statistics: what `finish` gives. With ``by_domain`` (all of them or none) the collector has one state a domain,
            and knows nothing of it.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    statistics: ClassVar[tuple[Entry, ...]]

    def start(self, site: Site) -> Any:
        """The state before the first batch."""

    def update(self, state: Any, batch: SiteBatch) -> None:
        """Take a batch into the state."""

    def finish(self, state: Any) -> dict[str, Tensor]:
        """The tensor of each of `statistics`, without a domain axis."""


@dataclass(frozen=True)
class Counts:
    """``n [E]``: assignments carried out; ``n_tokens []``: tokens. Part of every pass."""

    name: ClassVar[str] = "counts"
    needs: ClassVar[frozenset[Need]] = frozenset()
    statistics: ClassVar[tuple[Entry, ...]] = (
        Entry(name="n", collector="counts", axes=("E",), dtype="int64", by_domain=True),
        Entry(name="n_tokens", collector="counts", axes=(), dtype="int64", by_domain=True),
    )

    def start(self, site: Site) -> dict[str, Tensor]:
        return {"n": torch.zeros(site.num_experts, dtype=torch.int64), "n_tokens": torch.zeros((), dtype=torch.int64)}

    def update(self, state: dict[str, Tensor], batch: SiteBatch) -> None:
        state["n"] += batch.offsets.diff().cpu()
        state["n_tokens"] += int(batch.valid.sum())

    def finish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state


class SiteCollection:
    """The states of all collectors at one site: feed it batches, then `finish` it."""

    def __init__(self, site: Site, collectors: Sequence[Collector], num_domains: int) -> None:
        self.site, self.collectors = site, collectors
        self.states = [
            [collector.start(site) for _ in range(num_domains if _by_domain(collector) else 1)]
            for collector in collectors
        ]

    def update(self, batch: SiteBatch) -> None:
        """Show a batch to every collector, domain by domain to those that keep domains apart."""
        parts: dict[int, SiteBatch | None] = {}
        for collector, states in zip(self.collectors, self.states, strict=True):
            if not _by_domain(collector):
                collector.update(states[0], batch)
                continue
            for code, state in enumerate(states):
                if code not in parts:
                    parts[code] = batch.of_domain(code)
                part = parts[code]
                if part is not None:
                    collector.update(state, part)

    def finish(self) -> dict[str, Tensor]:
        """``name -> tensor`` of every statistic, with the domain axis where there is one.

        Raises:
            NonFiniteError: one holds NaN or infinity.
        """
        tensors: dict[str, Tensor] = {}
        for collector, states in zip(self.collectors, self.states, strict=True):
            found = [collector.finish(state) for state in states]
            for entry in collector.statistics:
                values = [one[entry.name].cpu() for one in found]
                tensors[entry.name] = torch.stack(values) if entry.by_domain else values[0]
                if not bool(torch.isfinite(tensors[entry.name]).all()):
                    raise NonFiniteError(
                        f"{self.site.path} (layer {self.site.layer}): statistic {entry.name!r} is NaN or infinite; a "
                        "weight of the model is probably damaged, `collegium inspect --verify` names it"
                    )
        return tensors


def _by_domain(collector: Collector) -> bool:
    return all(entry.by_domain for entry in collector.statistics)


def layer_entry(site: Site) -> LayerEntry:
    """What the meta of statistics says of a site. Raises UnsupportedFamilyError as `weights_of`."""
    f, d = weights_of(site).down_t.shape[1:]
    return LayerEntry(
        layer=site.layer,
        path=site.path,
        num_experts=site.num_experts,
        top_k=site.top_k,
        hidden_size=d,
        intermediate_size=f,
    )


class Feed:
    """The tap that hands every block's batch to its collectors, in pieces that bound what the experts' outputs take."""

    order = Order.OBSERVE

    def __init__(self, collections: Mapping[str, SiteCollection], residuals: Residuals | None) -> None:
        self.collections, self.residuals = collections, residuals
        self.columns: dict[str, Tensor] = {}

    def __call__(self, site: Site, x: Tensor, routing: Routing) -> None:
        if routing.num_tokens != len(self.columns["valid"]):
            raise ModelError(
                f"{site.path} routed {routing.num_tokens} tokens of a batch of {len(self.columns['valid'])}; "
                "statistics need every token in every MoE block"
            )
        columns: dict[str, Any] = {name: values.to(x.device) for name, values in self.columns.items()}
        residual = None if self.residuals is None else self.residuals.take(site)
        for piece in SiteBatch(site, x, routing, residual=residual, **columns).pieces():
            self.collections[site.path].update(piece)


def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    collectors: Sequence[Collector],
    *,
    name: str | None = None,
    fingerprint: str | None = None,
    data: str = "unnamed",
    domains: Sequence[str] = ("unknown",),
    max_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Run `model` over `batches` in eval mode, without gradients, and gather statistics at every MoE block.

    Args:
        model: any model `collegium.sites.sites` finds blocks in, one block a decoder layer.
        batches: as for `collegium.trace.record`.
        collectors: what to gather; `Counts` is added.
        name, fingerprint, data, domains: go into the meta; see `StatisticsMeta`.
        max_tokens: later tokens do not count.
        progress: called after each batch with the number of its tokens that counted.

    Raises:
        NotMoEError, UnsupportedFamilyError: there is nothing to look at, or not in a way that fits.
        NonFiniteError: a statistic is NaN or infinite; the message names the layer.
        ConfigError: two collectors give one statistic, or a batch does not fit.
    """
    collectors = [Counts(), *(one for one in collectors if not isinstance(one, Counts))]
    meta = statistics_meta(model, collectors, name, fingerprint, data, domains)
    found = sites(model)
    needs = {need for one in collectors for need in one.needs}
    residuals = Residuals(model, found) if "residual" in needs else None
    feed = Feed({site.path: SiteCollection(site, collectors, len(domains)) for site in found}, residuals)
    accepts = inspect.signature(model.forward).parameters
    device = next(model.parameters()).device
    training, seen = model.training, 0
    model.eval()
    try:
        with residuals or nullcontext(), tap(model, feed, logits="logits" in needs), torch.no_grad():
            for batch in batches:
                if max_tokens is not None and seen >= max_tokens:
                    break
                ids, mask = batch_ids(batch, device)
                feed.columns = batch_columns(batch, ids, mask, len(domains))
                if max_tokens is not None:
                    feed.columns["valid"] &= feed.columns["valid"].cumsum(0) <= max_tokens - seen
                model(**batch_inputs(ids, mask, batch, accepts))
                count = int(feed.columns["valid"].sum())
                seen += count
                if progress is not None:
                    progress(count)
    finally:
        model.train(training)
    tensors = {
        (site.layer, key): value for site in found for key, value in feed.collections[site.path].finish().items()
    }
    return Statistics(meta.model_copy(update={"tokens": seen}), tensors)


def statistics_meta(
    model: Any,
    collectors: Sequence[Collector],
    name: str | None,
    fingerprint: str | None,
    data: str,
    domains: Sequence[str],
) -> StatisticsMeta:
    found = sorted(sites(model), key=lambda site: site.layer)
    numbers = [site.layer for site in found]
    if len(set(numbers)) != len(numbers):
        raise UnsupportedFamilyError(
            f"statistics have one MoE block a layer; {type(model).__name__} (family {found[0].family!r}) has several: "
            f"{', '.join(site.path for site in found[:4])}"
        )
    entries = [entry for collector in collectors for entry in collector.statistics]
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        raise ConfigError(f"two collectors give one statistic; they give {', '.join(names)}")
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return StatisticsMeta(
        model=name or getattr(model, "name_or_path", "") or type(model).__name__,
        fingerprint=fingerprint,
        family=found[0].family,
        num_layers=max(getattr(text, "num_hidden_layers", 0) or 0, numbers[-1] + 1),
        layers=tuple(layer_entry(site) for site in found),
        data=(data,),
        domains=tuple(domains),
        tokens=0,
        statistics=tuple(entries),
        collectors={one.name: _settings(one) for one in collectors},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        collegium=__version__,
    )


def _settings(collector: Any) -> dict[str, Any]:
    """As JSON would give them back, so that settings read from a file compare equal."""
    return json.loads(json.dumps(asdict(collector)))
