"""`factor_plan`: every expert stays, and its matrices become products of smaller ones.

Legend: d model width, f expert width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from collegium._version import __version__
from collegium.compress.factor.registry import Factor, find_factor
from collegium.compress.plan import Asked, LayerPlan, Mtp, Operator, Plan
from collegium.compress.planners.make import statistics_checksum
from collegium.compress.target import Target
from collegium.errors import ConfigError
from collegium.measure.statistics import Statistics
from collegium.models.checkpoint import Checkpoint, open_checkpoint
from collegium.models.families import lookup

__all__ = ["factor_plan"]


def factor_plan(
    source: Checkpoint | str | os.PathLike[str],
    name: str = "svd",
    settings: Mapping[str, Any] | None = None,
    *,
    statistics: Statistics | None = None,
    mtp: Mtp = "refuse",
) -> Plan:
    """A plan that factors the matrices of every expert; it is for our own loader.

    Args:
        source: the model.
        name, settings: of the factorisation, see `find_factor`.
        statistics: of the model; those that need them read them again when the plan is applied.
        mtp: what becomes of multi-token-prediction layers; our own loader has no place for them ("keep" is refused).

    Raises:
        ConfigError: there is no such factorisation or setting, the statistics lack something or are of another model,
            or the sizes of the experts are not known.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    target, d = Target.of(checkpoint), lookup(checkpoint.config, "hidden_size")
    operator = find_factor(name, settings or {})
    _check_statistics(operator, statistics, target)
    left = target.parameters
    layers = []
    for layer in target.layers:
        f = layer.intermediate_size
        if not f or not layer.neuron_parameters or not isinstance(d, int):
            raise ConfigError(
                f"the config of {target.model} does not say how wide its experts are, so they have no ranks"
            )
        ups = layer.neuron_parameters // d - 1  # gate and up, or up
        left += layer.num_experts * (ups * operator.size(f, d) + operator.size(d, f) - (ups + 1) * d * f)
        layers.append(
            LayerPlan(
                layer=layer.layer,
                op="factor",
                num_experts=layer.num_experts,
                intermediate_size=f,
                keep=tuple(range(layer.num_experts)),
                expert_nbytes=layer.expert_nbytes,
                expert_parameters=layer.expert_parameters,
                neuron_nbytes=layer.neuron_nbytes,
                neuron_parameters=layer.neuron_parameters,
            )
        )
    return Plan(
        model=target.model,
        fingerprint=target.fingerprint,
        family=target.family,
        statistics=None if statistics is None else statistics_checksum(statistics),
        method="none",
        planner="factor",
        data=() if statistics is None else statistics.meta.data,
        domains=() if statistics is None else statistics.meta.domains,
        asked=Asked(what="parameters", value=left / target.parameters),
        top_k=target.top_k,
        groups=target.groups,
        top_groups=target.top_groups,
        nbytes=target.nbytes,
        parameters=target.parameters,
        layers=tuple(layers),
        operator=Operator(name=name, settings=asdict(operator)),
        mtp=mtp,
        notes=(
            f"factors leave {left:,} of {target.parameters:,} parameters; no stock engine loads them: apply the plan "
            "for collegium's own loader (--own)",
        ),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        collegium=__version__,
    )


def _check_statistics(operator: Factor, statistics: Statistics | None, target: Target) -> None:
    if statistics is None:
        if operator.needs:
            raise ConfigError(f"factor {operator.name!r} reads {', '.join(operator.needs)}; give the statistics")
        return
    theirs = statistics.meta.fingerprint
    if theirs is not None and target.fingerprint is not None and theirs != target.fingerprint:
        raise ConfigError(
            f"the statistics are of {statistics.meta.model} with fingerprint {theirs}; {target.model} has "
            f"{target.fingerprint}: calibrate this model"
        )
    there = {entry.name for entry in statistics.meta.statistics}
    if lacking := [need for need in operator.needs if need not in there]:
        raise ConfigError(
            f"factor {operator.name!r} needs {', '.join(lacking)}, which these statistics lack; calibrate for it"
        )
