"""How strongly a router trades quality for balance: the congestion coefficient.

Tokens are seen as players who choose an expert for its quality and avoid it for its crowd. An expert of quality Q_i
(the mean router logit) that carries the share p_i of the load is worth ``Q_i - gamma p_i``, and with noise of unit
scale the loads settle where ``p_i = exp(Q_i - gamma p_i) / sum_j exp(Q_j - gamma p_j)``. The gamma that comes nearest
the observed loads is one number that says how far the router gives up quality for balance: 0 is a plain softmax.

The paper's own estimator could be read in outline only; what is here is our definition of it. Top-K with K > 1 is not
a single choice: p is over assignments. gamma is in units of 1 / logit, so compare it within one layer only, over
checkpoints.

Legend: N tokens, E experts of a layer, K slots, B blocks of documents, S checkpoints, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from collegium.errors import ConfigError, TraceError
from collegium.jit import njit
from collegium.measure.estimate import Estimate, bootstrap
from collegium.measure.game import MAX_TEMPERATURE, equilibrium, fit_gamma, fit_temperature
from collegium.measure.metric import metric
from collegium.measure.tokens import Tokens, read_tokens
from collegium.trace import Trace

__all__ = ["Congestion", "Phases", "congestion", "congestion_series", "find_phases"]

Array = np.ndarray[Any, np.dtype[Any]]

SPREAD = 1e-3
"""Qualities with a smaller standard deviation (in logits) give every gamma the same loads."""

RESAMPLES = 100
_SAMPLE = 1 << 14  # tokens of a layer for the estimators that need a softmax a token


@dataclass(frozen=True, eq=False)
class Congestion:
    """The congestion game fitted to one layer's loads.

    Attributes:
        layer: index of the decoder layer.
        gamma: the coefficient, from one half of the documents, with an interval over blocks of them; None where it
            cannot be told, see `why`.
        temperature: of the softmax of Q nearest the loads of that half; near even loads it is ``1 + gamma / E``, and
            the honest equivalent of gamma. None where Q says nothing.
        residual: L1 distance between the loads of the other half of the documents and the game's, given gamma and
            that half's own Q; between 0 and 2.
        residual_temperature, residual_uniform: the same for the softmax at `temperature`, and for even loads.
        b0: largest load over mean load, of all documents.
        estimators: gamma by other notions of quality: "selected logit" (mean over the tokens that chose the expert),
            "selected log-probability", "log mean probability", "log mean weight"; None where it cannot be told.
        why: why gamma is None, else "".
    """

    layer: int
    gamma: Estimate | None
    temperature: float | None
    residual: float | None
    residual_temperature: float | None
    residual_uniform: float | None
    b0: float
    estimators: dict[str, float | None]
    why: str

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        return {
            "layer": self.layer,
            "gamma": self.gamma,
            "temperature": self.temperature,
            "held-out L1, game": self.residual,
            "held-out L1, softmax": self.residual_temperature,
            "held-out L1, even": self.residual_uniform,
            "max/mean load": self.b0,
            "note": self.why,
        }


@metric(
    "congestion",
    question="How strongly does each router trade quality for balance?",
    paper="Three Phases of Expert Routing (2026)",
    arxiv="2604.04230",
    needs={"logits"},
)
def congestion(trace: Trace, *, resamples: int = RESAMPLES, seed: int = 0) -> list[Congestion]:
    """The congestion coefficient of every traced layer.

    Args:
        trace: with router logits (without any selection bias, as `collegium.trace.record` stores them).
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        TraceError: the trace has no logits, or no tokens.
    """
    if not trace.meta.has("logits"):
        raise TraceError(f"{trace.folder} has no router logits, which the game is about; record with --logits")
    tokens = read_tokens(trace)
    block = tokens.block
    if tokens.order is not None:
        block = np.empty_like(tokens.block)
        block[tokens.order] = tokens.block
    return [_layer(trace, layer, tokens, block, resamples, seed) for layer in trace.layers]


def _layer(trace: Trace, layer: int, tokens: Tokens, block: Array, resamples: int, seed: int) -> Congestion:
    E = trace.meta.layer(layer).num_experts
    B = tokens.num_blocks
    # additive in blocks: assignments [E], sums of logits [E], tokens
    sums = np.zeros((B, 2 * E + 1))
    others = _Others(E, stride=max(1, len(tokens) // _SAMPLE))
    for part in trace.iter_parts([f"logits_{layer}", f"expert_{layer}", f"weight_{layer}"]):
        rows = slice(part.start, part.start + len(part))
        logits = part.logits(layer).astype(np.float32)
        expert = part.experts(layer)
        _accumulate(logits, expert, block[rows], sums)
        others.add(part.start, logits, expert, part.weights(layer), block[rows])
    fit, held = sums[0::2], sums[1::2]
    loads = sums[:, :E].sum(0)
    b0 = float(loads.max() * E / max(loads.sum(), 1))
    why = _why_not(fit, held, E)
    if why:
        return Congestion(layer, None, None, None, None, None, b0, dict.fromkeys(others.names), why)
    Q, p = _game(fit.sum(0))
    found = _gamma_interval(fit, resamples, seed)
    gamma = found if isinstance(found, Estimate) else None
    temperature = float(fit_temperature(Q, p))
    Q_held, p_held = _game(held.sum(0))
    value, highest = fit_gamma(Q, p), _max_gamma(E)
    return Congestion(
        layer=layer,
        gamma=gamma,
        temperature=temperature,
        residual=_distance(equilibrium(Q_held, value), p_held),
        residual_temperature=_distance(equilibrium(Q_held / temperature, 0.0), p_held),
        residual_uniform=_distance(np.full(E, 1 / E), p_held),
        b0=b0,
        estimators={name: _point(q, p, highest) for name, q in others.qualities().items()},
        why="" if isinstance(found, Estimate) else found,
    )


def _why_not(fit: Array, held: Array, E: int) -> str:
    """Why no game can be fitted at all, or ""."""
    if E < 2:
        return "one expert has no rivals"
    if not len(held) or not fit[:, :E].sum() or not held[:, :E].sum():
        return "a single document: nothing is held out"
    if not np.isfinite(fit).all() or not np.isfinite(held).all():
        return "some router logits are not finite"
    Q, _ = _game(fit.sum(0))
    if Q.std() < SPREAD:
        return f"the experts' qualities are equal (standard deviation {Q.std():.1g} logits), so every gamma fits"
    return ""


def _game(total: Array) -> tuple[Array, Array]:
    """``(Q [E], p [E])``: centred mean logits and shares of the load, from sums over documents."""
    E = len(total) // 2
    Q = total[E : 2 * E] / max(total[-1], 1)
    return Q - Q.mean(), total[:E] / max(total[:E].sum(), 1)


def _gamma_interval(fit: Array, resamples: int, seed: int) -> Estimate | str:
    """gamma with its interval, or why it is not to be told."""
    E = fit.shape[1] // 2
    highest = _max_gamma(E)

    # resampled as the logarithm of the equivalent temperature, whose spread is the same to both sides
    def statistic(total: Array) -> float:
        return float(np.log1p(fit_gamma(*_game(total)) / E))

    (found,) = bootstrap(fit, statistic, resamples=resamples, seed=seed)
    top = np.log1p(0.98 * highest / E)
    if found.value >= top or 2 * found.value - found.low >= top:
        return "gamma has no upper bound: even loads fit some resamples of the documents as well"
    value, low, high = (float(max(np.expm1(x) * E, 0.0)) for x in (found.value, found.low, found.high))
    return Estimate(value, low, high) if np.isfinite(found.low) else Estimate(value, np.nan, np.nan)


def _point(Q: Array | None, p: Array, highest: float) -> float | None:
    if Q is None or Q.std() < SPREAD:
        return None
    gamma = float(fit_gamma(Q - Q.mean(), p))
    return gamma if gamma < 0.98 * highest else None


def _distance(p: Array, q: Array) -> float:
    return float(np.abs(p - q).sum())


def _max_gamma(E: int) -> float:
    return (MAX_TEMPERATURE - 1) * E


class _Others:
    """Sums for other notions of quality, over the half of the blocks that gamma is fitted on.

    Every `stride`-th token is enough: they take a softmax each.
    """

    names = ("selected logit", "selected log-probability", "log mean probability", "log mean weight")

    def __init__(self, E: int, stride: int) -> None:
        self.stride = stride
        self.sums = np.zeros((5, E))  # assignments, their logits, log-probabilities, weights; all probabilities

    def add(self, start: int, logits: Array, expert: Array, weight: Array, block: Array) -> None:
        chosen = np.arange(-start % self.stride, len(logits), self.stride)
        chosen = chosen[block[chosen] % 2 == 0]
        _accumulate_others(logits[chosen], expert[chosen], weight[chosen].astype(np.float32), self.sums)

    def qualities(self) -> dict[str, Array | None]:
        """``[E]`` each; None where an expert was never chosen or a logarithm has no value."""
        n, logit, log_p, weight, p = self.sums
        if not np.isfinite(self.sums).all() or not p.all():
            return dict.fromkeys(self.names)
        by_name: dict[str, Array | None] = dict.fromkeys(self.names)
        by_name["log mean probability"] = np.log(p)
        if n.all():
            by_name["selected logit"] = logit / n
            by_name["selected log-probability"] = log_p / n
            if (weight > 0).all():
                by_name["log mean weight"] = np.log(weight / n)
        return by_name


@njit(cache=True)
def _accumulate(logits: Array, expert: Array, block: Array, sums: Array) -> None:
    N, E = logits.shape
    K = expert.shape[1]
    for t in range(N):
        row = sums[block[t]]
        for k in range(K):
            if expert[t, k] < E:
                row[expert[t, k]] += 1
        for e in range(E):
            row[E + e] += logits[t, e]
        row[2 * E] += 1


@njit(cache=True)
def _accumulate_others(logits: Array, expert: Array, weight: Array, sums: Array) -> None:
    N, E = logits.shape
    K = expert.shape[1]
    for t in range(N):
        highest = logits[t].max()
        total = 0.0
        for e in range(E):
            total += np.exp(logits[t, e] - highest)
        for e in range(E):
            sums[4, e] += np.exp(logits[t, e] - highest) / total
        for k in range(K):
            e = expert[t, k]
            if e < E:
                sums[0, e] += 1
                sums[1, e] += logits[t, e]
                sums[2, e] += logits[t, e] - highest - np.log(total)
                sums[3, e] += weight[t, k]


MIN_CHECKPOINTS = 6
"""Two breaks and four levels take six points."""

FLAT = 0.2
"""A phase is flat whose slope is less than this part of gamma's whole range over the whole range of log steps."""


