"""Taps that are useful as they are, and short enough to copy: `Recorder`, `GateInputs`, `SwitchOff`.

Legend: T tokens, E experts, A assignments, d model width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from collegium.errors import ConfigError
from collegium.routing import Routing
from collegium.sites.site import Site
from collegium.sites.tap import Order

__all__ = ["GateInputs", "Recorder", "SwitchOff"]


@dataclass
class Recorder:
    """Keeps every routing, detached: ``recorder.routings[site.path]`` has one entry for each forward."""

    routings: dict[str, list[Routing]] = field(default_factory=dict)

    def __call__(self, site: Site, x: Tensor, routing: Routing) -> None:
        self.routings.setdefault(site.path, []).append(_detached(routing))

    def counts(self, path: str) -> Tensor:
        """``[E]`` int64: assignments per expert over all forwards, those a capacity dropped included."""
        return torch.stack([routing.counts() for routing in self.routings[path]]).sum(0)


@dataclass
class GateInputs:
    """Keeps what the gates decided on, ``[T, d]`` for each forward, for some layers or (None) all of them."""

    layers: Collection[int] | None = None
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    view = "gate"

    def __call__(self, site: Site, x: Tensor, routing: Routing) -> None:
        if self.layers is None or site.layer in self.layers:
            self.inputs.setdefault(site.path, []).append(x.detach().clone())


@dataclass
class SwitchOff:
    """Removes every assignment of some experts, as if they did not exist.

    A token that loses all its experts gets a routed output of zero (shared experts and the residual stay).

    Attributes:
        experts: layer number -> ids to switch off; a site's path in place of the number where layers repeat. Empty is
            the neutral setting: outputs stay bit-identical.
        renormalise: scale what is left of a token's weights so that their sum stays what it was.

    Raises:
        ConfigError: on entering `tap`, when the model has no such layer or expert, or a layer number is not enough to
            name a site.
    """

    experts: Mapping[int | str, Collection[int]]
    renormalise: bool = True
    order = Order.SWITCH

    def check(self, sites: list[Site]) -> None:
        for key, ids in self.experts.items():
            named = [site for site in sites if key in (site.layer, site.path)]
            if len(named) != 1:
                among = ", ".join(site.path for site in named or sites)
                raise ConfigError(f"{key!r} names {len(named)} MoE blocks, not one; give the path of one of: {among}")
            wrong = [e for e in ids if not 0 <= e < named[0].num_experts]
            if wrong:
                raise ConfigError(f"{named[0].path} has experts 0 to {named[0].num_experts - 1}, not {wrong}")

    def __call__(self, site: Site, x: Tensor, routing: Routing) -> Routing | None:
        off = [*self.experts.get(site.layer, ()), *self.experts.get(site.path, ())]
        if not off:
            return None
        keep = ~torch.isin(routing.expert, torch.tensor(off, dtype=torch.long, device=routing.expert.device))
        if bool(keep.all()):
            return None
        token, weight = routing.token[keep], routing.weight[keep]
        kept = None if routing.kept is None else routing.kept[keep]
        if self.renormalise:
            left = _sums(token, weight if kept is None else weight * kept, routing.num_tokens)
            alive = routing.weight if routing.kept is None else routing.weight * routing.kept
            scale = _sums(routing.token, alive, routing.num_tokens) / left.where(left != 0, 1)
            weight = (weight * scale[token]).to(routing.weight.dtype)
        return replace(routing, expert=routing.expert[keep], weight=weight, slots=None, ragged_token=token, kept=kept)


def _detached(routing: Routing) -> Routing:
    detached: dict[str, Any] = {}
    for one in fields(routing):
        value = getattr(routing, one.name)
        detached[one.name] = value.detach() if isinstance(value, Tensor) else value
    return Routing(**detached)


def _sums(token: Tensor, weight: Tensor, num_tokens: int) -> Tensor:
    """``[T]`` float32: the sum of each token's weights."""
    return weight.new_zeros(num_tokens, dtype=torch.float32).index_add(0, token, weight.float())
