"""Planners: scores to a plan. They only ever emit plans and change nothing."""

from collegium.compress.planners.budget import Budget
from collegium.compress.planners.choose import Choice, Planner, Protected
from collegium.compress.planners.global_floor import GlobalFloor
from collegium.compress.planners.make import make_plan
from collegium.compress.planners.scores import Combine, LayerScores, layer_scores
from collegium.compress.planners.uniform import Uniform

__all__ = [
    "Budget",
    "Choice",
    "Combine",
    "GlobalFloor",
    "LayerScores",
    "Planner",
    "Protected",
    "Uniform",
    "layer_scores",
    "make_plan",
]
