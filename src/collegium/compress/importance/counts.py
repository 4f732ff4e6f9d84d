"""Scores from what the router does: how often and how surely it chooses an expert. They do not look at outputs.

Legend: E experts of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collegium.compress.importance.registry import importance
from collegium.measure.statistics import Statistics
from collegium.rng import generator

__all__ = ["frequency", "random", "router_probability", "tcess", "weighted_frequency"]


@importance("random", needs=(), paper="baseline")
def random(statistics: Statistics, layer: int, domain: str | None = None, *, seed: int = 0) -> Tensor:
    """``[E]`` uniform random numbers of (seed, layer): what every other score must beat."""
    E = next(entry.num_experts for entry in statistics.meta.layers if entry.layer == layer)
    return torch.rand(E, dtype=torch.float64, generator=generator("importance", seed, layer))


@importance("frequency", needs=("n",), paper="Z-code M3 (2021)", arxiv="2109.10465")
def frequency(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` tokens routed to each expert. Says little about a model that was trained with a strong balance loss."""
    return statistics.get(layer, "n", domain)


@importance("router_probability", needs=("p_sum", "n_tokens", "n"), paper="baseline")
def router_probability(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` mean router probability over all tokens, whether they chose the expert or not."""
    tokens = statistics.get(layer, "n_tokens", domain).clamp(min=1)
    return statistics.get(layer, "p_sum", domain) / tokens


@importance("weighted_frequency", needs=("w_sum", "n"), paper="DERN (2025)", arxiv="2509.10377")
def weighted_frequency(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` sum of the combine weights each expert was used with."""
    return statistics.get(layer, "w_sum", domain)


@importance("tcess", needs=("z_topk_sum", "n_tokens", "n"), paper="PreMoe (2025)", arxiv="2505.17639")
def tcess(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` task-conditioned expected selection score: the mean over all tokens of an expert's logit where it is
    among the token's largest, 0 elsewhere. Meant for the domain that the model is to serve."""
    tokens = statistics.get(layer, "n_tokens", domain).clamp(min=1)
    return statistics.get(layer, "z_topk_sum", domain) / tokens
