"""Selection scores -> the experts of each token."""

from __future__ import annotations

from collegium.routing.selection.expert_choice import ExpertChoice
from collegium.routing.selection.grouped import GroupedTopK
from collegium.routing.selection.random_expert import RandomExpert
from collegium.routing.selection.sparse_mixer import SparseMixer, SparseMixerWeights
from collegium.routing.selection.top_p import TopP
from collegium.routing.selection.topk import TopK

__all__ = ["ExpertChoice", "GroupedTopK", "RandomExpert", "SparseMixer", "SparseMixerWeights", "TopK", "TopP"]
