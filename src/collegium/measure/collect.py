"""Collectors: what gathers statistics about each expert while a model runs, and the pass that feeds them.

A collector sees one MoE block at a time, and each `start` makes the state of one block, so the same collectors serve a
model that fits in memory (`collect`) and one that is streamed through it layer by layer (`SiteCollection`).

Legend: T tokens, E experts, A assignments of the tokens that count, d model width, f expert width, C domains.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from collegium._version import __version__
from collegium.errors import ConfigError, ModelError, NonFiniteError, UnsupportedFamilyError
from collegium.experts.compute import compute
from collegium.experts.from_module import expert_weights
from collegium.experts.weights import ExpertWeights
from collegium.measure.residual import Residuals
from collegium.measure.statistics import Entry, LayerEntry, Statistics, StatisticsMeta
from collegium.measure.tokens import read_tokens
from collegium.rng import seed_of
from collegium.routing import Routing
from collegium.sites import Order, Site, sites, tap
from collegium.trace import Trace
from collegium.trace.rows import spread
from collegium.trace.run import Batch, batch_ids, batch_inputs

__all__ = [
    "Collector",
    "Counts",
    "Feed",
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

Need = Literal["outputs", "logits", "residual"]


def weights_of(site: Site) -> ExpertWeights:
    """The parameters of a site's experts. Nothing is copied.

    Raises:
        UnsupportedFamilyError: they are not fused parameters of a floating dtype (NLLB-MoE, Switch, quantised experts).
    """
    experts: Any = site.experts
    weights = getattr(experts, "weights", None)
    if not isinstance(weights, ExpertWeights):
        if site.scales_input:  # Llama-4, whose experts lack the flags of the common seam
            weights = ExpertWeights(
                up=experts.gate_up_proj,
                down=experts.down_proj,
                activation=lambda hidden: experts.act_fn(hidden.chunk(2, -1)[0]) * hidden.chunk(2, -1)[1],
                transposed=True,
            )
        else:
            weights = expert_weights(experts)
    if weights.up.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedFamilyError(
            f"{site.path}: the experts' weights are {weights.up.dtype}; load the model dequantised to look at them"
        )
    return weights


def apply_experts(weights: ExpertWeights, x: Tensor, expert: Tensor) -> Tensor:
    """``[A, d]`` float32: the output of expert ``expert [A]`` for each row of ``x [A, d]``, without combine weights."""
    if not len(x):
        return x.float()
    E = max(weights.num_experts, int(expert.max()) + 1)  # ids beyond the experts compute nothing, and give zeros
    weight = torch.ones_like(expert, dtype=torch.float32)
    routing = Routing(expert, weight, num_tokens=len(x), num_experts=E, slots=1)
    return compute(x.float(), routing, weights)


class SiteBatch:
    """What one forward showed at one MoE block. Tokens that do not count (padding) are in no row.

    Attributes:
        site: the block.
        x: ``[T, d]`` the experts' input.
        routing: what the experts were told; with logits if a collector needs them.
        document, domain, position: ``[T]`` int64; domains are codes.
        valid: ``[T]`` bool, the tokens that count.
        residual: ``[T, d]`` the residual stream entering the block, if a collector needs it, else None.
        token, expert: ``[A]`` int64 rows sorted by expert, in token order within one; dropped assignments left out.
        weight: ``[A]`` float32 combine weights of the rows.
        offsets: ``[E + 1]`` int64; rows ``offsets[e]:offsets[e + 1]`` are expert e's.
    """

    def __init__(
        self,
        site: Site,
        x: Tensor,
        routing: Routing,
        *,
        document: Tensor,
        domain: Tensor,
        position: Tensor,
        valid: Tensor,
        residual: Tensor | None = None,
        whole: SiteBatch | None = None,
    ) -> None:
        self.site, self.x, self.routing = site, x.detach(), routing
        self.document, self.domain, self.position, self.valid = document, domain, position, valid
        self.residual, self._whole = residual, whole
        dispatch = routing.dispatch()
        live = valid[dispatch.token]
        order = dispatch.order[live]
        self.token, self.expert = dispatch.token[live], routing.expert[order]
        self.weight = routing.weight[order].detach().float()
        counts = torch.bincount(self.expert, minlength=routing.num_experts)
        self.offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    @cached_property
    def outputs(self) -> Tensor:
        """``[A, d]`` float32 outputs of the experts, before the combine weights. Computed once for all collectors."""
        if self._whole is not None:
            return self._whole.outputs[self.valid[self._whole.token]]
        x = self.x[self.token].float()
        if self.site.scales_input:
            x = x * self.weight[:, None]
        return apply_experts(weights_of(self.site), x, self.expert)

    def of_domain(self, code: int) -> SiteBatch | None:
        """The same batch with only the tokens of one domain counting; None if there are none."""
        valid = self.valid & (self.domain == code)
        if not bool(valid.any()):
            return None
        if bool((valid == self.valid).all()):
            return self
        return SiteBatch(
            self.site,
            self.x,
            self.routing,
            document=self.document,
            domain=self.domain,
            position=self.position,
            valid=valid,
            residual=self.residual,
            whole=self,
        )


class Collector(Protocol):
    """Gathers one or a few statistics. A frozen dataclass whose fields are its settings, plain data.

    Attributes:
        name: in the meta.
        needs: "outputs" if it reads ``batch.outputs``, "logits" if it reads ``batch.routing.logits``, "residual" if it
            reads ``batch.residual``.
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
    """The tap that hands every block's batch to its collectors."""

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
        self.collections[site.path].update(SiteBatch(site, x, routing, residual=residual, **columns))


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


