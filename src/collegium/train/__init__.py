"""The training loop and what belongs to it: recipes, schedules, evaluation, checkpoints, metrics."""

from __future__ import annotations

from collegium.train.build import build_model, count_parameters, dense_twin
from collegium.train.evaluate import Evaluation, evaluate
from collegium.train.loop import train
from collegium.train.metrics import read_metrics
from collegium.train.recipe import Recipe

__all__ = [
    "Evaluation",
    "Recipe",
    "build_model",
    "count_parameters",
    "dense_twin",
    "evaluate",
    "read_metrics",
    "train",
]
