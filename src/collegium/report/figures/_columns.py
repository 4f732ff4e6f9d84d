"""Columns of figures from results that hold one array a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from collegium.report.figure import Choice, Readout, series

__all__ = [
    "CELLS",
    "LAYER",
    "Array",
    "cells",
    "layer_choice",
    "many",
    "number",
    "plot_lines",
    "spread",
    "top_of",
    "unsigned_zero",
]

LAYER = Readout("layer", "layer")
Array = np.ndarray[Any, np.dtype[Any]]

CELLS = 400_000
"""Cells of expert pairs that one figure keeps on the page; with more, layers are taken at even distances."""


def number(value: Any) -> float:
    """A number, an estimate's value, or NaN for None."""
    return float("nan") if value is None else float(value)


def cells(matrices: Iterable[tuple[int, Array]], names: Sequence[str]) -> dict[str, Array]:
    """``(code, [R, C] array)`` pairs as four columns of these names: code, row, column and value."""
    found: list[list[Array]] = [[], [], [], []]
    for code, matrix in matrices:
        row, column = np.meshgrid(*map(np.arange, matrix.shape), indexing="ij")
        for into, part in zip(found, (np.full(matrix.size, code), row, column, matrix), strict=True):
            into.append(part.ravel())
    return {name: np.concatenate(parts) for name, parts in zip(names, found, strict=True)}


def plot_lines(
    kinds: Mapping[str, Iterable[tuple[Any, Any]]],
    y: Readout,
    *,
    x: Readout = LAYER,
    top: float | None = None,
    ordinal: bool = True,
    fields: Sequence[Readout] = (),
    more: Mapping[str, Sequence[Any]] | None = None,
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """``(spec, columns)`` of one line a kind.

    Args:
        kinds: name of the line -> pairs of x and value, a number or an estimate; a line without pairs is left out. A
            single line may be named "".
        y, x: the axes.
        top: where the y axis ends.
        ordinal: `x` has a place for each value instead of a scale.
        fields: further columns for the tooltip.
        more: further columns, one value for each pair, kind after kind.
    """
    columns: dict[str, list[Any]] = {"kind": [], x.column: [], y.column: [], "low": [], "high": []}
    for kind, pairs in kinds.items():
        for place, value in pairs:
            row = (kind, place, number(value), getattr(value, "low", np.nan), getattr(value, "high", np.nan))
            for into, entry in zip(columns.values(), row, strict=True):
                into.append(entry)
    names = list(dict.fromkeys(columns["kind"]))
    interval = ("low", "high") if np.isfinite(columns["low"]).any() else None
    by = Readout("kind", "") if names != [""] else None
    for name, unused in (("kind", by is None), ("low", interval is None), ("high", interval is None)):
        if unused:
            del columns[name]
    spec = series(x, y, by, interval=interval, top=top, ordinal=ordinal, names=names, more=fields)
    return spec, columns | {name: list(values) for name, values in (more or {}).items()}


def many(count: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def unsigned_zero(value: float, digits: int = 2) -> float:
    """`value` rounded, and 0 instead of -0, which would be printed with its sign."""
    return round(value, digits) + 0.0


def layer_choice(layers: Sequence[int]) -> Choice:
    """The control that picks a layer."""
    return Choice("layer", "layer", tuple(layers), tuple(f"layer {layer}" for layer in layers))


def spread(results: Sequence[Any], cells_of_each: Sequence[int], limit: int = CELLS) -> list[Any]:
    """As many of `results`, at even distances and with both ends, as have at most `limit` cells together."""
    count = len(results)
    while count > 1:
        picked = np.unique(np.linspace(0, len(results) - 1, count).round().astype(int))
        if sum(cells_of_each[i] for i in picked) <= limit:
            break
        count -= 1
    else:
        picked = np.array([0])
    return [results[i] for i in picked]


def top_of(values: Array, at_least: float, quantile: float = 0.995) -> float:
    """Upper end of a colour scale: a high quantile, so that one extreme cell does not darken the rest."""
    finite = values[np.isfinite(values)]
    return float(max(at_least, np.quantile(finite, quantile))) if finite.size else at_least
