"""Scores from what experts put out: mostly norms of their outputs ``y``, over the tokens that were routed to them.

Sums count an expert's use, means do not: which wins depends on how uneven the load is and on whether the plan is for
one task or for all.

Legend: E experts of a layer, w combine weight.
"""

from __future__ import annotations

from torch import Tensor

from collegium.compress.importance.registry import importance
from collegium.measure.statistics import Statistics

__all__ = ["ean_sum", "easy_ep", "leave_one_out", "man", "max_activations", "msan", "reap", "weighted_ean_sum"]


def _mean(statistics: Statistics, name: str, layer: int, domain: str | None) -> Tensor:
    """A sum over the tokens of each expert, as a mean; 0 for an expert without tokens."""
    return statistics.get(layer, name, domain) / statistics.get(layer, "n", domain).clamp(min=1)


@importance("reap", needs=("w_ean_sum", "n"), paper="REAP the Experts (2025)", arxiv="2510.13999")
def reap(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` mean of ``w ||y||`` over an expert's tokens."""
    return _mean(statistics, "w_ean_sum", layer, domain)


@importance("weighted_ean_sum", needs=("w_ean_sum", "n"), paper="REAP the Experts (2025)", arxiv="2510.13999")
def weighted_ean_sum(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` sum of ``w ||y||``: REAP before it is divided by the number of tokens."""
    return statistics.get(layer, "w_ean_sum", domain)


@importance("ean_sum", needs=("ean_sum", "n"), paper="REAP the Experts (2025)", arxiv="2510.13999")
def ean_sum(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` sum of ``||y||``, the expert activation norm."""
    return statistics.get(layer, "ean_sum", domain)


@importance("man", needs=("ean_sum", "n"), paper="Mean activation norm (2026)", arxiv="2606.15716")
def man(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` mean of ``||y||``: neither use nor gate weights count, meant for plans that serve every task."""
    return _mean(statistics, "ean_sum", layer, domain)


@importance("msan", needs=("ean_sq_sum", "n"), paper="Mean squared activation norm (2026)", arxiv="2606.15716")
def msan(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` mean of ``||y||^2``."""
    return _mean(statistics, "ean_sq_sum", layer, domain)


@importance("easy_ep", needs=("easy_sum", "n"), paper="EASY-EP (2025)", arxiv="2504.06792")
def easy_ep(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` sum of ``a w ||y||``, where `a` is how far the routed experts turn the token's residual stream. Meant for
    a few documents of one domain that hold the model's own answers."""
    return statistics.get(layer, "easy_sum", domain)


@importance("max_activations", needs=("down_max", "n"), paper="REAP the Experts (2025)", arxiv="2510.13999")
def max_activations(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` largest absolute value of y in any channel, what super experts are told by. REAP's code takes the largest
    value, whatever its sign. Over all domains together only."""
    return statistics.get(layer, "down_max", domain)


@importance("leave_one_out", needs=("loo_mse", "n_tokens", "n"), paper="ModelOpt Puzzletron (2025)")
def leave_one_out(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` mean over all tokens of the squared error that the routed output makes when an expert is left out and the
    next best steps in: the error over the expert's own tokens, weighted by the share of tokens that it displaces."""
    tokens = statistics.get(layer, "n_tokens", domain).clamp(min=1)
    return statistics.get(layer, "loo_mse", domain) / tokens
