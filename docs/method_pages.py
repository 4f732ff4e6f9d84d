"""Pages about methods, made from the catalogue and docstrings when the site is built: one a kind, one a system.

Nothing of them is stored. A new method has its place here, in the navigation, and in the search as soon as it is
catalogued.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from collegium import catalog
from collegium.arena.results import formatted
from collegium.catalog import KINDS, Method
from collegium.systems import Layer

RESULTS = Path(__file__).parent / "results"
BASELINE = "top_k"
"""The method of the arena that others are shown beside."""

GROUPS = {
    "Systems": ("system",),
    "Parts of a router": ("score", "transform", "selection", "weigh", "capacity"),
    "Layers and experts": ("layer", "expert", "zero_expert", "compute"),
    "Balance": ("balance", "routing_loss", "weight_loss", "controller"),
    "Training": ("objective", "schedule"),
    "Measuring": ("metric",),
    "Shrinking": (
        "importance", "planner", "grouping", "merge", "neurons", "factor", "router_edit", "compaction", "recovery",
        "retrieval",
    ),
    "Running": ("cache", "predictor", "precision", "scheduler"),
}  # fmt: skip
"""Kinds by what they are for. One that is nowhere has a group of its own name."""

RECIPES = {
    "system": "moe.router: NAME",
    "score": "moe.router: {score: NAME}",
    "transform": "moe.router: {transforms: [NAME]}",
    "selection": "moe.router: {select: NAME}",
    "weigh": "moe.router: {weigh: NAME}",
    "capacity": "moe.router: {capacity: NAME}",
    "zero_expert": "moe.zero_experts: [NAME]",
    "routing_loss": "moe.balance: {losses: [NAME]}",
    "weight_loss": "moe.balance: {losses: [NAME]}",
    "objective": "objective: NAME",
    "schedule": "schedule: {name: NAME}",
}
"""How a recipe names a member of a kind."""

LEGEND = (
    "T tokens, A assignments, E experts, K experts of a token, d model width, f expert width. x input of the router, "
    "z logits, p probabilities, s selection scores, w combine weights; n_e assignments of expert e, f_e its share of "
    "all, P_e its mean probability. top-K of p: the K experts of the largest p."
)

EXAMPLE = Layer(num_experts=16, num_experts_per_tok=2, moe_intermediate_size=128)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """mkdocs event: add the pages, and their places in the navigation."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    place = next(entry for entry in config.nav or [] if "Methods" in entry)
    place["Methods"] = [*place["Methods"], *navigation()]
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs event: fill the placeholders of the overview."""
    return markdown.replace("<!-- kinds -->", kinds_table()).replace("<!-- claims -->", claims_table())


def on_page_content(html: str, **_: Any) -> str:
    """mkdocs event: in the reference, sections of docstrings as on these pages instead of as boxes that fold."""

    def flat(found: re.Match[str]) -> str:
        title, text = found.groups()
        return f"<pre><code>{text}</code></pre>" if title == "Formula" else f"<p><strong>{title}:</strong> {text}</p>"

    titles = "|".join(catalog.SECTIONS)
    box = rf"<details[^>]*>\s*<summary>({titles})</summary>\s*<p>(.*?)</p>\s*</details>"
    return re.sub(box, flat, html, flags=re.DOTALL)


def groups() -> dict[str, list[str]]:
    """Group -> its kinds that have members, each kind once."""
    alive = {one.kind for one in catalog.methods()}
    grouped = {kind for kinds in GROUPS.values() for kind in kinds}
    every = {**GROUPS, **{titled(kind): (kind,) for kind in KINDS if kind not in grouped}}
    found = {group: [kind for kind in kinds if kind in alive] for group, kinds in every.items()}
    return {group: kinds for group, kinds in found.items() if kinds}


def navigation() -> list[dict[str, Any]]:
    """Entries of mkdocs' ``nav``."""
    found: list[dict[str, Any]] = []
    for group, kinds in groups().items():
        entries = [{titled(kind): f"methods/{kind}.md"} for kind in kinds]
        if "system" in kinds:
            entries = [{"All systems": "methods/system.md"}]
            entries += [{one.name: address(one)} for one in catalog.methods("system")]
        found.append({group: entries if len(entries) > 1 else f"methods/{kinds[0]}.md"})
    return found


