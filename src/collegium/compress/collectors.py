"""What a calibration pass can gather: mostly sums over the tokens routed to each expert, by domain where small."""

from __future__ import annotations

from collections.abc import Iterable

from collegium.compress.collectors_inputs import InputMoment, InputSample
from collegium.compress.collectors_outputs import HiddenSums, OutputMean, OutputNormMax, OutputNorms, ResidualTurn
from collegium.compress.collectors_router import Ballots, CoActivations, LogitGram, RouterSums
from collegium.compress.collectors_substitute import LeaveOneOut
from collegium.compress.gradients import HiddenGradients, WeightGradients
from collegium.compress.importance import find_importance
from collegium.errors import ConfigError
from collegium.measure.collect import Collector, Counts
from collegium.measure.redundancy import OutputCosine
from collegium.measure.super_experts import DownMax

__all__ = [
    "COLLECTORS",
    "DEFAULTS",
    "Ballots",
    "CoActivations",
    "HiddenSums",
    "InputMoment",
    "InputSample",
    "LeaveOneOut",
    "LogitGram",
    "OutputMean",
    "OutputNormMax",
    "OutputNorms",
    "ResidualTurn",
    "RouterSums",
    "collectors_for",
]

DEFAULTS: tuple[type[Collector], ...] = (
    Counts,
    RouterSums,
    Ballots,
    LogitGram,
    CoActivations,
    OutputNorms,
    OutputNormMax,
    HiddenSums,
    ResidualTurn,
    DownMax,
)
"""What running each token's experts once gives, and is small on disk."""

COLLECTORS: tuple[type[Collector], ...] = (
    *DEFAULTS,
    LeaveOneOut,
    OutputCosine,
    OutputMean,
    InputSample,
    InputMoment,
    HiddenGradients,
    WeightGradients,
)
"""All there are: those that are not `DEFAULTS` run more experts, take much disk, or need a backward pass."""


def collectors_for(*names: str, statistics: Iterable[str] = ()) -> list[Collector]:
    """The collectors, with default settings, that gather what the importance scores `names` need, and what tells super
    experts, which every plan protects.

    Args:
        statistics: others that are wanted, such as what a grouping or a score of neurons needs.

    Raises:
        ConfigError: there is no such score, or no collector gathers such a statistic.
    """
    wanted = {"down_max", *statistics, *(need for name in names for need in find_importance(name).needs)}
    gathered = {entry.name for one in COLLECTORS for entry in one.statistics}
    if unknown := sorted(wanted - gathered):
        raise ConfigError(
            f"no collector gathers the statistic {unknown[0]!r}; they gather {', '.join(sorted(gathered))}"
        )
    return [one() for one in COLLECTORS if wanted & {entry.name for entry in one.statistics}]
