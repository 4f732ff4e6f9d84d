"""Names of policies on a command line."""

from __future__ import annotations

import importlib
import pkgutil

from collegium.named import find_named
from collegium.offload.policies.base import PolicySettings

__all__ = ["find_policy"]


def find_policy(text: str) -> PolicySettings:
    """The settings that a text such as ``"lru"`` or ``"hobbit:w1=0.5,w2=0.5"`` names.

    Raises:
        ConfigError: an unknown policy or setting, with those there are; or a value that does not fit.
    """
    # the catalogue would import every room, torch with them, to find a name that no import has announced yet
    package = "collegium.offload.policies"
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
    found: PolicySettings = find_named("cache", text)
    return found
