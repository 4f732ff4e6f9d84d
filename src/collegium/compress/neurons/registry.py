"""What makes a function a neuron score: its name, and the statistics it needs.

    @neuron_score("heapr", needs=("h_sq", "dh_sq", "n"), in_loss=True, paper="...")
    def heapr(statistics: Statistics, layer: int) -> Tensor: ...

A score is a pure function of the statistics, ``[E, f]`` float64, not negative, larger for a neuron that is worth more.

Legend: E experts of a layer, f expert width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from collegium.catalog import get, method
from collegium.errors import ConfigError
from collegium.measure.statistics import Statistics

__all__ = ["NeuronScore", "find_neuron_score", "neuron_score", "neuron_scores"]

F = TypeVar("F", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class NeuronScore:
    """A catalogued score.

    Attributes:
        needs: the statistics it reads. None at all means that it does not look at the model (random).
        in_loss: it is an increase of the loss, so layers can be compared by it as it is. Other scores have a scale of
            their own in each layer.
        function: of statistics and layer; its keyword arguments are its settings.
    """

    name: str
    needs: tuple[str, ...]
    in_loss: bool
    function: Callable[..., Tensor]

    @property
    def settings(self) -> dict[str, Any]:
        """Setting -> default."""
        parameters = list(inspect.signature(self.function).parameters.values())[2:]
        return {one.name: one.default for one in parameters}

    def missing(self, statistics: Statistics) -> list[str]:
        """What `statistics` lack of `needs`."""
        there = {entry.name for entry in statistics.meta.statistics}
        return [name for name in self.needs if name not in there]

    def __call__(self, statistics: Statistics, layer: int, **settings: Any) -> Tensor:
        """``[E, f]`` float64 scores, finite; larger is more valuable. The neurons of an expert that no token reached
        have -1, below all others, unless the score does not look at the model.

        Raises:
            ConfigError: the statistics lack something; the message names it and what gathers it.
        """
        if lacking := self.missing(statistics):
            possible = [one.name for one in neuron_scores() if not one.missing(statistics)]
            raise ConfigError(
                f"neuron score {self.name!r} needs {', '.join(lacking)}, which these statistics lack; calibrate again "
                f"with --collect {self.name}, or choose one of {', '.join(possible) or 'none'}"
            )
        if unknown := sorted(settings.keys() - self.settings.keys()):
            raise ConfigError(
                f"neuron score {self.name!r} has no setting {unknown[0]!r}; it has {', '.join(self.settings) or 'none'}"
            )
        scores = self.function(statistics, layer, **settings).double()
        if self.needs:
            scores[statistics.get(layer, "n") == 0] = -1
        return scores


_found: dict[str, NeuronScore] = {}


def neuron_score(
    name: str, *, needs: Iterable[str], paper: str, arxiv: str | None = None, in_loss: bool = False
) -> Callable[[F], F]:
    """Catalogue a function as a neuron score.

    Args:
        name: on the command line, in plans and in the catalogue.
        needs: names of the statistics it reads.
        paper: source of the definition (year).
        arxiv: its id.
        in_loss: see `NeuronScore`.
    """

    def catalogue(function: F) -> F:
        _found[name] = NeuronScore(name, tuple(needs), in_loss, function)
        return method(name, kind="neurons", paper=paper, arxiv=arxiv)(function)

    return catalogue


def neuron_scores() -> list[NeuronScore]:
    """All of them, by name."""
    return [_found[name] for name in sorted(_found)]


def find_neuron_score(name: str) -> NeuronScore:
    """The one of this name. Raises ConfigError if there is none; the message lists them."""
    get("neurons", name)
    return _found[name]
