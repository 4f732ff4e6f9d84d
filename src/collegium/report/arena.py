"""An arena's page, its table for the docs, and its plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from collegium._version import __version__
from collegium.arena import LABELS, Entry, Results
from collegium.arena.results import formatted
from collegium.files import atomic_file
from collegium.report.arena_figures import arena_figures
from collegium.report.draw import save_figures
from collegium.report.figure import CONFIG
from collegium.report.figures._columns import many
from collegium.report.pack import script_json
from collegium.report.page import cells_across, figure_block, figure_meta, template_text, vega_script

__all__ = ["arena_columns", "arena_markdown", "arena_row", "write_arena"]

_SCRIPTS = ("data.js", "theme.js", "figures.js", "shrink.js")
_NOT_CAUSAL = "looks at later tokens, so its bits per byte are no measure of prediction; not ranked"


def write_arena(results: Results, out: Path, command: str) -> list[Path]:
    """Write ``arena.json``, ``arena.md``, ``arena.html`` and ``figures/`` into `out`; returns the first three.

    Args:
        command: that made the results, for the table.

    Raises:
        StorageError: a file cannot be written.
    """
    files = [out / name for name in ("arena.json", "arena.md", "arena.html")]
    results.save(files[0])
    for file, text in zip(files[1:], (arena_markdown(results, command), _page(results, command)), strict=True):
        with atomic_file(file) as partial:
            partial.write_text(text, encoding="utf-8")
    save_figures(arena_figures(results), out / "figures")
    return files


def arena_columns(results: Results) -> list[str]:
    """Numbers that some entry has, in order."""
    return [number for number in LABELS if any(number in one.numbers for one in results.entries)]


def arena_row(results: Results, one: Entry, spread: bool = True) -> list[str]:
    """One cell for each of `arena_columns`."""
    return [
        formatted(number, one.numbers[number], spread) if number in one.numbers else "–"
        for number in arena_columns(results)
    ]


def _places(results: Results) -> dict[str, tuple[str, str, str]]:
    """Name -> place by mean bits, points and slope of the tournament."""
    ranking = results.ranking()
    if ranking is None:
        return {}
    return {
        one.name: (str(place + 1), f"{ranking.points[place]:.2f}", f"{ranking.slope[place]:+.2f}")
        for place, one in enumerate(results.ranked)
    }


def _ordered(results: Results) -> list[Entry]:
    return [*results.ranked, *(one for one in results.entries if not one.causal)]


def _lead(results: Results) -> str:
    plan = results.plan
    recipe = plan.recipe(plan.baseline, plan.seeds[0])
    tokens = recipe.steps * recipe.run.batch_size * recipe.data.sequence_length
    speed = f"; speed with {many(results.threads, 'thread')} of torch" if results.threads else ""
    return (
        f"{len(results.entries)} methods, {len(plan.seeds)} seeds each, {tokens:,} tokens of the corpus "
        f"{recipe.data.corpus!r} a run; the baseline is {plan.baseline}{speed}"
    )


_NOTES = (
    "Bits per byte: mean over the domains of held-out text. MaxVio, dead experts, active experts: of the experts that "
    "compute something, on held-out text, mean over layers. I(domain; expert): less what shuffled labels give. Routing "
    "changed: share of tokens with another set of experts after the last third of training. MFLOP: of matrix products, "
    "forward, counted; tokens/s: of training, steps of all methods in turns; peak MB: of the whole training process.",
    "Ranking: place by mean bits per byte; mean points of Swiss-system tournaments over the domains (LLM Swiss Round, "
    "2025), and how fast they fall when 0, 1 or 2 methods leave after each round.",
)


def arena_markdown(results: Results, command: str) -> str:
    """The tables, with the command that made them."""
    heads = [LABELS[number] for number in arena_columns(results)]
    lines = ["# Routing methods, measured", "", f"Made by `{command}`. {_lead(results)}.", ""]
    lines += [text + "\n" for text in _NOTES]
    lines += ["Mean of the seeds, and their range.", "", _line(["method", *heads]), "|---" * (len(heads) + 1) + "|"]
    lines += [_line([_name(one), *arena_row(results, one)]) for one in _ordered(results)]
    places = _places(results)
    if places:
        lines += ["", "## Ranking", "", _line(["method", "place by mean", "Swiss points", "slope"]), "|---" * 4 + "|"]
        lines += [_line([f"`{name}`", *cells]) for name, cells in places.items()]
    domains = list(results.entries[0].domains)
    lines += ["", "## Bits per byte of each domain", "", _line(["method", *domains]), "|---" * (len(domains) + 1) + "|"]
    lines += [
        _line([_name(one), *(formatted("bits_per_byte", one.domains[domain], False) for domain in domains)])
        for one in _ordered(results)
    ]
    if any(not one.causal for one in results.entries):
        lines += ["", f"\\* {_NOT_CAUSAL}."]
    if results.missing:
        lines += ["", f"Not there yet: {'; '.join(results.missing)}."]
    return "\n".join(lines) + "\n"


def _name(one: Entry) -> str:
    return f"`{one.name}`" + ("" if one.causal else " \\*")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _page(results: Results, command: str) -> str:
    figures = arena_figures(results)
    environment = Environment(
        loader=PackageLoader("collegium.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    places = _places(results)
    return environment.get_template("arena.html").render(
        version=__version__,
        css=template_text("page.css") + template_text("shrink.css"),
        script="\n".join(map(template_text, _SCRIPTS)),
        vega=vega_script(),
        lead=_lead(results),
        command=command,
        notes=_NOTES,
        missing=results.missing,
        heads=[LABELS[number] for number in arena_columns(results)],
        rows=[_page_row(results, one, places) for one in _ordered(results)],
        not_causal=_NOT_CAUSAL,
        figures=figures,
        width_of=cells_across,
        meta=script_json({"config": CONFIG, "figures": [figure_meta(figure) for figure in figures]}),
        figure_data=figure_block(figures),
    )


def _page_row(results: Results, one: Entry, places: dict[str, tuple[str, str, str]]) -> dict[str, Any]:
    place = places.get(one.name, ("–", "–", "–"))
    return {
        "name": one.name,
        "causal": one.causal,
        "baseline": one.name == results.plan.baseline,
        "cells": [*place, *arena_row(results, one, spread=False)],
    }
