"""ExpertFlow's token scheduler: two batches are sorted into two of like routing, so that each touches fewer experts.

Two balanced medoids over the routing paths of 2B sequences: each sequence joins the more alike of two medoids, the
group that is over-full keeps the B most alike and hands over the rest, and the member most alike to all of its group
becomes its medoid. Nothing but the order of sequences changes.

Legend: S = 2B sequences, P places of a path (layers x experts).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.offload.geometry import Array
from collegium.rng import seed_of

__all__ = ["Regroup"]


@method("regroup", kind="scheduler", paper="ExpertFlow (2024)", arxiv="2410.17954")
@dataclass(frozen=True)
class Regroup:
    """Two batches into two of like routing.

    Attributes:
        seed: of the first medoids.
        rounds: at most, at least 1.
    """

    seed: int = 0
    rounds: int = 20

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1, not {self.rounds}")

    def order(self, paths: Array) -> Array:
        """The order in which to batch sequences: the first B of it, then the others.

        Args:
            paths: ``[S, P]`` bool, the experts that each sequence uses or is predicted to; S is even.

        Returns:
            ``[S]`` permutation; within a batch sequences keep their order, and the batch with sequence 0 comes first.
            It is never less alike within its batches than the order that came in.

        Raises:
            ConfigError: S is odd.
        """
        S = len(paths)
        if S % 2:
            raise ConfigError(f"{S} sequences cannot be split into two batches of one size")
        if S < 4:
            return np.arange(S)
        used = paths.astype(np.float32)
        # places that agree: both used or both unused
        alike = used @ used.T + (1 - used) @ (1 - used).T
        best = np.arange(S) >= S // 2
        most = _within(alike, best)
        medoids = np.random.default_rng(seed_of("regroup", self.seed)).choice(S, 2, replace=False)
        for _ in range(self.rounds):
            second = _balanced(alike, medoids)
            if (found := _within(alike, second)) > most:
                best, most = second, found
            groups = (np.flatnonzero(~second), np.flatnonzero(second))
            renewed = np.array([group[alike[np.ix_(group, group)].sum(1).argmax()] for group in groups])
            if (renewed == medoids).all():
                break
            medoids = renewed
        return np.argsort(best != best[0], kind="stable")


def _balanced(alike: Array, medoids: Array) -> Array:
    """``[S]`` bool: in the second group, that of the second medoid; half of all are."""
    half = len(alike) // 2
    second = alike[:, medoids[1]] > alike[:, medoids[0]]
    full = int(second.sum() > half)
    members = np.flatnonzero(second == bool(full))
    nearest_first = members[np.argsort(-alike[members, medoids[full]], kind="stable")]
    second[nearest_first[half:]] = not full
    return second


def _within(alike: Array, second: Array) -> float:
    """Similarity between all members of the same group."""
    same = second[:, None] == second[None, :]
    return float(alike[same].sum())
