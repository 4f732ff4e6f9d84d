"""Figures as files, drawn without a browser."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import vl_convert

from collegium.files import atomic_file
from collegium.report.figure import Figure

__all__ = ["save_figures"]


def save_figures(figures: Iterable[Figure], folder: Path) -> list[Path]:
    """Draw each figure, as it first shows on the page, into ``NAME.png`` and ``NAME.svg``.

    Raises:
        StorageError: a file cannot be written.
    """
    written = []
    for figure in figures:
        spec = {**figure.drawn(), "title": {"text": figure.title, "anchor": "start", "offset": 12}}
        png, svg = folder / f"{figure.name}.png", folder / f"{figure.name}.svg"
        with atomic_file(png) as partial:
            partial.write_bytes(vl_convert.vegalite_to_png(spec, scale=2))
        with atomic_file(svg) as partial:
            partial.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
        written += [png, svg]
    return written
