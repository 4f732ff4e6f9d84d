"""Predictors of the experts that coming layers will need."""

from __future__ import annotations

from collegium.named import find_named
from collegium.offload.predictors.base import PredictorSettings

__all__ = ["find_predictor"]


def find_predictor(text: str) -> PredictorSettings:
    """Settings of a predictor from ``"name:key=value,key=value"``, such as ``"gate_reuse:depth=2"``.

    Raises:
        ConfigError: there is no such predictor or setting, or a value is not allowed; what there is is listed.
    """
    found: PredictorSettings = find_named("predictor", text, __name__)
    return found
