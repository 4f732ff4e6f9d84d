"""Documentation that is computed: methods from the catalogue, benchmark tables from stored results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from collegium import catalog
from collegium.benchmarks.harness import cost
from collegium.measure import metrics

RESULTS = Path(__file__).parent / "results"


def methods_table() -> str:
    """One table a kind, straight from the catalogue."""
    parts = []
    for kind, what in catalog.KINDS.items():
        members = catalog.methods(kind)
        if not members:
            continue
        parts.append(f"\n## {kind}\n\nWhat it is: {what}.\n\n| name | paper | module | claim |\n|---|---|---|---|")
        for m in members:
            paper = f"[{m.paper}](https://arxiv.org/abs/{m.arxiv})" if m.arxiv else m.paper
            claim = f"**{m.claim['status']}**: {m.claim['numbers']}" if m.claim else "no claim test yet"
            parts.append(f"| `{m.name}` | {paper} | `{m.module}` | {claim} |")
    return "\n".join(parts)


def bench_table(name: str) -> str:
    """The rows of one stored benchmark run (``collegium bench NAME --json``)."""
    rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    head = "| point | ours | peer | by | ratio | goal | met | limit | share |"
    return "\n".join([head, "|---" * 9 + "|", *map(_bench_row, rows)])


def _bench_row(row: dict[str, Any]) -> str:
    unit, most = row.get("unit", "s"), row.get("most")
    goals = [] if row["goal"] is None else [f"{row['goal']:.2f}"]
    goals += [] if most is None else [f"at most {cost(most, unit)}"]
    share = "" if row["share"] is None else f"{row['share']:.0%}"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    met = {True: "yes", False: "**no**", None: ""}[row["met"]]
    peer = "" if row["peer"] is None else cost(row["peer"], unit)
    cells = (
        row["name"],
        cost(row["ours"], unit),
        peer,
        row["peer_name"],
        ratio,
        " ".join(goals),
        met,
        row["limit"],
        share,
    )
    return f"| {' | '.join(cells)} |"


def metrics_rows() -> str:
    """The rows of the table of metrics."""
    found = metrics()
    return "\n".join(f"| `{m.name}` | {m.question} | {', '.join(sorted(m.needs)) or 'a trace'} |" for m in found)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs event: fill the placeholders of a page."""
    markdown = markdown.replace("<!-- methods -->", methods_table()).replace("<!-- metrics -->", metrics_rows())
    return re.sub(r"<!-- bench: (\w+) -->", lambda found: bench_table(found[1]), markdown)
