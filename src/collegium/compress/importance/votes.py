"""Scores from a vote: each token ranks the experts, and those with the fewest votes go first.

Legend: E experts of a layer, K experts a token chooses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collegium.compress.importance.registry import importance
from collegium.measure.statistics import Statistics

__all__ = ["ranked_choice"]


@importance("ranked_choice", needs=("ballots", "n"), paper="ModelOpt Puzzletron (2025)")
def ranked_choice(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` ranks, 1 for the expert that would go first: the one with the fewest top-K votes goes, its tokens vote
    for whom they rank next, and so on. The last K, who then have every vote, are ordered by the votes before that.

    Only how often each expert stands at each place is known, not whole ballots, so how many of those that went stood
    above an expert on a ballot is replaced by its mean over all ballots.
    """
    ballots = statistics.get(layer, "ballots", domain).double()
    E = len(ballots)
    K = next(entry.top_k for entry in statistics.meta.layers if entry.layer == layer)
    share = ballots / ballots.sum(0).clamp(min=1)  # of the tokens, who stands at a place
    place = torch.arange(E, dtype=torch.float64)
    gone = torch.zeros(E, dtype=torch.float64)  # share of the tokens with an expert that went at a place
    standing = torch.ones(E, dtype=torch.bool)
    score = torch.zeros(E, dtype=torch.float64)
    votes = _votes(ballots, place, gone, K)
    for turn in range(1, E - K + 1):
        votes = _votes(ballots, place, gone, K)
        loser = votes.masked_fill(~standing, torch.inf).argmin()
        score[loser], standing[loser] = turn, False
        gone += share[loser]
    last = standing.nonzero().squeeze(1)
    score[last[votes[last].argsort(stable=True)]] = torch.arange(len(last), dtype=torch.float64) + (E - len(last) + 1)
    return score


def _votes(ballots: Tensor, place: Tensor, gone: Tensor, K: int) -> Tensor:
    """``[E]`` ballots on which each expert is among the first K of those that are left."""
    above = gone.cumsum(0) - gone
    return (ballots * (K - (place - above)).clamp(0, 1)).sum(1)