def pages() -> dict[str, str]:
    """Path below the docs folder -> Markdown, of all generated pages."""
    found = {f"methods/{kind}.md": kind_page(kind) for kinds in groups().values() for kind in kinds}
    return found | {address(one): system_page(one) for one in catalog.methods("system")}


def titled(kind: str) -> str:
    """A kind as a heading."""
    return kind.replace("_", " ").capitalize()


def address(one: Method) -> str:
    """Where a method is described, from the docs folder."""
    if one.kind == "system":
        return f"methods/system/{one.name}.md"
    return f"methods/{one.kind}.md#{one.name}"


def link(text: str, target: str, page: str) -> str:
    """A link to a place in the docs folder, from a page there."""
    return f"[{text}]({posixpath.relpath(target, posixpath.dirname(page) or '.')})"


def status(one: Method) -> str:
    """Of its claim, in a word or two."""
    return one.claim["status"] if one.claim else "no test yet"


# ---- the overview ----------------------------------------------------------------------------------------------------


def kinds_table() -> str:
    """Every kind with its members."""
    rows = ["| kind | what its members do | members |", "|---|---|---|"]
    for kinds in groups().values():
        for kind in kinds:
            members = ", ".join(link(f"`{one.name}`", address(one), "methods.md") for one in catalog.methods(kind))
            rows.append(f"| {link(titled(kind), f'methods/{kind}.md', 'methods.md')} | {KINDS[kind]} | {members} |")
    return "\n".join(rows)


def claims_table() -> str:
    """Every method that has a claim test, with its numbers."""
    rows = ["| method | claim | numbers |", "|---|---|---|"]
    for one in catalog.methods():
        if one.claim:
            name = link(f"`{one.kind}/{one.name}`", address(one), "methods.md")
            rows.append(f"| {name} | {status(one)} | {cell(one.claim['numbers'])} |")
    return "\n".join(rows)


# ---- a kind ----------------------------------------------------------------------------------------------------------


def kind_page(kind: str) -> str:
    """All members of a kind; of systems a list, since each has a page."""
    page = f"methods/{kind}.md"
    members = catalog.methods(kind)
    parts = [f"# {titled(kind)}", f"{KINDS[kind][0].upper()}{KINDS[kind][1:]}."]
    if kind in RECIPES:
        parts.append(f"In a recipe: `{RECIPES[kind]}`.")
    if len(members) > 1:
        rows = ["| name | in a sentence | paper | claim |", "|---|---|---|---|"]
        for one in members:
            name = link(f"`{one.name}`", address(one), page) if kind == "system" else f"[`{one.name}`](#{one.name})"
            rows.append(f"| {name} | {sentence(one, page)} | {one.paper} | {status(one)} |")
        parts.append("\n".join(rows))
    if kind == "system":
        return "\n\n".join(parts) + "\n"
    if any("Formula" in one.sections for one in members):
        parts.append(f"Letters in formulas: {LEGEND}")
    described: dict[Any, Method] = {}
    for one in members:
        parts.append(f"## `{one.name}` {{#{one.name}}}")
        first = described.setdefault(one.obj, one)
        if first is one:
            parts += [source(one), *described_in(one, page), claim(one)]
        else:
            parts += [source(one), f"The same code as [`{first.name}`](#{first.name}).", claim(one)]
    return "\n\n".join(parts) + "\n"


def system_page(one: Method) -> str:
    """A system: what it does, what it stands for, what was measured."""
    page = address(one)
    stands = yaml.safe_dump({"moe": one.obj().settings(EXAMPLE)}, sort_keys=False, default_flow_style=None, width=100)
    parts = [f"# `{one.name}`", source(one), *described_in(one, page)]
    parts += [f"Letters in the formula: {LEGEND}", "## In a recipe", f"`moe.router: {one.name}` stands for"]
    parts += [f"```yaml\n{stands}```"]
    parts += [
        f"where the plain layer has {EXAMPLE.num_experts} experts of width {EXAMPLE.moe_intermediate_size}, of which a "
        f"token has {EXAMPLE.num_experts_per_tok}."
    ]
    parts += ["## Measured", claim(one), *arena(one, page)]
    return "\n\n".join(parts) + "\n"


