"""Scores from what the router does: how often and how surely it chooses an expert. They do not look at outputs.

Legend: E experts of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collegium.compress.importance.registry import importance
from collegium.measure.statistics import Statistics
from collegium.rng import generator

__all__ = ["dern", "frequency", "mc_smoe", "random", "router_probability", "tcess", "weighted_frequency", "z_code"]


@importance("random", needs=(), paper="baseline")
def random(statistics: Statistics, layer: int, domain: str | None = None, *, seed: int = 0) -> Tensor:
    """``[E]`` uniform random numbers of (seed, layer): what every other score must beat."""
    E = next(entry.num_experts for entry in statistics.meta.layers if entry.layer == layer)
    return torch.rand(E, dtype=torch.float64, generator=generator("importance", seed, layer))


@importance("frequency", needs=("n",), paper="baseline")
def frequency(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` tokens routed to each expert. Says little about a model that was trained with a strong balance loss."""
    return statistics.get(layer, "n", domain)


@importance("z_code", needs=("n", "n_tokens"), paper="Z-code M3 (2021)", arxiv="2109.10465")
def z_code(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` utilisation: the share of the tokens that is dispatched to each expert, in sum K. Inside a layer the
    order is that of `frequency`."""
    tokens = statistics.get(layer, "n_tokens", domain).clamp(min=1)
    return statistics.get(layer, "n", domain) / tokens


@importance("mc_smoe", needs=("n",), paper="MC-SMoE (2023)", arxiv="2310.01334")
def mc_smoe(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` usage: each expert's share of the layer's assignments, in sum 1, so that layers compare. Inside a layer
    the order is that of `frequency`."""
    n = statistics.get(layer, "n", domain)
    return n / n.sum().clamp(min=1)


@importance("router_probability", needs=("p_sum", "n_tokens", "n"), paper="baseline")
def router_probability(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` mean router probability over all tokens, whether they chose the expert or not."""
    tokens = statistics.get(layer, "n_tokens", domain).clamp(min=1)
    return statistics.get(layer, "p_sum", domain) / tokens


@importance("weighted_frequency", needs=("w_sum", "n"), paper="REAP the Experts (2025)", arxiv="2510.13999")
def weighted_frequency(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` sum of the combine weights each expert was used with."""
    return statistics.get(layer, "w_sum", domain)


@importance("dern", needs=("w_share_sum", "n_tokens", "n"), paper="DERN (2025)", arxiv="2509.10377")
def dern(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` frequency times strength: the mean over all tokens of an expert's combine weight as a share of the
    token's weights, in sum 1. Where the model renormalises its weights itself, the order is that of
    `weighted_frequency`."""
    tokens = statistics.get(layer, "n_tokens", domain).clamp(min=1)
    return statistics.get(layer, "w_share_sum", domain) / tokens


@importance("tcess", needs=("z_topk_sum", "n_tokens", "n"), paper="PreMoe (2025)", arxiv="2505.17639")
def tcess(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` task-conditioned expected selection score: the mean over all tokens of an expert's logit where it is
    among the token's largest, 0 elsewhere. Meant for the domain that the model is to serve."""
    tokens = statistics.get(layer, "n_tokens", domain).clamp(min=1)
    return statistics.get(layer, "z_topk_sum", domain) / tokens
