"""The report: one HTML file with everything in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined

from collegium._version import __version__
from collegium.files import atomic_file
from collegium.measure.estimate import Estimate
from collegium.measure.metric import rows_of
from collegium.models.summary import Summary
from collegium.report.draw import save_figures
from collegium.report.facts import domain_tokens, expert_bytes, facts, layers_in_words
from collegium.report.figure import CONFIG, Figure
from collegium.report.figures._columns import many
from collegium.report.measured import Measured, measure
from collegium.report.pack import pack_block, script_json
from collegium.report.sections import Section, sections
from collegium.report.verdict import THRESHOLDS, verdict
from collegium.report.viewer import Tokenizer, ViewerData, viewer_data
from collegium.trace import Trace

__all__ = [
    "Say",
    "cells_across",
    "figure_block",
    "figure_meta",
    "template_text",
    "vega_script",
    "write_figures",
    "write_report",
]

Say = Callable[[str, int, int], None]
"""Progress: called with (what is being done, how many steps are done, of how many)."""

_SCRIPTS = ("data.js", "theme.js", "figures.js", "viewer.js", "main.js")


def write_report(
    trace: Trace,
    out: Path,
    *,
    compare: Trace | None = None,
    tokenizer: Tokenizer | None = None,
    model: Any = None,
    summary: Summary | None = None,
    measured: Measured | None = None,
    say: Say | None = None,
) -> Measured:
    """Write the page of a trace: facts, verdict, figures, token viewer.

    Args:
        out: the HTML file.
        compare: a second trace of the same tokens.
        tokenizer: of the traced model, for the text of the tokens; without it ids are shown.
        model: the traced model, for what only the weights tell.
        summary: of its checkpoint, for sizes.
        measured: results of `measure` for the same traces and model, if there are any already.
        say: told about progress.

    Returns:
        What was measured.

    Raises:
        TraceError: the trace is damaged or holds no tokens.
        StorageError: `out` cannot be written.
    """
    if measured is None:
        measured = measure(trace, other=compare, model=model, say=say)
    if say:
        say("documents and tokens", 0, 1)
    viewed = viewer_data(trace, tokenizer)
    size = expert_bytes(summary)
    html = _render(measured, sections(measured, expert_bytes=size), viewed, summary)
    if say:
        say("documents and tokens", 1, 1)
    with atomic_file(out) as partial:
        partial.write_text(html, encoding="utf-8")
    return measured


def write_figures(trace: Trace, folder: Path, *, measured: Measured | None = None) -> list[Path]:
    """Draw the figures of a trace, each as it first shows on the page, as PNG and SVG files without a browser.

    Args:
        folder: where they go.
        measured: results of `measure` for this trace, if there are any already.

    Returns:
        The files.
    """
    found = sections(measured or measure(trace))
    return save_figures((figure for section in found for figure in section.figures), folder)


def _render(measured: Measured, parts: Sequence[Section], viewed: ViewerData, summary: Summary | None) -> str:
    trace = measured.trace
    figures = [figure for section in parts for figure in section.figures]
    found = verdict(measured, expert_bytes=expert_bytes(summary))
    environment = Environment(
        loader=PackageLoader("collegium.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html").render(
        version=__version__,
        title=f"Routing of {trace.meta.model}",
        model=trace.meta.model,
        lead=f"{trace.meta.family}, MoE layers: {layers_in_words(trace)}; {many(len(trace), 'token')} of "
        f"{many(len(trace.meta.domains), 'domain')}",
        short=len(trace) < THRESHOLDS.tokens,
        trace=f"trace {trace.folder.name}",
        css=template_text("page.css"),
        script="\n".join(map(template_text, _SCRIPTS)),
        vega=vega_script(),
        sections=parts,
        findings=found,
        facts=facts(trace, summary),
        domains=domain_tokens(trace),
        comparison=_comparison(measured),
        viewer_help=_viewer_help(viewed),
        width_of=cells_across,
        meta=script_json({"config": CONFIG, "figures": [figure_meta(f) for f in figures], "viewer": viewed.meta}),
        figure_data=figure_block(figures),
        viewer_data=pack_block(viewed.columns),
    )


def figure_meta(figure: Figure) -> dict[str, Any]:
    """What the script needs to know of a figure besides its data."""
    return {
        "name": figure.name,
        "spec": figure.spec,
        "columns": list(figure.columns),
        "choices": [{"name": c.name, "values": list(c.values), "copies": c.copies} for c in figure.choices],
        "readout": [{"column": r.column, "title": r.title, "format": r.format} for r in figure.readout],
    }


def figure_block(figures: Sequence[Figure]) -> str:
    """The data of all figures as text, see `pack_block`."""
    columns = {f"{figure.name}/{name}": values for figure in figures for name, values in figure.columns.items()}
    return pack_block(columns, bits={f"{f.name}/{name}": f.bits for f in figures for name in f.columns})


def cells_across(figure: Figure) -> int:
    """Cells of a heat map from left to right."""
    first = figure.readout[0].column
    column = next((choice.values[0] for choice in figure.choices if choice.name == first), first)
    return len(np.unique(np.asarray(figure.columns[column])))


def _comparison(measured: Measured) -> list[tuple[str, str, str]]:
    """``(number, here, in the other trace)``, means over layers, of the metrics that both have."""
    found: list[tuple[str, str, str]] = []
    for name, theirs in measured.other_results.items():
        here, other = (_means(result) for result in (measured.get(name) or [], theirs))
        heads = [head for head in here if head != "layer" and head in other]
        found += [(f"{name}: {head}", f"{here[head]:.3f}", f"{other[head]:.3f}") for head in heads]
    return found


def _means(result: Any) -> dict[str, float]:
    """Means over layers of the numbers in a metric's table; rows of the whole model are left out."""
    columns: dict[str, list[float]] = {}
    for row in rows_of(result):
        if row.layer is None:
            continue
        for head, value in row.summary().items():
            if isinstance(value, int | float | Estimate) and float(value) == float(value):
                columns.setdefault(head, []).append(float(value))
    return {head: sum(values) / len(values) for head, values in columns.items()}


def _viewer_help(viewed: ViewerData) -> str:
    passages = viewed.meta["documents"]
    shown, tokens = len({entry["document"] for entry in passages}), sum(entry["length"] for entry in passages)
    words = (
        f"{shown} of {viewed.meta['documents_in_trace']:,} documents ({tokens:,} of "
        f"{viewed.meta['tokens_in_trace']:,} tokens) are inside this page. Hover over a token for its experts in all "
        "layers; click it (or use the arrow keys) to keep it; then press an expert to see what it is known for."
    )
    if viewed.meta["texts"] is None:
        words += " Token ids are shown; give the model or its tokenizer to see text."
    return words


def template_text(name: str) -> str:
    """A file of the templates as it is."""
    return resources.files("collegium.report").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def vega_script() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, of the version that draws the pictures, too."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", "<\\/script")