@dataclass(frozen=True, eq=False)
class Phases:
    """A continuous line of three pieces through gamma over the logarithm of the training step.

    Attributes:
        layer: index of the decoder layer; None for the mean over layers.
        gamma: ``[S]``, NaN where it could not be told.
        breaks: the steps at which the slope changes.
        slopes: of the three pieces, in gamma for each tenfold of the step.
        kinds: of the three pieces: "surge" (rises), "stabilisation" (flat) or "relaxation" (falls).
        explained: share of gamma's variance over the checkpoints that the line explains; None if gamma is constant.
        control: the same for a straight line.
        why: why there are no phases (`breaks`, `slopes` and `kinds` are then empty), else "".
    """

    layer: int | None
    gamma: Array
    breaks: tuple[float, ...]
    slopes: tuple[float, ...]
    kinds: tuple[str, ...]
    explained: float | None
    control: float | None
    why: str

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        return {
            "layer": "mean" if self.layer is None else self.layer,
            "phases": " -> ".join(self.kinds) or self.why,
            "breaks (step)": ", ".join(f"{step:g}" for step in self.breaks),
            "explained": self.explained,
            "straight line": self.control,
        }


def congestion_series(traces: Sequence[Trace], steps: Sequence[int], *, resamples: int = RESAMPLES) -> list[Phases]:
    """gamma over the checkpoints of a training run, and its phases: one entry a layer, then the mean over layers.

    Args:
        traces: of the same text by at least `MIN_CHECKPOINTS` checkpoints of one model.
        steps: ``[S]`` training step of each, ascending, from 1.
        resamples: of the bootstrap, which decides whether a gamma can be told.

    Raises:
        ConfigError: too few checkpoints, or steps that do not ascend.
        TraceError: the traces are not of the same layers and tokens, or have no logits.
    """
    if len(traces) != len(steps) or len(steps) < MIN_CHECKPOINTS:
        raise ConfigError(
            f"{len(traces)} traces at {len(steps)} steps; three phases need a step for each trace and at least "
            f"{MIN_CHECKPOINTS} checkpoints"
        )
    if min(steps) < 1 or any(b <= a for a, b in pairwise(steps)):
        raise ConfigError(f"steps must ascend from 1 on, not {list(steps)}")
    first = traces[0]
    for other in traces[1:]:
        if other.layers != first.layers or not np.array_equal(other.tokens(), first.tokens()):
            raise TraceError(f"{other.folder} and {first.folder} must be traces of the same layers and the same tokens")
    found = [congestion(trace, resamples=resamples) for trace in traces]
    gamma = np.array([[np.nan if one.gamma is None else one.gamma.value for one in layers] for layers in found])
    by_layer = [find_phases(gamma[:, i], steps, layer) for i, layer in enumerate(first.layers)]
    told = np.isfinite(gamma)
    # a layer that drops out would move the mean by itself
    mean = np.where(told.all(1), np.where(told, gamma, 0).mean(1), np.nan)
    return [*by_layer, find_phases(mean, steps, None)]


