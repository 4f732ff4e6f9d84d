"""Importance scores: pure functions of the statistics that say what each expert is worth."""

from collegium.compress.importance import counts, norms
from collegium.compress.importance.registry import Importance, find_importance, importance, importances

__all__ = ["Importance", "counts", "find_importance", "importance", "importances", "norms"]
