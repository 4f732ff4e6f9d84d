"""Bits of each expert from how much it would be missed: what `table` serves from (EdgeMoE's bit-width adaptation).

Two neighbouring precisions are found between which the tolerated loss lies. Then the experts that matter least are
lowered, as many as the loss allows; how many is found by bisection.

Legend: E experts of a layer, L layers, n experts of all layers, in the order of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from collegium._version import __version__
from collegium.errors import ConfigError
from collegium.experts.stored import dequantise, quantise
from collegium.experts.weights import ExpertWeights
from collegium.offload.geometry import Array, Geometry
from collegium.offload.precision.table import PrecisionLayer, PrecisionPlan

__all__ = ["FittedTable", "fit_table", "measured_sensitivity", "weight_sensitivity"]

Evaluate = Callable[[Array], float]
"""Bits of every expert ``[n]`` -> loss, in nats a token. The same text each time."""


@dataclass(frozen=True, eq=False)
class FittedTable:
    """What the search found.

    Attributes:
        bits: ``[n]`` of each expert.
        lowered: how many have the lower of the two precisions.
        reference, loss: with every expert at its most exact, and with `bits`.
        evaluations: how often the loss was measured.
    """

    bits: Array
    lowered: int
    reference: float
    loss: float
    evaluations: int

    def plan(
        self, geometry: Geometry, *, model: str, fingerprint: str | None, settings: dict[str, float | int | str]
    ) -> PrecisionPlan:
        """The plan to save, with how it was made."""
        layers = [
            PrecisionLayer(layer=number, bits=tuple(self.bits[geometry.keys(layer)].tolist()))
            for layer, number in enumerate(geometry.layers)
        ]
        return PrecisionPlan(
            model=model,
            fingerprint=fingerprint,
            layers=tuple(layers),
            settings=dict(settings),
            reference=self.reference,
            loss=self.loss,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            collegium=__version__,
        )


def fit_table(sensitivity: Array, bits: Sequence[int], evaluate: Evaluate, tolerated: float = 0.02) -> FittedTable:
    """Lower the least sensitive experts, as many as a tolerated loss allows.

    Args:
        sensitivity: ``[n]`` finite; only its order counts, of equals the lower key is lowered first.
        bits: the copies there are, most exact first.
        evaluate: measures a table. It is taken to rise as more experts are lowered.
        tolerated: rise of the loss, as a share of that of the most exact copies.

    Raises:
        ConfigError: `sensitivity` or `bits` are not as above, or `tolerated` is negative.
    """
    sensitivity = np.asarray(sensitivity, np.float64)
    n = len(sensitivity)
    if not n or not np.isfinite(sensitivity).all():
        raise ConfigError("sensitivity must be one finite number for each of at least one expert")
    if not bits or list(bits) != sorted(set(bits), reverse=True):
        raise ConfigError(f"bits are the copies there are, each once and the most exact first, not {list(bits)}")
    if not tolerated >= 0:
        raise ConfigError(f"the tolerated loss must be at least 0, not {tolerated}")
    order = np.argsort(sensitivity, kind="stable")
    losses: dict[tuple[int, int], float] = {}

    def table(high: int, lowered: int) -> Array:
        found = np.full(n, bits[high], np.uint8)
        if lowered:
            found[order[:lowered]] = bits[high + 1]
        return found

    def loss(high: int, lowered: int) -> float:
        if (high, lowered) not in losses:
            losses[high, lowered] = float(evaluate(table(high, lowered)))
        return losses[high, lowered]

    reference = loss(0, 0)
    most = reference + tolerated * abs(reference)
    high = 0
    while high + 1 < len(bits) and loss(high + 1, 0) <= most:
        high += 1
    # lowering `fits` is allowed and lowering `fails` is not; all of them is the next precision, which failed
    fits, fails = 0, n if high + 1 < len(bits) else 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if loss(high, middle) <= most else (fits, middle)
    return FittedTable(table(high, fits), fits, reference, loss(high, fits), len(losses))


def measured_sensitivity(n: int, high: int, low: int, evaluate: Evaluate) -> Array:
    """``[n]`` loss with each expert alone at `low` bits and the others at `high`, less that with all at `high`.

    This is the paper's; it measures n + 1 times.
    """
    bits = np.full(n, high, np.uint8)
    base = evaluate(bits)
    found = np.empty(n)
    for key in range(n):
        bits[key] = low
        found[key] = evaluate(bits.copy()) - base
        bits[key] = high
    return found


def weight_sensitivity(
    weights: Sequence[ExpertWeights], counts: Sequence[Array], bits: int, *, group: int = 0
) -> Array:
    """``[n]`` relative squared error of each expert's matrices at low precision, times its share of the tokens.

    It needs no evaluation: a cheap stand-in for `measured_sensitivity`.

    Args:
        weights: of each layer.
        counts: ``[E]`` of each layer: tokens that use each expert, as `Trace.counts` has them.
        bits, group: of the low copy; see `collegium.experts.stored`.
    """
    found = []
    for one, used in zip(weights, counts, strict=True):
        errors = np.zeros(one.num_experts)
        for expert in range(one.num_experts):
            lost = total = 0.0
            for matrix in (one.up_t[expert].T, one.down_t[expert].T):
                exact = matrix.detach().float().contiguous()
                lost += float((dequantise(*quantise(exact, bits, group), bits, group) - exact).square().sum())
                total += float(exact.square().sum())
            errors[expert] = lost / max(total, 1e-30)
        found.append(errors * np.asarray(used) / max(float(np.sum(used)), 1.0))
    return np.concatenate(found)