def find_phases(gamma: Array, steps: Sequence[int], layer: int | None = None) -> Phases:
    """The least-squares line of three pieces through ``gamma [S]`` over log10 of `steps`; it breaks at checkpoints."""
    gamma = np.asarray(gamma, np.float64)
    told = np.isfinite(gamma)
    x, y = np.log10(np.asarray(steps, np.float64)[told]), gamma[told]
    if len(x) < MIN_CHECKPOINTS:
        why = f"gamma can be told at {len(x)} checkpoints only, {MIN_CHECKPOINTS} are needed"
        return Phases(layer, gamma, (), (), (), None, None, why)
    total = float(((y - y.mean()) ** 2).sum())
    line = _squares(np.stack([np.ones_like(x), x], 1), y)
    fits = []
    for a, b in combinations(range(1, len(x) - 1), 2):
        pieces = [np.ones_like(x), x, np.maximum(x - x[a], 0), np.maximum(x - x[b], 0)]
        fits.append((*_squares(np.stack(pieces, 1), y), a, b))
    squares, weights, a, b = min(fits, key=lambda fit: fit[0])
    slopes = np.cumsum(weights[1:])
    flat = max(FLAT * float(np.ptp(y) / np.ptp(x)), 1e-9)
    kinds = tuple("stabilisation" if abs(s) <= flat else "surge" if s > 0 else "relaxation" for s in slopes)
    return Phases(
        layer=layer,
        gamma=gamma,
        breaks=(float(10 ** x[a]), float(10 ** x[b])),
        slopes=tuple(slopes.tolist()),
        kinds=kinds,
        explained=1 - squares / total if total > 1e-12 else None,
        control=1 - line[0] / total if total > 1e-12 else None,
        why="",
    )


def _squares(columns: Array, y: Array) -> tuple[float, Array]:
    """``(sum of squared residuals, weights)`` of a least-squares fit."""
    weights = np.linalg.lstsq(columns, y, rcond=None)[0]
    return float(((columns @ weights - y) ** 2).sum()), weights
