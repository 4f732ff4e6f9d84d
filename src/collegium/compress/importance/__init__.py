"""Importance scores: pure functions of the statistics that say what each expert is worth."""

from __future__ import annotations

from collegium.compress.importance import counts, gradients, norms, votes
from collegium.compress.importance.advice import Advice, advise
from collegium.compress.importance.registry import Importance, find_importance, importance, importances

__all__ = [
    "Advice",
    "Importance",
    "advise",
    "counts",
    "find_importance",
    "gradients",
    "importance",
    "importances",
    "norms",
    "votes",
]
