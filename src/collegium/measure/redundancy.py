"""How alike the experts of a layer are, by their weights and by what they compute.

The neurons of an expert (a row of gate and of up, a column of down) may stand in any order without changing what it
computes, so the plain cosine of two experts' weights can miss that they are the same. `by_weights` therefore pairs
neurons first: two neurons are paired if each is the other's nearest by cosine; the rest stay alone and count as zero.
This one-to-one assignment needs no solver, whose cost grows with f^3 for each pair of experts, and in the widths
of real experts it loses nothing: neurons that belong together are nearest to each other by far. Long neurons are
projected at random, once to pair them and once more, independently, to take the cosine of the pairs: copies come out as
1, and everything else within about ``1 / sqrt(256 f)`` of its cosine, without the bias of having picked the nearest.

Legend: E experts, f expert width, d model width, m length of a neuron (3d with a gate, 2d without), n sampled tokens,
B blocks of documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from collegium.errors import ConfigError
from collegium.experts.weights import ExpertWeights
from collegium.measure.collect import Need, SiteBatch, apply_experts, collect, trace_batches, weights_of
from collegium.measure.estimate import MAX_BLOCKS, Estimate
from collegium.measure.information import means
from collegium.measure.metric import metric
from collegium.measure.statistics import Entry, Statistics
from collegium.measure.tokens import read_tokens
from collegium.rng import generator
from collegium.sites import Site, sites
from collegium.trace import Trace
from collegium.trace.run import Batch

__all__ = ["OutputCosine", "Redundancy", "redundancy", "weight_cosine"]

Array = np.ndarray[Any, np.dtype[Any]]

CLOSEST = 5
"""Pairs that `Redundancy.closest` lists."""
SEQUENCES = 16
"""That the outputs are compared on, at the least: of a few documents the spread would not be known."""

_TO_PAIR, _TO_COMPARE = 128, 256  # lengths of projected neurons
_CONTROLS = 4  # random experts: six pairs
_CHUNK = 1 << 25  # values of one intermediate result in memory at a time


@dataclass(frozen=True)
class OutputCosine:
    """``out_cos [E, E]``: the cosine of two experts' outputs for one token, every expert run on it, summed over a
    sample of tokens; ``out_cos_n []``: their number. ``out_cos_random []``: the same sum for pairs of random
    experts with weights of the same spread. ``out_cos_blocks [B, 2]``: for each block of documents the mean cosine
    of two different experts, summed over its tokens, and their number; document i is in block i modulo B.

    Attributes:
        tokens: how many tokens are taken, from the first batches.
        per_batch: at most so many of one batch, so that more of the data is seen; None for no limit.
    """

    tokens: int = 1024
    per_batch: int | None = None

    name: ClassVar[str] = "out_cos"
    needs: ClassVar[frozenset[Need]] = frozenset()
    statistics: ClassVar[tuple[Entry, ...]] = (
        Entry(name="out_cos", collector="out_cos", axes=("E", "E")),
        Entry(name="out_cos_random", collector="out_cos", axes=()),
        Entry(name="out_cos_n", collector="out_cos", axes=(), dtype="int64"),
        Entry(name="out_cos_blocks", collector="out_cos", axes=(MAX_BLOCKS, 2)),
    )

    def __post_init__(self) -> None:
        if self.tokens < 1 or (self.per_batch is not None and self.per_batch < 1):
            raise ConfigError(f"tokens {self.tokens} and per_batch {self.per_batch} must be at least 1")

    def start(self, site: Site) -> dict[str, Tensor]:
        E = site.num_experts
        return {
            "out_cos": torch.zeros(E, E, dtype=torch.float64),
            "out_cos_random": torch.zeros((), dtype=torch.float64),
            "out_cos_n": torch.zeros((), dtype=torch.int64),
            "out_cos_blocks": torch.zeros(MAX_BLOCKS, 2, dtype=torch.float64),
        }

    def update(self, state: dict[str, Tensor], batch: SiteBatch) -> None:
        left = self.tokens - int(state["out_cos_n"])
        token = batch.valid.nonzero().squeeze(1)
        take = min(left, len(token), self.per_batch or len(token))
        if take <= 0:
            return
        chosen = token[torch.linspace(0, len(token) - 1, take).long().to(token.device)]
        x = batch.x[chosen].float()
        weights = weights_of(batch.site)
        cosines, of_token = _output_cosine(weights, x)
        random, _ = _output_cosine(_random_experts(weights, batch.site.layer), x)
        state["out_cos"] += cosines
        state["out_cos_random"] += _off_diagonal_mean(random.numpy())
        state["out_cos_n"] += take
        block = batch.document[chosen].cpu() % MAX_BLOCKS
        state["out_cos_blocks"].index_add_(0, block, torch.stack([of_token, torch.ones_like(of_token)], 1))

    def finish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state


@dataclass(frozen=True, eq=False)
class Redundancy:
    """Likeness of one layer's experts; cosines, 1 for the same.

    Attributes:
        layer: index of the decoder layer.
        by_weights: ``[E, E]`` of their weights after neurons are paired, whatever their order; biases left out.
        by_outputs: ``[E, E]`` of their outputs for one token, mean over a sample of tokens all experts were run on.
        closest: pairs ``(i, j, cosine of outputs)``, most alike first.
        mean_by_weights, mean_by_outputs: over pairs of two experts; 0 for a single expert. The interval of the outputs
            is over the documents of the sample, NaN if it is of one.
        control: `mean_by_weights` of randomly initialised experts of that shape.
        control_outputs: `mean_by_outputs` of those, on the same tokens.
        in_order: ``[E, E]`` plain cosine of their weights, neurons as they stand.
        tokens: how many tokens `by_outputs` comes from.
    """

    layer: int
    by_weights: Array
    by_outputs: Array
    closest: tuple[tuple[int, int, float], ...]
    mean_by_weights: float
    mean_by_outputs: Estimate
    control: float
    control_outputs: float
    in_order: Array
    tokens: int

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        return {
            "layer": self.layer,
            "cosine of outputs": self.mean_by_outputs,
            "random experts' outputs": self.control_outputs,
            "cosine of weights": self.mean_by_weights,
            "random experts' weights": self.control,
            "closest pair": "{}, {} ({:.2f})".format(*self.closest[0]) if self.closest else "none",
        }


@metric(
    "redundancy",
    question="How alike are the experts of a layer?",
    paper="Sub-MoE (2025)",
    arxiv="2506.23266",
    needs={"model"},
)
def redundancy(trace: Trace, model: Any, *, max_tokens: int = 1024) -> list[Redundancy]:
    """Likeness of the experts of every layer of `model`, its outputs on tokens of a trace of it.

    Args:
        trace: of `model`; only its tokens are used.
        max_tokens: every expert is run on so many tokens, of `SEQUENCES` or more sequences taken in random order.

    Raises:
        ModelError: the trace is of another model.
        UnsupportedFamilyError: the experts' weights cannot be reached.
    """
    each = -(-max_tokens // min(SEQUENCES, len(read_tokens(trace).starts) - 1))
    statistics = collect(
        model,
        _sample(trace, model, max_tokens, each),
        [OutputCosine(tokens=max_tokens, per_batch=each)],
        name=trace.meta.model,
        fingerprint=trace.meta.fingerprint,
        data=trace.meta.data,
        domains=trace.meta.domains,
    )
    return [_layer(site, statistics) for site in sorted(sites(model), key=lambda site: site.layer)]


def _sample(trace: Trace, model: Any, max_tokens: int, each: int) -> Iterator[Batch]:
    """Sequences that have `max_tokens` tokens together, of each at most so many; what is very long is cut."""
    left = max_tokens
    for batch in trace_batches(trace, model):
        if left <= 0:
            return
        yield {name: values[:, :max_tokens] for name, values in batch.items()}
        left -= min(batch["input_ids"].shape[1], each)


@torch.no_grad()
def _layer(site: Site, statistics: Statistics) -> Redundancy:
    weights = weights_of(site)
    in_order, by_weights = weight_cosine(weights)
    _, control = weight_cosine(_random_experts(weights, site.layer))
    tokens = int(statistics.get(site.layer, "out_cos_n"))
    by_outputs = (statistics.get(site.layer, "out_cos") / max(tokens, 1)).numpy()
    random = float(statistics.get(site.layer, "out_cos_random")) / max(tokens, 1)
    i, j = np.triu_indices(len(by_outputs), 1)
    order = np.argsort(-by_outputs[i, j], kind="stable")[:CLOSEST]
    (mean_by_outputs,) = means(statistics.get(site.layer, "out_cos_blocks").numpy(), (-1, 1))
    return Redundancy(
        layer=site.layer,
        by_weights=by_weights,
        by_outputs=by_outputs,
        closest=tuple((int(i[n]), int(j[n]), float(by_outputs[i[n], j[n]])) for n in order),
        mean_by_weights=_off_diagonal_mean(by_weights),
        mean_by_outputs=mean_by_outputs,
        control=_off_diagonal_mean(control),
        control_outputs=random,
        in_order=in_order,
        tokens=tokens,
    )


def weight_cosine(weights: ExpertWeights) -> tuple[Array, Array]:
    """``(plain [E, E], paired [E, E])``: cosines of experts' weights, neurons as they stand and paired.

    About ``64 E^2 f^2`` multiplications for the pairing. One matrix of the layer is copied in float32 at a time.
    """
    plain = _gram(weights.up) + _gram(weights.down)
    length = plain.diagonal().sqrt().clamp(min=1e-30)
    plain = plain / (length[:, None] * length)
    E = weights.num_experts
    views = [_views(_neurons(weights, e)) for e in range(E)]
    paired = torch.eye(E, dtype=torch.float64)
    for i, j in combinations(range(E), 2):
        mine, its = _mutual(views[i][0], views[j][0])
        paired[i, j] = paired[j, i] = (views[i][1][mine] * views[j][1][its]).sum()
    return plain.double().cpu().numpy(), paired.numpy()


def _gram(matrices: Tensor) -> Tensor:
    flat = matrices.float().flatten(1)
    return flat @ flat.T


def _views(neurons: Tensor) -> tuple[Tensor, Tensor]:
    """``([f, .], [f, .])``: neurons of length 1 to pair by, and neurons to compare, of length 1 all together."""
    m = neurons.shape[1]
    to_pair = to_compare = neurons
    if m > 2 * _TO_COMPARE:
        to_pair, to_compare = (
            neurons @ torch.randn(m, length, generator=generator("neurons", m, length)).to(neurons)
            for length in (_TO_PAIR, _TO_COMPARE)
        )
    return F.normalize(to_pair, dim=-1), to_compare / to_compare.norm().clamp(min=1e-30)


def _mutual(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``a [f, m]`` and of ``b [f, m]`` that are each other's nearest by cosine; both have length 1."""
    f = len(a)
    best, back = a.new_full((f,), -2.0), torch.zeros(f, dtype=torch.long, device=a.device)
    to = []
    for first, rows in zip(range(0, f, step := max(1, _CHUNK // f)), a.split(step), strict=True):
        cosines = rows @ b.T
        to.append(cosines.argmax(1))
        value, row = cosines.max(0)
        back = torch.where(value > best, row + first, back)
        best = torch.maximum(value, best)
    there = torch.cat(to)
    mine = (back[there] == torch.arange(f, device=a.device)).nonzero().squeeze(1)
    return mine, there[mine]


def _neurons(weights: ExpertWeights, e: int) -> Tensor:
    """``[f, m]`` float32 of expert e: gate row, up row and down column of each neuron, end to end."""
    up, down = weights.up_t[e].T.float(), weights.down_t[e].float()
    if not weights.gated:
        return torch.cat([up, down], 1)
    gate, up = (up[0::2], up[1::2]) if weights.interleaved else up.chunk(2)
    return torch.cat([gate, up, down], 1)


def _random_experts(weights: ExpertWeights, layer: int) -> ExpertWeights:
    """A few experts of the same shape, each matrix normal with the spread it has here; biases zero."""
    drawn: dict[str, Any] = {}
    for name in ("up", "down"):
        real = getattr(weights, name)
        fresh = torch.randn(_CONTROLS, *real.shape[1:], generator=generator("random experts", layer, name))
        drawn[name] = fresh.to(real.device) * _deviation(real)
    zeros: dict[str, Any] = {
        name: torch.zeros(_CONTROLS, *getattr(weights, name).shape[1:], device=weights.up.device)
        for name in ("up_bias", "down_bias")
        if getattr(weights, name) is not None
    }
    return replace(weights, **drawn, **zeros)


def _deviation(matrices: Tensor) -> Tensor:
    """Standard deviation of all values of ``matrices [E, ...]``, of which one is copied in float32 at a time."""
    mean = torch.stack([one.float().mean() for one in matrices]).mean()
    return torch.stack([(one.float() - mean).square().mean() for one in matrices]).mean().sqrt()


def _output_cosine(weights: ExpertWeights, x: Tensor) -> tuple[Tensor, Tensor]:
    """``([E, E], [n])`` float64: cosines of the experts' outputs, summed over the rows of ``x [n, d]``; and for each
    row the mean over pairs of two experts."""
    E, d = weights.num_experts, x.shape[1]
    total, of_row = torch.zeros(E, E, dtype=torch.float64), []
    for rows in x.split(max(1, _CHUNK // (E * d))):
        n = len(rows)
        expert = torch.arange(E, device=x.device).repeat_interleave(n)
        y = F.normalize(apply_experts(weights, rows.repeat(E, 1), expert), dim=-1).view(E, n, d).transpose(0, 1)
        cosines = torch.bmm(y, y.transpose(1, 2))
        total += cosines.sum(0).double().cpu()
        with_itself = cosines.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
        of_row.append((cosines.sum((1, 2), dtype=torch.float64) - with_itself).cpu() / max(E * (E - 1), 1))
    return total, torch.cat(of_row)


def _off_diagonal_mean(square: Array) -> float:
    E = len(square)
    return float((square.sum() - np.trace(square)) / (E * (E - 1))) if E > 1 else 0.0
