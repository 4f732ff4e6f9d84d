"""The suite that anybody can run on a router: over all systems, over parts alone, and over routers that break it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from collegium.catalog import methods
from collegium.routing import Router, router_from
from collegium.routing.parts import Scores, Selection, Transform
from collegium.routing.record import RoutingContext
from collegium.routing.selection import TopK
from collegium.systems import Layer
from collegium.testing import check_router, router_checks


def of_system(name: str, **settings: Any) -> Callable[[int, int, int], Router]:
    """What makes the router of a system, for so many experts in all."""
    [system] = [one.obj for one in methods("system") if one.name == name]

    def make(d: int, E: int, K: int) -> Router:
        found = system(**settings).settings(Layer(12, 2, 8))
        zero = len(found.get("zero_experts", ()))
        return router_from(found["router"], d, E, K, num_true=E - zero)

    return make


EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "adamoe": [{"null": 4}],
    "ssr": [{"probability": 0.0}, {"probability": 1.0}],
    "thor": [{"inference": mode} for mode in ("token", "sequence", "ensemble")],
}
"""Settings to test where the defaults do not do, or are not all there is."""

SYSTEMS = [(one.name, settings) for one in methods("system") for settings in EXAMPLES.get(one.name, [{}])]


@pytest.mark.parametrize("check", router_checks(), ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "settings"), SYSTEMS, ids=[f"{name} {settings or ''}" for name, settings in SYSTEMS])
def test_systems(name: str, settings: dict[str, Any], check: Callable[[Any], None]) -> None:
    if settings.get("probability") == 1.0 and check.__name__ == "check_gradient":
        pytest.skip("the transport plan of such a step carries no gradient")
    check(of_system(name, **settings))


PARTS: list[dict[str, Any]] = [
    {"transforms": ["logit_selection"], "weigh": "softmax_selected"},
    {"score": "sigmoid", "transforms": ["bias", {"group_limit": {"groups": 3, "keep": 2}}], "weigh": {"scale": 2.5}},
    {"select": {"top_p": 0.9}, "capacity": "priority"},
    {"capacity": {"random": {"eval_capacity_factor": 1.0}}},
    {"select": "random_expert"},
    {"select": {"random_expert": {"unit": "token"}}},
    {"select": {"random_expert": {"inference": "sequence"}}},
    {"select": {"random_expert": {"inference": "ensemble"}}, "weigh": "even"},
    {"transforms": ["logit_selection"], "select": {"sparse_mixer": 0.1}, "weigh": {"sparse_mixer": 0.1}},
]


@pytest.mark.parametrize("said", PARTS, ids=str)
def test_parts(said: dict[str, Any]) -> None:
    check_router(lambda d, E, K: router_from(said, d, E, K))


@dataclass(frozen=True)
class Twice(Selection):
    """The best expert, in all slots."""

    def __call__(self, scores: Scores, top_k: int, context: RoutingContext) -> Tensor:
        return scores.selection.argmax(-1, keepdim=True).expand(-1, top_k)


@dataclass(frozen=True)
class Peeks(Transform):
    """Looks at the next token."""

    def __call__(self, scores: Scores, context: RoutingContext) -> Scores:
        return replace(scores, selection=scores.selection + scores.selection.roll(-1, 0))


@dataclass(frozen=True)
class ByPlace(Selection):
    """The expert whose turn it is, by a token's place in the forward."""

    symmetric = False

    def __call__(self, scores: Scores, top_k: int, context: RoutingContext) -> Tensor:
        T, E = scores.selection.shape
        return (torch.arange(T)[:, None] + torch.arange(top_k)) % E


@dataclass(frozen=True)
class Noisy(Transform):
    """Draws from the global random state."""

    def __call__(self, scores: Scores, context: RoutingContext) -> Scores:
        return replace(scores, selection=scores.selection + torch.rand_like(scores.selection))


@dataclass(frozen=True)
class Partial(Transform):
    """Likes experts with low numbers, and says that it has no favourites."""

    def __call__(self, scores: Scores, context: RoutingContext) -> Scores:
        return replace(scores, selection=scores.selection - 0.2 * torch.arange(scores.selection.shape[1]))


@dataclass(frozen=True)
class Cut(Transform):
    """Forgets the gradient."""

    def __call__(self, scores: Scores, context: RoutingContext) -> Scores:
        return replace(scores, probs=scores.probs.detach())


@dataclass(frozen=True)
class ThirtyTwo(Transform):
    """Knows one number of tokens."""

    def __call__(self, scores: Scores, context: RoutingContext) -> Scores:
        return replace(scores, selection=scores.selection + torch.zeros(32, 1))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"transforms": [ThirtyTwo()]}, "check_record: RuntimeError: The size of tensor"),
        ({"selection": Twice()}, "twice"),
        ({"transforms": [Peeks()]}, "later tokens"),
        ({"selection": ByPlace()}, "check_pieces: with a cache"),
        ({"transforms": [Noisy()]}, "check_seed"),
        ({"transforms": [Partial()]}, "check_permutation"),
        ({"transforms": [Cut()]}, "check_gradient"),
    ],
    ids=lambda one: one if isinstance(one, str) else None,
)
def test_a_router_that_breaks_the_contract_is_told_so(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_router(lambda d, E, K: Router(d, E, K, **{"selection": TopK(), **parts}))