def batch_columns(batch: Batch, ids: Tensor, mask: Tensor, num_domains: int) -> dict[str, Tensor]:
    """``[T]`` document, domain, position and valid of a batch; documents are rows if not given."""
    B, S = ids.shape
    given = {
        "document": batch.get("document", torch.arange(B)),
        "domain": batch.get("domain", torch.zeros(B, dtype=torch.long)),
        "position": batch.get("position", mask.cumsum(1).sub(1).clamp(min=0)),
    }
    columns = {key: torch.from_numpy(spread(values, B, S).astype(np.int64)) for key, values in given.items()}
    domain = columns["domain"]
    if domain.numel() and not 0 <= int(domain.min()) <= int(domain.max()) < num_domains:
        raise ConfigError(f"domain {int(domain.max())} is no index into the {num_domains} domains")
    return {**columns, "valid": mask.reshape(-1).cpu()}


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


def trace_batches(trace: Trace, model: Any, max_tokens: int | None = None, *, seed: int = 0) -> Iterator[Batch]:
    """The sequences of `trace` as batches of one for `collect`, in random order, up to `max_tokens` tokens in all.

    Raises:
        ModelError: the trace is of another model: other layers, numbers of experts, or more token ids.
        TraceError: the trace is empty.
    """
    mine = {site.layer: site.num_experts for site in sites(model)}
    theirs = {entry.layer: entry.num_experts for entry in trace.meta.layers}
    tokens = read_tokens(trace)
    vocabulary = model.get_input_embeddings().num_embeddings
    if mine != theirs or int(tokens.token.max()) >= vocabulary:
        raise ModelError(
            f"{trace.folder} is not a trace of this model: experts by layer are {theirs} and {mine}, the highest token "
            f"id is {int(tokens.token.max())} of {vocabulary}"
        )
    left = len(tokens) if max_tokens is None else max_tokens
    order = np.random.default_rng(seed_of("trace batches", seed)).permutation(len(tokens.starts) - 1)
    return _sequences(tokens, order.tolist(), left)


def _sequences(tokens: Any, order: list[int], left: int) -> Iterator[Batch]:
    columns = {name: getattr(tokens, name) for name in ("token", "position", "document", "domain")}
    for sequence in order:
        if left <= 0:
            return
        first = int(tokens.starts[sequence])
        rows = slice(first, min(int(tokens.starts[sequence + 1]), first + left))
        batch = {name: torch.from_numpy(values[rows].astype(np.int64))[None] for name, values in columns.items()}
        left -= batch["token"].shape[1]
        yield {"input_ids": batch.pop("token"), **batch}
