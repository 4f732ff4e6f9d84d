"""Counts of experts by a key, and the shares they make when a coarser guess backs them off.

Legend: N tokens counted, T tokens asked about, K slots, E experts of a layer, M keys that were met.
"""

from __future__ import annotations

import numpy as np

from collegium.offload.geometry import Array

__all__ = ["CountTable", "shares"]

_BACK_OFF = 1.0  # tokens that the coarser guess counts as


def shares(experts: Array, E: int) -> Array:
    """``[E]`` float32: how many tokens of ``experts [N, K]`` use each expert, of one; even shares where N is 0."""
    counts = np.bincount(experts.reshape(-1), minlength=E)[:E]
    if not counts.any():
        return np.full(E, 1 / E, np.float32)
    return (counts / len(experts)).astype(np.float32)


class CountTable:
    """How often each expert was used with each key; only what occurred takes memory.

    Args:
        keys: ``[N]`` int64.
        experts: ``[N, K]`` ids used with each, >= E in unused slots.
        E: experts.
    """

    def __init__(self, keys: Array, experts: Array, E: int) -> None:
        self._E = E
        self._keys, row, met = np.unique(keys, return_inverse=True, return_counts=True)
        self._met = met.astype(np.float32)
        used = experts < E
        pairs = np.repeat(row, used.sum(1)) * E + experts[used].astype(np.int64)
        cells, counts = np.unique(pairs, return_counts=True)
        self._expert, self._count = cells % E, counts.astype(np.float32)
        self._ends = np.searchsorted(cells, np.arange(len(self._keys) + 1) * E)

    def __len__(self) -> int:
        return len(self._keys)

    def rates(self, keys: Array, back_off: Array) -> Array:
        """``[T, E]`` share of the tokens of each key that use each expert, the back-off counting as one token more.

        Args:
            keys: ``[T]`` int64; the back-off alone stands for one that was never met.
            back_off: ``[T, E]`` or ``[E]`` shares of a coarser guess.
        """
        rates = np.empty((len(keys), self._E), np.float32)
        rates[:] = back_off * _BACK_OFF
        if not len(self):
            return rates / np.float32(_BACK_OFF)
        row = np.minimum(np.searchsorted(self._keys, keys), len(self) - 1)
        known = np.flatnonzero(self._keys[row] == keys)
        first, size = self._ends[row[known]], self._ends[row[known] + 1] - self._ends[row[known]]
        # cell j of the t-th known key, for all t and j at once
        cell = np.arange(size.sum()) + np.repeat(first - (np.cumsum(size) - size), size)
        rates[np.repeat(known, size), self._expert[cell]] += self._count[cell]
        met = np.zeros(len(keys), np.float32)
        met[known] = self._met[row[known]]
        return rates / (met + np.float32(_BACK_OFF))[:, None]
