"""A router from plain data: its parts by their catalogued names, as a recipe or a model's config holds them.

score: sigmoid
transforms: [bias, {group_limit: {groups: 8, keep: 4}}]
select: {top_k: 8}
weigh: {normalise: true, scale: 2.5}
capacity: {position: {capacity_factor: 1.25}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collegium.errors import ConfigError
from collegium.named import nearest, one_named
from collegium.routing.router import Router
from collegium.routing.selection import TopK
from collegium.routing.weighing import Raw, Renormalised

__all__ = ["KEYS", "router_from"]

KEYS = ("score", "transforms", "select", "weigh", "capacity", "bias")


def router_from(
    said: Mapping[str, Any], hidden_size: int, num_experts: int, top_k: int, *, num_true: int | None = None
) -> Router:
    """The router that plain data describes.

    Args:
        said: ``score``: logits -> probabilities, softmax unless said. ``transforms``: a list of what lies between.
            ``select``: who is chosen, top_k unless said; ``{top_k: N}`` sets K. ``weigh``: a part, or ``normalise``
            (divide by the sum over the chosen, true unless said), and ``scale``. ``capacity``: who is dropped; nobody
            unless said. ``bias``: whether logits have a trained bias. A part is a name or ``{name: {setting: value}}``.
        hidden_size, num_experts, num_true: of the layer, its zero-computation experts included.
        top_k: K of the layer, where `said` sets none.

    Raises:
        ConfigError: an unknown key, part or setting (the message names the nearest), or parts that do not fit one
            another or the layer.
    """
    if unknown := [key for key in said if key not in KEYS]:
        raise ConfigError(f"router: no key is named {unknown[0]!r}; {nearest(str(unknown[0]), KEYS)}")
    transforms = said.get("transforms") or []
    if not isinstance(transforms, list | tuple):
        raise ConfigError(f"router.transforms: write a list of parts, not {transforms!r}")
    selection = one_named("selection", said.get("select", "top_k"), "router.select")
    weigh, scale = _weigh(said.get("weigh", {}))
    return Router(
        hidden_size,
        num_experts,
        selection.top_k if isinstance(selection, TopK) and selection.top_k is not None else top_k,
        score=one_named("score", said.get("score", "softmax"), "router.score"),
        transforms=[one_named("transform", one, "router.transforms") for one in transforms],
        selection=TopK() if isinstance(selection, TopK) else selection,
        weigh=weigh,
        capacity=None if said.get("capacity") is None else one_named("capacity", said["capacity"], "router.capacity"),
        num_true=num_true,
        routed_scaling_factor=scale,
        bias=bool(said.get("bias", False)),
    )


def _weigh(said: Any) -> tuple[Any, float]:
    """The part that weighs, and what its weights are multiplied by."""
    if isinstance(said, str):
        return one_named("weigh", said, "router.weigh"), 1.0
    if not isinstance(said, Mapping):
        raise ConfigError(f"router.weigh: write a part, or normalise and scale, not {said!r}")
    rest = dict(said)
    scale, normalise = rest.pop("scale", 1.0), rest.pop("normalise", None)
    if not isinstance(scale, int | float) or not scale > 0:
        raise ConfigError(f"router.weigh.scale: it is a number above 0, not {scale!r}")
    if not rest:
        return (Raw() if normalise is False else Renormalised(epsilon=1e-20)), float(scale)
    if normalise is not None:
        raise ConfigError(f"router.weigh: normalise is not for {next(iter(rest))!r}, which weighs in its own way")
    return one_named("weigh", rest, "router.weigh"), float(scale)
