"""The page of a model that was made smaller: what was predicted, what was measured, and what went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from collegium._version import __version__
from collegium.compress.judge_result import DomainScore, Judgement
from collegium.compress.plan import Plan
from collegium.files import atomic_file
from collegium.models.summary import Summary
from collegium.report.draw import save_figures
from collegium.report.figure import CONFIG, Figure
from collegium.report.pack import script_json
from collegium.report.page import cells_across, figure_block, figure_meta, template_text, vega_script
from collegium.report.shrink_figures import expert_map, loss_by_domain, loss_increase, output_error, shares_by_layer
from collegium.report.shrink_words import facts, findings, judgements, sizes

__all__ = ["Shrunk", "write_shrink_figures", "write_shrink_page"]

_SCRIPTS = ("data.js", "theme.js", "figures.js", "shrink.js")
_PROXIES = {
    "top1/mean": "the right token is the likeliest",
    "top5/mean": "the right token is among the five likeliest",
    "probability/mean": "probability of the right token",
    "rank/mean": "rank of the right token, share of the vocabulary",
    "entropy/mean": "entropy of the prediction, nats",
    "loss/uncertain": "loss where the prediction is least certain, nats",
    "loss/late": "loss late in a sequence, nats",
}


@dataclass(frozen=True)
class Shrunk:
    """What the page is about.

    Attributes:
        plan: what was decided.
        before, after: both checkpoints in numbers.
        predicted: the plan as a mask on the whole model; None where that could not be done.
        measured: the checkpoint that was written, against the whole model or by itself; None if it was not judged.
        recovered: the same after it was trained further.
        supers: layer -> its super experts.
        notes: what was left out, and why.
    """

    plan: Plan
    before: Summary
    after: Summary
    predicted: Judgement | None = None
    measured: Judgement | None = None
    recovered: Judgement | None = None
    supers: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def write_shrink_page(shrunk: Shrunk, out: Path) -> None:
    """Write the page, one HTML file with everything in it.

    Raises:
        StorageError: it cannot be written.
    """
    parts = {name: [figure for figure in found if figure is not None] for name, found in _figures(shrunk).items()}
    figures = [figure for found in parts.values() for figure in found]
    environment = Environment(
        loader=PackageLoader("collegium.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = environment.get_template("shrink.html").render(
        version=__version__,
        css=template_text("page.css") + template_text("shrink.css"),
        script="\n".join(map(template_text, _SCRIPTS)),
        vega=vega_script(),
        model=shrunk.plan.model,
        lead=_lead(shrunk.plan),
        findings=findings(shrunk),
        sizes=sizes(shrunk),
        facts=facts(shrunk),
        figures=parts,
        width_of=cells_across,
        kinds=[kind.partition(" (")[0] for kind in judgements(shrunk)],
        domains=_domain_rows(shrunk),
        proxies=_proxy_rows(shrunk),
        continuations=_continuations(shrunk),
        notes=[_sentence(note) for note in (*shrunk.notes, *_judge_notes(shrunk))],
        plan_notes=[_sentence(note) for note in shrunk.plan.notes],
        meta=script_json({"config": CONFIG, "figures": [figure_meta(figure) for figure in figures]}),
        figure_data=figure_block(figures),
    )
    with atomic_file(out) as partial:
        partial.write_text(html, encoding="utf-8")


def write_shrink_figures(shrunk: Shrunk, folder: Path) -> list[Path]:
    """Draw the figures of the page as PNG and SVG files without a browser; returns the files."""
    return save_figures((f for found in _figures(shrunk).values() for f in found if f is not None), folder)


def _figures(shrunk: Shrunk) -> dict[str, Sequence[Figure | None]]:
    """Part of the page -> its figures; None where there is nothing to draw."""
    judged = judgements(shrunk)
    return {
        "loss": [loss_by_domain(judged), loss_increase(judged)],
        "layers": [shares_by_layer(shrunk.plan, judged), output_error(judged)],
        "experts": [expert_map(shrunk.plan, shrunk.supers)],
    }


def _lead(plan: Plan) -> str:
    reached, counts = plan.reached, sorted({len(one.keep) for one in plan.layers})
    each = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"{plan.family}: {reached.experts:,} of {reached.of_experts:,} experts are left, {each} in each of "
        f"{len(plan.layers)} layers; chosen by {plan.method}, planner {plan.planner}"
    )


def _domain_rows(shrunk: Shrunk) -> list[dict[str, Any]]:
    """One row a domain: perplexity and bits per byte of the original, and of each that was judged."""
    scores = {kind: _by_name(found) for kind, found in judgements(shrunk).items()}
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(name for found in scores.values() for name in found):
        known = {kind: found[name] for kind, found in scores.items() if name in found}
        first = next((one for one in known.values() if one.whole_loss is not None), next(iter(known.values())))
        last = list(known.values())[-1]
        judged = [known.get(kind) for kind in scores]
        rows.append(
            {
                "domain": name,
                "tokens": f"{first.tokens:,}",
                "perplexity": [
                    _shown(first.whole_perplexity, ",.2f"),
                    *(_shown(None if one is None else one.perplexity, ",.2f") for one in judged),
                ],
                "bits": [
                    _shown(first.whole_bits_per_byte, ".3f"),
                    *(_shown(None if one is None else one.bits_per_byte, ".3f") for one in judged),
                ],
                "KL": _shown(None if last.kl is None else last.kl.value, ".4f"),
                "top1": _shown(None if last.top1 is None else last.top1.value, ".1%"),
            }
        )
    return rows


def _by_name(found: Judgement) -> dict[str, DomainScore]:
    return {one.domain: one for one in (*found.domains, found.overall)}


def _proxy_rows(shrunk: Shrunk) -> list[tuple[str, str, str]]:
    found = shrunk.recovered or shrunk.measured or shrunk.predicted
    if found is None:
        return []
    return [
        (words, _shown(found.whole_proxies.get(name), ".4f"), _shown(found.proxies.get(name), ".4f"))
        for name, words in _PROXIES.items()
    ]


def _continuations(shrunk: Shrunk) -> list[Any]:
    found = shrunk.recovered or shrunk.measured or shrunk.predicted
    return [] if found is None else list(found.continuations)


def _judge_notes(shrunk: Shrunk) -> list[str]:
    return list(dict.fromkeys(note for one in judgements(shrunk).values() for note in one.notes))


def _sentence(note: str) -> str:
    return f"{note[:1].upper()}{note[1:]}."


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None or value != value else format(value, form)
