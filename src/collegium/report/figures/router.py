"""How sure the router is, and how well its choice can be guessed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from collegium.report.figure import Figure, Readout
from collegium.report.figures._columns import many, number, plot_lines

__all__ = ["changed", "confidence", "congestion", "margin", "needed", "predictability", "recalls"]


def confidence(results: Sequence[Any]) -> Figure:
    """Probability mass of the chosen experts in each layer."""
    spec, columns = plot_lines(
        {"": [(found.layer, found.top_mass) for found in results]},
        Readout("mass", "probability of the chosen experts", ".0%"),
        top=1.0,
        more={"entropy": [number(found.entropy) for found in results]},
    )
    mass = np.array(columns["mass"])
    alt = (
        f"The chosen experts hold {mass.min():.0%} (layer {results[int(mass.argmin())].layer}) to {mass.max():.0%} "
        f"(layer {results[int(mass.argmax())].layer}) of the router's probability."
    )
    caption = "100 % means that the router gives the experts it did not choose no chance at all."
    return Figure("confidence", "Router confidence", caption, alt, spec, columns)


def margin(results: Sequence[Any]) -> Figure:
    """Quantiles of the margin between the last expert chosen and the first one that was not."""
    kinds = {
        f"{float(q):.0%} of tokens are below": [(found.layer, found.margin[q]) for found in results]
        for q in sorted(results[0].margin)
    }
    fragile = np.array([number(found.fragile) for found in results])
    alt = (
        f"{fragile.mean():.1%} of the choices are decided by a margin under 1 % on average over layers, most in layer "
        f"{results[int(fragile.argmax())].layer}: {fragile.max():.1%}. Rounding or a small change of the input may "
        "turn these."
    )
    spec, columns = plot_lines(kinds, Readout("margin", "margin of the last choice", ".3f"))
    caption = "Probability of the least likely chosen expert minus that of the likeliest one that was not chosen."
    return Figure("margin", "How close the choices are", caption, alt, spec, columns)


def needed(results: Sequence[Any]) -> Figure:
    """How many experts it takes to hold a given part of the probability."""
    kinds = {
        f"to hold {float(p):.0%} of the probability": [(found.layer, found.k_for_mass[p]) for found in results]
        for p in sorted(results[0].k_for_mass)
    }
    last = list(kinds)[-1]
    values = np.array([number(value) for _, value in kinds[last]])
    alt = f"T{last[1:]} takes {values.min():.1f} to {values.max():.1f} experts, depending on the layer."
    spec, columns = plot_lines(kinds, Readout("experts", "experts, mean over tokens", ".1f"))
    caption = "Lines far below the number of experts a token uses: fewer would do for most tokens."
    return Figure("needed", "How many experts a token needs", caption, alt, spec, columns)


def changed(results: Sequence[Any]) -> Figure | None:
    """Part of the tokens that another number of experts would change; None if there is no other number."""
    numbers = sorted({k for found in results for k in found.changed_by_k})
    if not numbers:
        return None
    kinds = {
        f"with {many(k, 'expert')}": [(f.layer, f.changed_by_k[k]) for f in results if k in f.changed_by_k]
        for k in numbers
    }
    mean = {kind: float(np.mean([number(value) for _, value in pairs])) for kind, pairs in kinds.items()}
    alt = "Tokens that would change, mean over layers: " + ", ".join(f"{mean[kind]:.0%} {kind}" for kind in kinds) + "."
    spec, columns = plot_lines(kinds, Readout("changed", "tokens that would change", ".0%"), top=1.0)
    caption = (
        "If every token had so many experts, the likeliest ones, instead of the model's: part of the tokens of which "
        "more than 5 % of the combine weight would move. Low with fewer experts: most tokens could do with less."
    )
    return Figure("changed-by-k", "What another number of experts would change", caption, alt, spec, columns)


def recalls(results: Sequence[Any]) -> tuple[int, dict[str, float]]:
    """``(layers, predictor -> mean recall)`` over the layers that have all predictors: the first one lacks some, and
    is the easiest for others."""
    names = {name for found in results for name in found.recall}
    alike = [found for found in results if set(found.recall) == names] or list(results)
    kept = [name for name in names if all(name in found.recall for found in alike)]
    return len(alike), {name: float(np.mean([number(found.recall[name]) for found in alike])) for name in sorted(kept)}


def predictability(results: Sequence[Any]) -> Figure:
    """Recall of each predictor, layer by layer."""
    names = list(dict.fromkeys(name for found in results for name in found.recall))
    kinds = {name: [(found.layer, found.recall[name]) for found in results if name in found.recall] for name in names}
    layers, means = recalls(results)
    ranked = sorted(means.items(), key=lambda item: -item[1])
    alt = f"Mean over {layers} layers: " + ", ".join(f"{name} {value:.0%}" for name, value in ranked) + "."
    kinds["even guessing"] = [(found.layer, found.even) for found in results]
    spec, columns = plot_lines(kinds, Readout("recall", "chosen experts that were guessed", ".0%"), top=1.0)
    caption = "Recall on documents the predictor has not seen, with as many guesses as the layer chooses experts."
    return Figure("predictability", "How well the choice can be guessed", caption, alt, spec, columns)


def congestion(results: Sequence[Any]) -> Figure | None:
    """The congestion coefficient of each layer; None where no layer identifies it."""
    found = [result for result in results if result.gamma is not None]
    if not found:
        return None
    spec, columns = plot_lines(
        {"": [(result.layer, result.gamma) for result in found]}, Readout("gamma", "congestion coefficient", ".1f")
    )
    gamma = np.array(columns["gamma"])
    alt = (
        f"{len(found)} of {len(results)} layers identify the coefficient; there it is {np.median(gamma):.1f} in the "
        f"median ({gamma.min():.1f} to {gamma.max():.1f})."
    )
    caption = (
        "How strongly a busy expert repels tokens: 0 if the router looks at quality alone, large if balance decides. "
        "Layers that do not identify it are left out."
    )
    return Figure("congestion", "Balance against quality", caption, alt, spec, columns)
