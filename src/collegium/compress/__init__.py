"""Fewer and smaller experts: statistics -> importance -> a plan -> a checkpoint that loads anywhere."""

from __future__ import annotations

from collegium.compress.collectors import COLLECTORS, collectors_for
from collegium.compress.compressed_experts import install_compressed, tune_compressed
from collegium.compress.factor import factor_plan
from collegium.compress.importance import find_importance
from collegium.compress.mask import apply_mask
from collegium.compress.own import load_own, save_own_model
from collegium.compress.own_write import save_own
from collegium.compress.plan import LayerPlan, Plan, diff
from collegium.compress.planners import Budget, GlobalFloor, Uniform, make_plan
from collegium.compress.rewrite import apply_plan
from collegium.compress.stream import calibrate
from collegium.compress.target import Target

__all__ = [
    "COLLECTORS",
    "Budget",
    "GlobalFloor",
    "LayerPlan",
    "Plan",
    "Target",
    "Uniform",
    "apply_mask",
    "apply_plan",
    "calibrate",
    "collectors_for",
    "diff",
    "factor_plan",
    "find_importance",
    "install_compressed",
    "load_own",
    "make_plan",
    "save_own",
    "save_own_model",
    "tune_compressed",
]
