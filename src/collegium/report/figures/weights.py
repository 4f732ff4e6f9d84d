"""What the model itself shows: super experts and redundancy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from collegium.report.figure import Choice, Figure, Readout, heat_map
from collegium.report.figures._columns import (
    LAYER,
    cells,
    layer_choice,
    number,
    plot_lines,
    spread,
    top_of,
    unsigned_zero,
)

__all__ = ["likeness", "redundancy", "super_experts", "super_words"]


def super_experts(found: Any) -> Figure:
    """Layer x expert: the largest absolute output of each expert."""
    parts = [(layer, np.asarray(values, np.float64)[None]) for layer, values in found.values.items()]
    columns = cells(parts, ("layer", "none", "expert", "value"))
    del columns["none"]
    median = found.median or 1.0
    columns["times"] = columns["value"] / median
    columns["log"] = np.log10(np.maximum(columns["times"], 0.1))
    spec, readout = heat_map(
        Readout("expert", "expert"),
        LAYER,
        Readout("log", "largest output / median, log10", ".1f"),
        Readout("value", "largest output", ".3g"),
        Readout("times", "times the median", ".3g"),
        rows=len(parts),
        domain=(-1.0, top_of(columns["log"], 1.0, 1.0)),
    )
    caption = (
        f"Over {found.tokens:,} tokens. A super expert must exceed {found.threshold:.3g} in layers "
        f"{min(found.searched, default=0)} to {max(found.searched, default=0)}; losing one breaks a model."
    )
    return Figure("super-experts", "Super experts", caption, super_words(found), spec, columns, (), readout)


def super_words(found: Any) -> str:
    """The super experts in a sentence."""
    if not found.found:
        times = found.largest / found.median if found.median else 0.0
        return f"No expert stands out: the largest output is {times:.1f} times the median one."
    words = [
        f"expert {e.expert} of layer {e.layer} ({e.times_median:.0f} times the median, channel {e.channel})"
        for e in found.found[:5]
    ]
    more = f" and {len(found.found) - 5} more" if len(found.found) > 5 else ""
    return f"{len(found.found)} found: {', '.join(words)}{more}."


_KINDS = {"outputs": "by_outputs", "weights": "by_weights"}


def redundancy(results: Sequence[Any]) -> Figure:
    """Expert x expert of a chosen layer: how alike two experts are."""
    shown = spread(results, [2 * found.by_weights.size for found in results], 250_000)
    columns: dict[str, list[Any]] = {}
    for code, attribute in enumerate(_KINDS.values()):
        matrices = [(found.layer, np.asarray(getattr(found, attribute), np.float64)) for found in shown]
        part = cells(matrices, ("layer", "expert", "other", "cosine"))
        for name, values in {**part, "kind": np.full(len(part["layer"]), code)}.items():
            columns.setdefault(name, []).append(values)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    others = joined["expert"] != joined["other"]
    if others.any():
        joined = {name: values[others] for name, values in joined.items()}
    spec, readout = heat_map(
        Readout("other", "expert"),
        Readout("expert", "expert"),
        Readout("cosine", "cosine", ".2f"),
        rows=len(shown[0].by_weights),
        domain=(min(0.0, float(joined["cosine"].min())), top_of(joined["cosine"], 0.5, 0.999)),
        height=420,
    )
    pairs = [(found.layer, *found.closest[0]) for found in results if found.closest]
    alt = "There is one expert a layer, so none is like another."
    if pairs:
        layer, i, j, cosine = max(pairs, key=lambda pair: pair[3])
        alt = f"The most alike are experts {i} and {j} of layer {layer}: their outputs have a cosine of {cosine:.2f}."
    caption = "Outputs: of both experts for the same tokens. Weights: after pairing neurons, whatever their order."
    if len(shown) < len(results):
        caption += f" {len(shown)} of {len(results)} layers are shown, at even distances, to keep the page small."
    choices = (
        layer_choice([found.layer for found in shown]),
        Choice("kind", "by", tuple(range(len(_KINDS))), tuple(_KINDS)),
    )
    return Figure("redundancy", "Likeness of experts", caption, alt, spec, joined, choices, readout, bits=7)


def likeness(results: Sequence[Any]) -> Figure:
    """Mean likeness of each layer's experts beside that of random ones."""
    kinds = {
        "outputs": [(found.layer, found.mean_by_outputs) for found in results],
        "outputs of random experts": [(found.layer, found.control_outputs) for found in results],
        "weights": [(found.layer, found.mean_by_weights) for found in results],
        "weights of random experts": [(found.layer, found.control) for found in results],
    }
    mean = {kind: float(np.mean([number(value) for _, value in pairs])) for kind, pairs in kinds.items()}
    alt = "Mean over layers: " + ", ".join(f"{kind} {unsigned_zero(value):.2f}" for kind, value in mean.items()) + "."
    spec, columns = plot_lines(kinds, Readout("cosine", "mean cosine", ".2f"))
    caption = "Far above the random ones: experts that could be merged."
    return Figure("likeness", "Mean likeness in each layer", caption, alt, spec, columns)
