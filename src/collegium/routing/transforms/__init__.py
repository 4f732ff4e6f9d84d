"""Between score and selection: each changes what the selection looks at, or more."""

from __future__ import annotations

from collegium.routing.transforms.document_pool import DocumentPool
from collegium.routing.transforms.gating_residual import GatingResidual
from collegium.routing.transforms.group_limit import GroupLimit
from collegium.routing.transforms.logit_selection import LogitSelection
from collegium.routing.transforms.selection_bias import SelectionBias
from collegium.routing.transforms.sinkhorn import SelectiveSinkhorn
from collegium.routing.transforms.token_mix import AttentionMix, SimilarityMix

__all__ = [
    "AttentionMix",
    "DocumentPool",
    "GatingResidual",
    "GroupLimit",
    "LogitSelection",
    "SelectionBias",
    "SelectiveSinkhorn",
    "SimilarityMix",
]
