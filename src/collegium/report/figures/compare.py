"""Two traces of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from collegium.report.figure import Figure, Readout
from collegium.report.figures._columns import number, plot_lines

__all__ = ["early_routing", "fluctuation"]

_PART = Readout("part", "part", ".0%")


def fluctuation(results: Sequence[Any]) -> Figure:
    """Part of the tokens whose set of experts differs between the traces."""
    kinds = {
        "tokens with another set of experts": [(found.layer, found.changed) for found in results],
        "experts in common": [(found.layer, found.overlap) for found in results],
    }
    changed = np.array([number(found.changed) for found in results])
    alt = (
        f"{changed.mean():.0%} of the tokens have another set of experts on average over layers, most in layer "
        f"{results[int(changed.argmax())].layer}: {changed.max():.0%}."
    )
    spec, columns = plot_lines(kinds, _PART, top=1.0)
    caption = "The same tokens, routed by both models."
    return Figure("fluctuation", "Routing that changed", caption, alt, spec, columns)


def early_routing(results: Sequence[Any]) -> Figure:
    """Do token ids keep their experts?"""
    kinds = {
        "similarity of a token id's experts": [(found.layer, found.similarity) for found in results],
        "overlap of a token id's experts": [(found.layer, found.overlap) for found in results],
        "similarity to another token id": [(found.layer, found.control) for found in results],
    }
    similar = np.array([number(found.similarity) for found in results])
    alt = (
        f"The experts of a token id are {similar.mean():.0%} alike in the two traces on average over layers; those of "
        f"different ids {np.mean([found.control for found in results]):.0%}."
    )
    spec, columns = plot_lines(kinds, _PART, top=1.0)
    caption = "Close to 100 %: routing was settled by token id early in training and has hardly changed since."
    return Figure("early-routing", "Experts of a token id", caption, alt, spec, columns)
