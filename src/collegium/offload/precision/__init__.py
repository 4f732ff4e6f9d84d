"""Precision policies: which copy of an expert a token gets."""

from __future__ import annotations

from collegium.named import find_named
from collegium.offload.precision.base import PrecisionSettings

__all__ = ["find_precision"]


def find_precision(text: str) -> PrecisionSettings:
    """Settings of a policy from ``"name:key=value,key=value"``, such as ``"hobbit:t1=0.6,t2=0.9"``.

    Raises:
        ConfigError: there is no such policy or setting, or a value is not allowed; what there is is listed.
    """
    found: PrecisionSettings = find_named("precision", text, __name__)
    return found
