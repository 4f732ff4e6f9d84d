"""Plots of a trace as PNG files. Colours are told apart by colour-blind readers and in grey print (cividis)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from collegium.files import atomic_file
from collegium.measure import DomainInformation, Load

__all__ = ["domain_figure", "load_figure"]

_STYLE: Any = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}


def load_figure(loads: Sequence[Load], target: Path) -> None:
    """Layer x expert heat map of load relative to an even share (1 = even), beside MaxVio per layer.

    Layers may differ in their number of experts; cells a layer lacks stay blank.
    """
    E = max(len(load.share) for load in loads)
    relative = np.full((len(loads), E), np.nan)
    for row, load in enumerate(loads):
        relative[row, : len(load.share)] = load.share * len(load.share)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(min(4 + 0.22 * E, 16), 1.6 + 0.34 * len(loads)), layout="constrained")
        heat, bars = figure.subplots(1, 2, width_ratios=[4, 1], sharey=True)
        image = heat.imshow(relative, cmap="cividis", vmin=0, vmax=max(2.0, float(np.nanmax(relative))), aspect="auto")
        heat.set(title="Load of each expert, relative to an even share", xlabel="expert", ylabel="layer")
        heat.set_yticks(range(len(loads)), [str(load.layer) for load in loads])
        figure.colorbar(image, ax=heat, location="bottom", label="share of assignments x number of experts", aspect=40)
        bars.barh(range(len(loads)), [load.max_violation for load in loads], color="#5b6f9a")
        bars.set(title="MaxVio", xlabel="busiest / mean - 1")
        _save(figure, target)


def domain_figure(information: Sequence[DomainInformation], target: Path) -> None:
    """One domain x expert heat map per layer (how much more often than its average each domain uses an expert), and
    I(domain; expert) per layer against its shuffled control."""
    with mpl.rc_context(_STYLE):
        columns = 2 if len(information) > 1 else 1
        rows = -(-len(information) // columns)
        C, E = information[0].share.shape
        size = (columns * min(3 + 0.2 * E, 9), rows * (1.0 + 0.22 * C) + 2.4)
        figure = Figure(figsize=size, layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=[size[1] - 2.2, 2.2])
        heats, below = parts
        axes = heats.subplots(rows, columns, squeeze=False).flat
        for axis, layer in zip(axes, information, strict=False):
            image = _domain_heat(axis, layer)
        for axis in list(axes)[len(information) :]:
            axis.set_visible(False)
        heats.colorbar(image, ax=heats.axes, label="share of the domain's assignments / share over all domains")
        _information_bars(below.subplots(), information)
        _save(figure, target)


def _domain_heat(axis: Axes, layer: DomainInformation) -> mpl.image.AxesImage:
    seen = layer.share.sum(1) > 0
    share = layer.share[seen]
    ratio = share / np.maximum(share.mean(0, keepdims=True), 1e-12)
    image = axis.imshow(ratio, cmap="cividis", vmin=0, vmax=4, aspect="auto")
    axis.set(title=f"layer {layer.layer}: {layer.bits:.2f} bits", xlabel="expert")
    axis.set_yticks(range(int(seen.sum())), [name for name, there in zip(layer.domains, seen, strict=True) if there])
    return image


def _information_bars(axis: Axes, information: Sequence[DomainInformation]) -> None:
    at = np.arange(len(information))
    axis.bar(at - 0.2, [i.bits for i in information], 0.4, label="measured", color="#1f3b6d")
    axis.bar(at + 0.2, [i.control for i in information], 0.4, label="labels shuffled over documents", color="#c9b458")
    axis.set(ylabel="bits", xlabel="layer", title="I(domain; expert)")
    axis.set_xticks(at, [str(i.layer) for i in information])
    axis.legend(frameon=False)


def _save(figure: Figure, target: Path) -> None:
    with atomic_file(target) as partial:
        figure.savefig(partial, format="png", dpi=150)
