"""What makes a function an importance score: its name, and the statistics it needs.

    @importance("reap", needs=("w_ean_sum", "n"), paper="...")
    def reap(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor: ...

A score is a pure function of the statistics, ``[E]`` float64, larger for an expert that is worth more. It has a scale
of its own and grows with depth, so that scores are comparable inside one layer only.

Legend: E experts of a layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from collegium.catalog import get, method
from collegium.errors import ConfigError
from collegium.measure.statistics import Statistics

__all__ = ["Importance", "find_importance", "importance", "importances"]

F = TypeVar("F", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Importance:
    """A catalogued score.

    Attributes:
        needs: the statistics it reads. None at all means that it does not look at the model (random).
        function: of statistics, layer and domain (None: all tokens); its keyword arguments are its settings.
    """

    name: str
    needs: tuple[str, ...]
    function: Callable[..., Tensor]

    @property
    def settings(self) -> dict[str, Any]:
        """Setting -> default."""
        parameters = list(inspect.signature(self.function).parameters.values())[3:]
        return {one.name: one.default for one in parameters}

    def missing(self, statistics: Statistics) -> list[str]:
        """What `statistics` lack of `needs`."""
        there = {entry.name for entry in statistics.meta.statistics}
        return [name for name in self.needs if name not in there]

    def mixed(self, statistics: Statistics) -> list[str]:
        """What of `needs` these statistics keep over all domains together only."""
        return [entry.name for entry in statistics.meta.statistics if entry.name in self.needs and not entry.by_domain]

    def __call__(self, statistics: Statistics, layer: int, domain: str | None = None, **settings: Any) -> Tensor:
        """``[E]`` float64 scores, finite; larger is more valuable. Experts that no token reached score lowest.

        Raises:
            ConfigError: the statistics lack something, or do not keep it by domain; the message names it.
        """
        if lacking := self.missing(statistics):
            raise ConfigError(
                f"importance {self.name!r} needs {', '.join(lacking)}, which these statistics lack; calibrate again "
                f"for it, or choose one of {', '.join(_possible(statistics)) or 'none'}"
            )
        if unknown := sorted(settings.keys() - self.settings.keys()):
            raise ConfigError(
                f"importance {self.name!r} has no setting {unknown[0]!r}; it has {', '.join(self.settings) or 'none'}"
            )
        if domain is not None and statistics.meta.domains == (domain,):
            domain = None
        if domain is not None and (mixed := self.mixed(statistics)):
            raise ConfigError(
                f"importance {self.name!r} cannot be told for one domain: {', '.join(mixed)} is kept over all of them "
                "together; combine the domains as 'pooled', or choose another score"
            )
        scores = self.function(statistics, layer, domain, **settings).double()
        if self.needs:
            reached = statistics.get(layer, "n", domain) > 0
            # a sum of logits may be negative, and 0 for no token at all must not beat it
            lowest = scores[reached].min().clamp(max=0) if bool(reached.any()) else scores.new_zeros(())
            scores = torch.where(reached, scores, lowest)
        return scores


_found: dict[str, Importance] = {}


def importance(name: str, *, needs: Iterable[str], paper: str, arxiv: str | None = None) -> Callable[[F], F]:
    """Catalogue a function as an importance score.

    Args:
        name: on the command line, in plans and in the catalogue.
        needs: names of the statistics it reads.
        paper: source of the definition (year).
        arxiv: its id.
    """

    def catalogue(function: F) -> F:
        _found[name] = Importance(name, tuple(needs), function)
        return method(name, kind="importance", paper=paper, arxiv=arxiv)(function)

    return catalogue


def importances() -> list[Importance]:
    """All of them, by name."""
    return [_found[name] for name in sorted(_found)]


def _possible(statistics: Statistics) -> list[str]:
    """Names of the scores that `statistics` have everything for."""
    return [one.name for one in importances() if not one.missing(statistics)]


def find_importance(name: str) -> Importance:
    """The one of this name. Raises ConfigError if there is none; the message lists them."""
    get("importance", name)
    return _found[name]
