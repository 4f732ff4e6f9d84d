"""`System`: a published way to route and balance, as settings of the parts there are.

Legend: E experts of a plain layer, K of them active for a token, f their width.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from collegium.catalog import methods
from collegium.errors import ConfigError
from collegium.named import nearest, one_named
from collegium.routing.config import KEYS

__all__ = ["Layer", "System", "expand"]


@dataclass(frozen=True)
class Layer:
    """The plain MoE layer that a system takes the place of.

    Attributes:
        num_experts, num_experts_per_tok, moe_intermediate_size: E, K, f.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int

    def joined(self, system: str) -> dict[str, Any]:
        """The fields of a layer of one expert a token, K times as wide and 1 / K as many.

        Raises:
            ConfigError: K does not divide E; `system` asks.
        """
        E, K = self.num_experts, self.num_experts_per_tok
        if E % K:
            raise ConfigError(f"{system}: {E} experts cannot be joined by {K} to experts {K} times as wide")
        return {
            "num_experts": E // K,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": K * self.moe_intermediate_size,
        }


@dataclass(frozen=True)
class System(ABC):
    """Settings of a system."""

    @abstractmethod
    def settings(self, layer: Layer) -> dict[str, Any]:
        """Fields of `MoEConfig` that make a layer of about the same computation; ``router`` and ``balance`` as wholes,
        the others where they are not those of `layer`.

        Raises:
            ConfigError: such a layer cannot be built.
        """


def expand(moe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `MoEConfig` with a system's name, in ``router``, replaced by what it stands for. ``{"router":
    "ssr"}`` or ``{"router": {"ssr": {setting: value}}}``; a router that is made of parts stays as it is.

    Raises:
        ConfigError: there is no such system or setting, or it does not fit the layer.
    """
    said = moe.get("router")
    if said is None or (isinstance(said, Mapping) and (not said or any(key in KEYS for key in said))):
        return dict(moe)
    name = said if isinstance(said, str) else next(iter(said))
    known = [one.name for one in methods("system")]
    if name not in known:
        hint = nearest(str(name), [*known, *([] if isinstance(said, str) else KEYS)])
        raise ConfigError(f"router: {name!r} is neither a system nor a key; {hint}")
    system: System = one_named("system", said, "router")
    names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    if missing := [one for one in names if not isinstance(moe.get(one), int)]:
        raise ConfigError(f"router {name!r} starts from a plain layer; say its {', '.join(missing)}")
    found = system.settings(Layer(*(moe[one] for one in names)))
    # a plain layer's sizes are what a system starts from; whatever else was said it would silently undo
    if undone := [one for one in found if one in moe and one not in (*names, "router") and moe[one] != found[one]]:
        warnings.warn(
            f"router {name!r} says {', '.join(undone)} itself, in place of what is there; settings of the system go "
            f"with it, as router: {{{name}: {{setting: value}}}}",
            stacklevel=2,
        )
    return {**moe, "router": {}, **found}
