"""Between score and selection: each changes what the selection looks at, or more."""

from __future__ import annotations

from collegium.routing.transforms.group_limit import GroupLimit
from collegium.routing.transforms.logit_selection import LogitSelection
from collegium.routing.transforms.selection_bias import SelectionBias

__all__ = ["GroupLimit", "LogitSelection", "SelectionBias"]