# ---- a method --------------------------------------------------------------------------------------------------------


def source(one: Method) -> str:
    """Paper and place."""
    paper = f"{one.paper}, [arXiv {one.arxiv}](https://arxiv.org/abs/{one.arxiv})" if one.arxiv else one.paper
    return f"{paper}  \n`{one.module}.{one.obj.__qualname__}`"


def described_in(one: Method, page: str) -> list[str]:
    """What the docstring says, in blocks: prose, formula, the other sections, settings."""
    found = [markdown(one.text, one, page)]
    for title, text in one.sections.items():
        block = f"```text\n{text}\n```" if title == "Formula" else f"**{title}:** {markdown(text, one, page)}"
        found.append(block)
    if one.settings:
        rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
        for each in one.settings:
            default = "needed" if each.default is None else cell(each.default)
            meaning = cell(markdown(each.meaning, one, page))
            rows.append(f"| `{each.name}` | {cell(each.type)} | {default} | {meaning} |")
        found.append("\n".join(rows))
    return found


def claim(one: Method) -> str:
    """What became of the claim of its paper."""
    if one.claim is None:
        return "**Claim:** no claim test yet."
    return f"**Claim:** {one.claim['status']}: {one.claim['numbers']}"


def sentence(one: Method, page: str) -> str:
    """The first one of its docstring."""
    first = one.text.split("\n\n")[0]
    return cell(markdown(" ".join(first.split()).split(". ")[0].rstrip(".:"), one, page))


def markdown(text: str, one: Method, page: str) -> str:
    """A docstring as Markdown: names of methods in single backticks become links."""

    def linked(found: re.Match[str]) -> str:
        other = _named().get(found[1])
        known = other is not None and other.obj is not one.obj
        return link(f"`{found[1]}`", address(other), page) if other and known else found[0]

    return re.sub(r"(?<!`)`(\w+)`(?!`)", linked, re.sub(r"::$", ":", text, flags=re.MULTILINE))


def _named() -> dict[str, Method]:
    """What a docstring may call a method by: its class or function, and the name of a system or an objective."""
    found = {one.obj.__qualname__: one for one in catalog.methods() if one.kind in catalog.DOCUMENTED}
    return found | {one.name: one for kind in ("system", "objective") for one in catalog.methods(kind)}


def cell(text: str) -> str:
    """Text that stands in a table: on one line, its bars escaped outside of code."""
    pieces = re.split(r"(`+[^`]+`+)", " ".join(text.split()))
    return "".join(piece if piece.startswith("`") else piece.replace("|", "\\|") for piece in pieces)


def arena(one: Method, page: str) -> list[str]:
    """Its row of the arena beside that of the baseline; nothing where there is no arena, or it is not in it."""
    file = RESULTS / "routing.json"
    if not file.is_file():
        return []
    record = json.loads(file.read_text(encoding="utf-8"))
    rows = [row for row in record["methods"] if one.name in row["systems"]]
    if not rows:
        return []
    rows += [row for row in record["methods"] if row["name"] == BASELINE]
    numbers = [name for name in record["labels"] if any(name in row["numbers"] for row in rows)]
    table = [
        f"| number | {' | '.join(row['name'] for row in rows)} |",
        "|---|" + "---|" * len(rows),
    ]
    for name in numbers:
        values = [spread(name, row["numbers"].get(name)) for row in rows]
        table.append(f"| {record['labels'][name]} | {' | '.join(values)} |")
    named = "the arena"
    if (RESULTS / "routing.md").is_file():
        named = link(named, "results/routing.md", page)
    return [f"In {named}, mean and range over seeds:", "\n".join(table)]


def spread(number: str, found: dict[str, float] | None) -> str:
    """A mean and its range, in the unit of the number's label."""
    if found is None:
        return ""
    mean, low, high = (formatted(number, (found[which],)) for which in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low} to {high})"
