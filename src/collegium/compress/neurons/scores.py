"""Neuron scores. The neurons of shared experts are not scored: statistics are of routed experts.

Legend: E experts of a layer, f expert width, h what goes into an expert's down projection, L the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collegium.compress.neurons.registry import neuron_score
from collegium.measure.statistics import Statistics
from collegium.rng import generator

__all__ = ["heapr", "heapr_per_token", "minitron", "random"]


def _mean(statistics: Statistics, name: str, layer: int) -> Tensor:
    """``[E, f]`` a sum over the tokens of each expert, as a mean; 0 for an expert without tokens."""
    return statistics.get(layer, name) / statistics.get(layer, "n").clamp(min=1)[:, None]


def _frequency(statistics: Statistics, layer: int) -> Tensor:
    """``[E, 1]`` share of the tokens that reach each expert."""
    share = statistics.get(layer, "n") / statistics.get(layer, "n_tokens").clamp(min=1)
    return share[:, None]


@neuron_score("heapr", needs=("h_sq", "dh_sq", "n", "n_tokens"), in_loss=True, paper="HEAPr (2025)", arxiv="2509.22299")
def heapr(statistics: Statistics, layer: int, *, weight_by_frequency: bool = False) -> Tensor:
    """``[E, f]`` ``mean(h^2) * mean((dL/dh)^2)`` over an expert's tokens: the second-order increase of the loss when
    the neuron goes, the factor 1/2 left out, with the Fisher matrix of the expert's output in place of the Hessian.

    Args:
        weight_by_frequency: multiply by the share of the tokens that reach the expert; the paper's score is that of a
            token that does.
    """
    score = _mean(statistics, "h_sq", layer) * _mean(statistics, "dh_sq", layer)
    return score * _frequency(statistics, layer) if weight_by_frequency else score


@neuron_score(
    "heapr_per_token",
    needs=("hdh_sq", "n", "n_tokens"),
    in_loss=True,
    paper="HEAPr (2025), variant",
    arxiv="2509.22299",
)
def heapr_per_token(statistics: Statistics, layer: int, *, weight_by_frequency: bool = False) -> Tensor:
    """``[E, f]`` ``mean(h^2 (dL/dh)^2)``: as `heapr`, without taking activation and gradient for independent."""
    score = _mean(statistics, "hdh_sq", layer)
    return score * _frequency(statistics, layer) if weight_by_frequency else score


@neuron_score("minitron", needs=("h_sq", "h_abs", "n"), paper="Minitron (2024)", arxiv="2407.14679")
def minitron(statistics: Statistics, layer: int, *, absolute: bool = False) -> Tensor:
    """``[E, f]`` magnitude of the activation over an expert's tokens: ``sqrt(mean(h^2))``, or ``mean(|h|)``.

    ModelOpt takes the mean of |h| in each batch and the root of the sum of their squares: the first of the two where a
    batch is one token, the second where it is all of them.

    Args:
        absolute: the second.
    """
    return _mean(statistics, "h_abs", layer) if absolute else _mean(statistics, "h_sq", layer).sqrt()


@neuron_score("random", needs=(), paper="baseline")
def random(statistics: Statistics, layer: int, *, seed: int = 0) -> Tensor:
    """``[E, f]`` uniform random numbers of (seed, layer): what every other score must beat."""
    entry = next(entry for entry in statistics.meta.layers if entry.layer == layer)
    shape = (entry.num_experts, entry.intermediate_size)
    return torch.rand(*shape, dtype=torch.float64, generator=generator("neurons", seed, layer))
