"""What ``collegium shrink`` is asked for, and what of that can be refused before hours of calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from collegium.compress.grouping import find_grouping, groupings
from collegium.compress.importance import find_importance
from collegium.compress.merge import find_merge
from collegium.compress.neurons import Mode, find_neuron_score, plan_neurons
from collegium.compress.plan import Mtp, Operator, Plan, RouterEdit
from collegium.compress.planners import Combine, LayerScores, Planner, Uniform, make_plan
from collegium.compress.router_edits import router_edit_needs
from collegium.compress.target import Target
from collegium.data import Corpus
from collegium.data.document import Split
from collegium.errors import ConfigError, DataError, UnsupportedFamilyError
from collegium.measure.statistics import Statistics

__all__ = ["Settings", "check_budget", "check_data", "check_stages", "check_ways", "make_asked"]


@dataclass(frozen=True)
class Settings:
    """What was asked for; as on the command line.

    Attributes:
        method: the score, of experts, or of neurons if `neurons` is given.
        settings: of "score", "merge", "grouping" and "router".
        merge, grouping: how experts become one, and which; None drops them.
        neurons: share of each expert's neurons that stays, with all experts; None decides about experts.
        widths: where experts may differ in width, see `Mode`.
        own: what plain transformers cannot hold is written in collegium's own format.
        recover: tokens to train on at the end; 0 trains nothing.
        tokens, eval_tokens: to calibrate on, and to judge on.
    """

    method: str
    settings: Mapping[str, Mapping[str, Any]]
    planner: Planner
    domains: tuple[str, ...]
    combine: Combine
    pins: Mapping[int, tuple[int, ...]]
    protect: bool
    mtp: Mtp
    merge: str | None
    grouping: str | None
    router: str
    recover: int
    stages: int
    neurons: float | None
    widths: Mode
    own: bool
    tokens: int
    eval_tokens: int
    batch_size: int
    sequence_length: int | None
    dtype: str | None

    def operator(self) -> Operator | None:
        """What computes new experts, with all of its settings."""
        if self.merge is None:
            return None
        found: Any = find_merge(self.merge, self.settings["merge"])
        return Operator(name=self.merge, settings=asdict(found))

    def needs(self) -> set[str]:
        """The statistics that planning and applying read."""
        score: Any = find_importance(self.method) if self.neurons is None else find_neuron_score(self.method)
        needs = {"down_max", *score.needs, *router_edit_needs(self.router)}
        if self.merge is not None:
            needs |= set(find_merge(self.merge, self.settings["merge"]).needs)
        return needs | set(
            find_grouping(self.grouping, self.settings["grouping"]).needs if self.grouping is not None else ()
        )


def check_budget(settings: Settings, target: Target) -> None:
    """Before hours of calibration: raise ConfigError if the budget, a pin or the model make a plan impossible."""
    if target.mtp and settings.mtp == "refuse":
        raise ConfigError(
            f"{target.model} has multi-token-prediction layers; say with --mtp keep or --mtp drop what becomes of them"
        )
    sizes = {layer.layer: layer.num_experts for layer in target.layers}
    for layer, experts in settings.pins.items():
        if any(e >= sizes.get(layer, 0) for e in experts):
            raise ConfigError(f"--pin {layer}:{max(experts)}: layer {layer} has {sizes.get(layer, 'no')} experts")
    equal = [
        LayerScores(layer, torch.full((E,), 1 / E, dtype=torch.float64), tuple(range(E)), torch.zeros(E).long())
        for layer, E in sizes.items()
    ]
    chosen = settings.planner.choose(
        equal, target, {layer: frozenset(experts) for layer, experts in settings.pins.items()}
    )
    if len({len(ids) for ids in chosen.values()}) > 1 and not settings.own:
        raise UnsupportedFamilyError(
            f"{target.model} has layers with different numbers of experts, so no checkpoint of the result would load "
            "in transformers; write it in collegium's own format with --own"
        )


def check_stages(settings: Settings) -> None:
    """Raise ConfigError if there are stages, and something they do not go with."""
    if settings.stages == 1:
        return
    if settings.recover < settings.stages:
        raise ConfigError(f"--stages {settings.stages} trains after each stage; say on how many tokens with --recover")
    if not isinstance(settings.planner, Uniform) or settings.planner.keep == 1 or settings.neurons is not None:
        raise ConfigError("--stages goes with a share of the experts to keep, --keep, and with no other budget")
    if settings.pins:
        raise ConfigError(
            "--stages renumbers experts from stage to stage, so --pin has no meaning; leave one of them out"
        )


def check_ways(settings: Settings) -> None:
    """Raise ConfigError if grouping, merge and router edit do not go together."""
    if settings.router == "many_to_one":
        raise ConfigError(
            "--router many_to_one is for collegium's own loader, and routers that choose among experts that are not "
            "there cannot be compared; make a plan (collegium plan) and apply it with --own"
        )
    if settings.own and settings.recover:
        raise ConfigError("--recover trains plain checkpoints; leave out --own")
    if settings.neurons is not None:
        if settings.merge or settings.grouping or settings.router != "rows" or settings.domains:
            raise ConfigError("--neurons keeps every expert; leave out --merge, --grouping, --router and --domain")
        if not 0 < settings.neurons <= 1:
            raise ConfigError(f"--neurons is a share of the neurons, above 0 and up to 1, not {settings.neurons}")
    elif settings.widths != "uniform":
        raise ConfigError(f"--widths {settings.widths} says how wide experts get; say how wide in all with --neurons")
    if settings.widths != "uniform" and not settings.own:
        raise ConfigError(
            f"--widths {settings.widths} leaves experts that differ in width, which plain transformers cannot hold; "
            "write them in collegium's own format with --own"
        )
    if settings.merge is None:
        if settings.grouping is not None:
            raise ConfigError(f"--grouping {settings.grouping} says which experts become one; say how with --merge")
        return
    if settings.grouping is None and find_merge(settings.merge, settings.settings["merge"]).needs_groups:
        names = ", ".join(one.name for one in groupings())
        raise ConfigError(
            f"--merge {settings.merge} makes one expert of a group; say of which with --grouping: {names}"
        )


def check_data(corpus: Corpus, settings: Settings) -> None:
    """Raise DataError if there is nothing to calibrate on or to judge on; ConfigError if a domain is not there."""
    if unknown := [name for name in settings.domains if name not in corpus.domains]:
        raise ConfigError(f"--domain {unknown[0]!r} is none of those of {corpus.name}: {', '.join(corpus.domains)}")
    purposes: dict[Split, str] = {"train": "calibrate on", "test": "judge on"}
    if settings.recover:
        purposes["valid"] = "watch training by"
    for split, purpose in purposes.items():
        if not corpus.size(split)[0]:
            raise DataError(
                f"{corpus.name} has no document in its {split} split, to {purpose}; give data of three documents or "
                "more, or a folder with train and test in it"
            )


def make_asked(settings: Settings, statistics: Statistics, target: Target) -> Plan:
    """The plan that was asked for."""
    shared: dict[str, Any] = {
        "pins": settings.pins,
        "protect_super_experts": settings.protect,
        "mtp": settings.mtp,
    }
    chosen = settings.settings
    if settings.neurons is not None:
        return plan_neurons(
            statistics,
            target,
            score=settings.method,
            share=settings.neurons,
            mode=settings.widths,
            settings=chosen["score"],
            **shared,
        )
    return make_plan(
        statistics,
        target,
        settings.planner,
        importance=settings.method,
        settings=chosen["score"],
        domains=settings.domains,
        combine=settings.combine,
        grouping=None if settings.grouping is None else find_grouping(settings.grouping, chosen["grouping"]),
        operator=settings.operator(),
        router=RouterEdit(mode=settings.router, settings=dict(chosen["router"])),
        **shared,
    )
