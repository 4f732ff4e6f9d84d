"""A figure as data: a Vega-Lite specification, the columns it draws, and what it says in words.

The page in a browser and the picture files are drawn from the same `Figure`. Colours are told apart by colour-blind
readers and in grey print: cividis for amounts, blue to orange for "less or more than", Okabe and Ito's for series.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["CONFIG", "DIVERGING", "SEQUENTIAL", "Choice", "Figure", "Readout", "heat_map", "series"]

Spec = dict[str, Any]

SEQUENTIAL, DIVERGING = "cividis", "blueorange"
_OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999")
_ON_DARK = ("#56b4e9", "#e69f00", "#2fbf93", "#e39bc7", "#8f9cff", "#f0894d", "#b8bec8")  # the same, lighter
_WIDTH = 760


@dataclass(frozen=True)
class Readout:
    """One number of a tooltip, and of what the keyboard reads out: a column, its name in words, a d3 format."""

    column: str
    title: str
    format: str = ""


@dataclass(frozen=True)
class Choice:
    """A control of a figure.

    Attributes:
        name: a column, of which the rows with the chosen value are drawn.
        label: of the control.
        values: what can be chosen, the first at the start.
        labels: how the values are shown; as they are if empty.
        copies: `name` is no column of the data but a copy of the chosen one, and all rows are drawn.
    """

    name: str
    label: str
    values: tuple[Any, ...]
    labels: tuple[str, ...] = ()
    copies: bool = False

    def options(self) -> list[tuple[Any, str]]:
        """``(value, how it is shown)``, in order."""
        return list(zip(self.values, self.labels or map(str, self.values), strict=True))


@dataclass(frozen=True, eq=False)
class Figure:
    """A plot with all of its data.

    Attributes:
        name: of its files and anchors; letters, digits and hyphens.
        title: what it shows.
        caption: how to read it.
        alt: what it shows, in sentences with the numbers.
        spec: Vega-Lite, drawing the data set ``table``.
        columns: name -> values, all of one length; every row of the data, whatever is chosen.
        choices: controls.
        readout: of a heat map, whose cells the arrow keys walk over: x and y come first.
        bits: of the mantissa that numbers keep on the page.
    """

    name: str
    title: str
    caption: str
    alt: str
    spec: Spec
    columns: Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]
    choices: tuple[Choice, ...] = ()
    readout: tuple[Readout, ...] = ()
    bits: int = 12

    def rows(self) -> list[dict[str, Any]]:
        """The rows drawn at the start, numbers that are not finite as None."""
        columns = {name: np.asarray(values) for name, values in self.columns.items()}
        keep = np.ones(len(next(iter(columns.values()))), bool)
        for choice in self.choices:
            if choice.copies:
                columns[choice.name] = columns[choice.values[0]]
            else:
                keep &= columns[choice.name] == choice.values[0]
        lists = {name: _plain_list(values[keep]) for name, values in columns.items()}
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]

    def drawn(self) -> Spec:
        """The spec with the data it starts with, and the light theme: complete Vega-Lite."""
        return {**self.spec, "config": CONFIG["light"], "data": {"name": "table", "values": self.rows()}}


def _plain_list(values: np.ndarray[Any, Any]) -> list[Any]:
    if values.dtype.kind == "f":
        return [value if np.isfinite(value) else None for value in values.tolist()]
    return values.tolist()


def heat_map(
    x: Readout,
    y: Readout,
    value: Readout,
    *more: Readout,
    rows: int,
    scheme: str = SEQUENTIAL,
    domain: tuple[float, float],
    height: int | None = None,
) -> tuple[Spec, tuple[Readout, ...]]:
    """``(spec, readout)`` of coloured cells; ``cursor_x`` and ``cursor_y`` are signals that mark one.

    Args:
        x, y: columns of the axes.
        value: column of the colour.
        more: further columns to read out.
        rows: cells from top to bottom.
        scheme: of colours; a diverging one has its middle at the middle of `domain`.
        domain: of colours; what lies outside has the colour of the nearest end.
        height: in pixels, if not by `rows`.
    """
    readout = (x, y, value, *more)
    axes = {
        "x": {"field": x.column, "type": "ordinal", "title": x.title, "axis": {"labelAngle": 0, "labelOverlap": True}},
        "y": {"field": y.column, "type": "ordinal", "title": y.title, "sort": None, "axis": {"labelOverlap": True}},
    }
    legend = {"orient": "top", "gradientLength": 240, "titleLimit": 600, "labelSeparation": 8}
    colour: Spec = {
        "field": value.column,
        "type": "quantitative",
        "title": value.title,
        "scale": {"scheme": scheme, "domain": list(domain), "clamp": True},
        "legend": {**legend, **_format(value)},
    }
    marked = f"datum['{x.column}'] === cursor_x && datum['{y.column}'] === cursor_y"
    spec: Spec = {
        "data": {"name": "table"},
        "width": _WIDTH,
        "height": height or int(np.clip(rows * 16, 60, 640)),
        "params": [{"name": "cursor_x", "value": None}, {"name": "cursor_y", "value": None}],
        "layer": [
            {"mark": "rect", "encoding": {**axes, "color": colour, "tooltip": tooltip(readout)}},
            {
                "transform": [{"filter": marked}],
                "mark": {"type": "rect", "filled": False, "strokeWidth": 3, "stroke": "#d55e00"},
                "encoding": axes,
            },
        ],
    }
    return spec, readout


def series(
    x: Readout,
    y: Readout,
    by: Readout | None = None,
    *,
    interval: tuple[str, str] | None = None,
    top: float | None = None,
    ordinal: bool = True,
    names: Sequence[str] = (),
    more: Sequence[Readout] = (),
) -> Spec:
    """A spec of points joined by lines, one line a value of `by`, told apart by colour, dash and shape.

    Args:
        x, y: columns of the axes.
        by: column of the lines.
        interval: columns of the ends of an interval around `y`, drawn as bars, or as a band where `x` has a scale.
        top: the y axis ends there and begins at 0, which intervals may exceed.
        ordinal: `x` has a place for each value instead of a scale.
        names: order of the lines.
        more: further columns for the tooltip.
    """
    bounds = [Readout(end, word, y.format) for end, word in zip(interval or (), ("95 % from", "95 % to"), strict=False)]
    fields = [x, *([Readout(by.column, by.title or "line")] if by else []), y, *bounds, *more]
    x_axis: Spec = {"field": x.column, "title": x.title, "type": "ordinal" if ordinal else "quantitative"}
    x_axis["axis"] = {"labelAngle": 0, "labelOverlap": True, "grid": False, **_format(x)}
    scale: Spec = {"zero": True} if top is None else {"domain": [0, top]}
    y_axis: Spec = {"field": y.column, "type": "quantitative", "title": y.title, "scale": scale, "axis": _format(y)}
    legend = {"orient": "top", "labelLimit": 400, "symbolStrokeWidth": 2, "symbolOpacity": 1}
    kind: Spec = {"field": by.column, "type": "nominal", "title": None, "legend": legend} if by else {}
    if by:
        # the same domain for colour, dash and shape makes one legend of the three
        kind["scale"] = {"domain": list(names)}
    layers: list[Spec] = [
        {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {"strokeDash": kind} if by else {}},
        {
            "mark": {"type": "point", "filled": True, "size": 55, "opacity": 1},
            "encoding": {**({"shape": kind} if by else {}), "tooltip": tooltip(fields)},
        },
    ]
    if interval:
        low: Spec = {"field": interval[0], "type": "quantitative", "title": y.title}
        bar: Spec = {"type": "rule", "strokeWidth": 1.5, "opacity": 0.6, "clip": True}
        band: Spec = {"type": "area", "opacity": 0.22, "line": False, "clip": True}
        layers.insert(
            0,
            {
                "transform": [{"filter": f"isValid(datum['{interval[0]}'])"}],  # a line may have none
                "mark": bar if ordinal else band,
                "encoding": {"y": low, "y2": {"field": interval[1]}},
            },
        )
    return {
        "data": {"name": "table"},
        "width": _WIDTH,
        "height": 240,
        "encoding": {"x": x_axis, "y": y_axis, **({"color": kind} if by else {})},
        "layer": layers,
    }


def _format(readout: Readout) -> Spec:
    return {"format": readout.format} if readout.format else {}


def tooltip(fields: Sequence[Readout]) -> list[Spec]:
    """The tooltip channel of these columns."""
    return [
        {
            "field": field.column,
            "title": field.title,
            "type": "quantitative" if field.format else "nominal",
            **({"format": field.format} if field.format else {}),
        }
        for field in fields
    ]


def _config(colours: Sequence[str], *, background: str, text: str, faint: str) -> Spec:
    words = {"labelColor": text, "titleColor": text, "labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": 500}
    return {
        "background": background,
        "font": "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif",
        "padding": 4,
        "axis": {**words, "gridColor": faint, "domainColor": faint, "tickColor": faint, "labelSeparation": 4},
        "area": {"color": colours[0]},
        "legend": {**words, "columns": 2},
        "view": {"stroke": None},
        "range": {"category": list(colours)},
        "line": {"color": colours[0]},
        "point": {"color": colours[0]},
        "rule": {"color": colours[0]},
    }


CONFIG: dict[str, Spec] = {
    "light": _config(_OKABE_ITO, background="#ffffff", text="#24272c", faint="#d9dce1"),
    "dark": _config(_ON_DARK, background="#1b1e24", text="#e3e6ea", faint="#3d424b"),
}
"""Themes of the plots. The backgrounds are those of the page's cards, so that saved pictures are readable."""
