"""Selection scores -> the experts of each token."""

from __future__ import annotations

from collegium.routing.selection.sparse_mixer import SparseMixer, SparseMixerWeights
from collegium.routing.selection.topk import TopK

__all__ = ["SparseMixer", "SparseMixerWeights", "TopK"]
