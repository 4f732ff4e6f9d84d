"""Factorisations: the matrices of an expert become products of smaller ones."""

from __future__ import annotations

from collegium.compress.factor.mc_smoe import McSmoe
from collegium.compress.factor.planner import factor_plan
from collegium.compress.factor.registry import Factor, factors, find_factor
from collegium.compress.factor.svd import Svd, WhitenedSvd

__all__ = ["Factor", "McSmoe", "Svd", "WhitenedSvd", "factor_plan", "factors", "find_factor"]
