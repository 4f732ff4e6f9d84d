"""Super experts: the handful whose outputs are orders of magnitude larger than all others.

They write the massive activations that attention sinks live on; a model that loses one of them breaks. What is looked
at is ``a[l, e]``, the largest absolute value of an expert's output before the combine weight, over all its tokens
(first tokens included) and channels.

Legend: E experts of a layer, A assignments, d model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from collegium.errors import ConfigError
from collegium.measure.collect import Need, SiteBatch, collect, trace_batches
from collegium.measure.estimate import Estimate
from collegium.measure.metric import metric
from collegium.measure.statistics import Entry, Statistics
from collegium.sites import Site
from collegium.trace import Trace

__all__ = ["DownMax", "SuperExpert", "SuperExpertSettings", "SuperExperts", "super_experts", "super_experts_of"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class DownMax:
    """``down_max [E]``: largest absolute output of each expert, 0 if it saw no token; ``down_argmax [E, 2]``: its
    channel and the position of its token, -1 if it saw none."""

    name: ClassVar[str] = "down_max"
    needs: ClassVar[frozenset[Need]] = frozenset({"outputs"})
    statistics: ClassVar[tuple[Entry, ...]] = (
        Entry(name="down_max", collector="down_max", axes=("E",), merge="max"),
        Entry(name="down_argmax", collector="down_max", axes=("E", 2), dtype="int64", merge="where", of="down_max"),
    )

    def start(self, site: Site) -> dict[str, Tensor]:
        E = site.num_experts
        return {
            "down_max": torch.zeros(E, dtype=torch.float64),
            "down_argmax": torch.full((E, 2), -1, dtype=torch.int64),
        }

    def update(self, state: dict[str, Tensor], batch: SiteBatch) -> None:
        if not len(batch.token):
            return
        largest, channel = batch.outputs.abs().max(1)
        position = batch.position[batch.token]
        bounds = batch.offsets.tolist()
        for e, (first, last) in enumerate(pairwise(bounds)):
            if first == last:
                continue
            row = first + int(largest[first:last].argmax())
            # so that NaN gets in; and an expert that gives exact zeros has a place, too
            if not largest[row] <= state["down_max"][e] or state["down_argmax"][e, 0] < 0:
                state["down_max"][e] = largest[row]
                state["down_argmax"][e] = torch.stack([channel[row], position[row]])

    def finish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state


@dataclass(frozen=True)
class SuperExpertSettings:
    """The rule. Defaults are those of the paper's code; those for small models are ours.

    Attributes:
        depth: only the first part of the decoder layers is searched: late outputs are large and break nothing.
        percentile: of all values in those layers, to be exceeded.
        of_largest: part of the largest of them, to be exceeded.
        small: a model with fewer routed experts than this has too few values for a percentile, ...
        of_median: ... and this multiple of the median is to be exceeded in its place.
    """

    depth: float = 0.75
    percentile: float = 99.5
    of_largest: float = 0.1
    small: int = 1000
    of_median: float = 20.0

    def __post_init__(self) -> None:
        if not (0 < self.depth <= 1 and 0 <= self.percentile <= 100 and 0 <= self.of_largest < 1):
            raise ConfigError(
                f"depth {self.depth} must be in (0, 1], percentile {self.percentile} in [0, 100], of_largest "
                f"{self.of_largest} in [0, 1)"
            )


@dataclass(frozen=True)
class SuperExpert:
    """One of them: its largest absolute output `value`, in which `channel`, at which `position` of a sequence."""

    layer: int
    expert: int
    value: float
    channel: int
    position: int
    times_median: float


@dataclass(frozen=True, eq=False)
class SuperExperts:
    """The super experts of a model. None at all is a valid answer (attention without sinks, a small model).

    Attributes:
        found: largest first.
        rule: "percentile", or "median" for small models.
        threshold: what a value had to exceed.
        median, largest: of the values in the searched layers, of experts that saw a token.
        searched: the layers that were searched.
        values: layer -> ``[E]`` largest absolute outputs, of all layers; 0 where an expert saw no token.
        unseen: experts of the searched layers that saw no token, so that nothing is known of them.
        tokens: how many tokens the values come from.
    """

    found: tuple[SuperExpert, ...]
    rule: Literal["percentile", "median"]
    threshold: float
    median: float
    largest: float
    searched: tuple[int, ...]
    values: dict[int, Array]
    unseen: int
    tokens: int

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        return {
            "super experts": len(self.found),
            "layer.expert": ", ".join(f"{one.layer}.{one.expert}" for one in self.found) or "none",
            "largest |output|": self.largest,
            "threshold": self.threshold,
            "median": self.median,
            "experts without tokens": self.unseen,
        }


def super_experts(statistics: Statistics, settings: SuperExpertSettings | None = None) -> SuperExperts:
    """The experts whose largest output stands far out, by the rule of `settings`.

    Routed experts only: shared experts see every token and are never pruned.

    Args:
        statistics: with ``down_max``, from a pass with `DownMax`.

    Raises:
        ConfigError: they have no ``down_max``.
    """
    settings = settings or SuperExpertSettings()
    values = {layer: statistics.get(layer, "down_max").numpy() for layer in statistics.layers}
    seen = {layer: statistics.get(layer, "n").numpy() > 0 for layer in statistics.layers}
    last = round(settings.depth * statistics.meta.num_layers)
    searched = tuple(layer for layer in statistics.layers if layer < last)
    pool = np.concatenate([np.empty(0), *(values[layer][seen[layer]] for layer in searched)])
    small = sum(map(len, values.values())) < settings.small
    median = float(np.median(pool)) if len(pool) else 0.0
    largest = float(pool.max(initial=0))
    rule = (
        settings.of_median * median if small else float(np.percentile(pool, settings.percentile)) if len(pool) else 0.0
    )
    threshold = max(settings.of_largest * largest, rule)
    found = []
    for layer in searched:
        place = statistics.get(layer, "down_argmax")
        for expert in np.flatnonzero(values[layer] > threshold).tolist():
            value = float(values[layer][expert])
            channel, position = place[expert].tolist()
            times = value / median if median else np.inf
            found.append(SuperExpert(layer, expert, value, channel, position, float(times)))
    return SuperExperts(
        found=tuple(sorted(found, key=lambda one: -one.value)),
        rule="median" if small else "percentile",
        threshold=threshold,
        median=median,
        largest=largest,
        searched=searched,
        values=values,
        unseen=sum(int((~seen[layer]).sum()) for layer in searched),
        tokens=statistics.meta.tokens,
    )


@metric(
    "super-experts",
    question="Which experts would break the model if they were lost?",
    paper="Unveiling Super Experts in Mixture-of-Experts Large Language Models (2025)",
    arxiv="2507.23279",
    needs={"model"},
)
def super_experts_of(
    trace: Trace, model: Any, *, max_tokens: int = 16384, settings: SuperExpertSettings | None = None
) -> SuperExperts:
    """The super experts of `model`, found by running it once more over the tokens of a trace of it.

    Args:
        trace: of `model`; only its tokens are used.
        max_tokens: sequences are taken in random order up to so many tokens.

    Raises:
        ModelError: the trace is of another model.
        UnsupportedFamilyError: the experts' weights cannot be reached.
    """
    statistics = collect(
        model,
        trace_batches(trace, model, max_tokens),
        [DownMax()],
        name=trace.meta.model,
        fingerprint=trace.meta.fingerprint,
        data=trace.meta.data,
        domains=trace.meta.domains,
    )
    return super_experts(statistics, settings)
