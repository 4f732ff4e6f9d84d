"""Tables that are computed: metrics from the catalogue, benchmarks from stored results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from collegium.benchmarks.harness import cost
from collegium.measure import metrics

RESULTS = Path(__file__).parent / "results" / "bench"


def bench_table(name: str) -> str:
    """The rows of one stored benchmark run (``collegium bench NAME --json``)."""
    rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    head = "| point | ours | peer | by | ratio | goal | met | limit | share |"
    return "\n".join([head, "|---" * 9 + "|", *map(_bench_row, rows)])


def _bench_row(row: dict[str, Any]) -> str:
    unit, most = row.get("unit", "s"), row.get("most")
    goals = [] if row["goal"] is None else [f"{row['goal']:.2f}"]
    goals += [] if most is None else [f"at most {cost(most, unit)}"]
    goals += [] if row.get("within") is None else [f"within {row['within']:.0%}"]
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


QWEN = {"layers": 48, "experts": 128, "K": 8, "d": 2048, "f": 768, "heads": 4096, "kv": 512, "vocabulary": 151_936}
"""Sizes of Qwen3-30B-A3B: width of all query heads together, of all key-value heads together."""
OLMOE = {"layers": 16, "experts": 64, "K": 8, "d": 2048, "f": 1024, "heads": 2048, "kv": 2048, "vocabulary": 50_304}
TOKENS, LENGTH = 32_768, 512


def large_model_table() -> str:
    """What shrinking Qwen3-30B-A3B takes, derived from the stored run on OLMoE-1B-7B's shapes."""
    rows = {row["name"]: row for row in json.loads((RESULTS / "shrink.json").read_text(encoding="utf-8"))["rows"]}
    calibrate = next(row for name, row in rows.items() if name.startswith("calibrate"))
    prune = next(row for name, row in rows.items() if name.startswith("prune"))
    measured = int(calibrate["name"].split(" on ")[1].split()[0].replace(",", ""))
    whole, half = (_nbytes(QWEN, QWEN["experts"] // n) for n in (1, 2))
    written = _nbytes(OLMOE, OLMOE["experts"] // 2)
    seconds = calibrate["ours"] * _operations(QWEN) / _operations(OLMOE) * TOKENS / measured
    hidden = 2 * TOKENS * QWEN["d"] * 2
    memory = rows["peak memory of calibrating"]["ours"] + 2 * (_layer(QWEN) - _layer(OLMOE))
    cells = [
        ("calibrate", f"{seconds / 3600:.1f} h", f"{hidden / 1e9:.1f} GB for hidden states", f"{memory / 1e9:.1f} GB"),
        ("plan", "seconds", "under 0.2 GB", "under 1 GB"),
        ("apply", f"{prune['ours'] * half / written / 60:.0f} min", f"{half / 1e9:.0f} GB for the result beside the "
         f"{whole / 1e9:.0f} GB of the source", f"{rows['peak memory']['ours'] / 1e9:.1f} GB"),
    ]  # fmt: skip
    head = ["| step | time | disk | memory |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(cell)} |" for cell in cells)])


def _layer(model: dict[str, int]) -> int:
    """Bytes of the experts of one layer in bfloat16."""
    return 2 * 3 * model["experts"] * model["d"] * model["f"]


def _nbytes(model: dict[str, int], experts: int) -> int:
    """Bytes of the weights in bfloat16, with so many experts a layer."""
    d = model["d"]
    attention = 2 * d * (model["heads"] + model["kv"])
    return 2 * (model["layers"] * (attention + experts * d * (3 * model["f"] + 1)) + 2 * model["vocabulary"] * d)


def _operations(model: dict[str, int]) -> int:
    """Multiplications for one token in all layers; experts run twice, in the model and for their statistics."""
    d, heads = model["d"], model["heads"]
    attention = 2 * d * (heads + model["kv"]) + LENGTH * heads
    return model["layers"] * (attention + 2 * 3 * model["K"] * d * model["f"])


def metrics_rows() -> str:
    """The rows of the table of metrics."""
    found = metrics()
    return "\n".join(f"| `{m.name}` | {m.question} | {', '.join(sorted(m.needs)) or 'a trace'} |" for m in found)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs event: fill the placeholders of a page."""
    markdown = markdown.replace("<!-- metrics -->", metrics_rows())
    if "<!-- large model -->" in markdown:
        markdown = markdown.replace("<!-- large model -->", large_model_table())
    return re.sub(r"<!-- bench: (\w+) -->", lambda found: bench_table(found[1]), markdown)
