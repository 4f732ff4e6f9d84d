"""What simulated cache policies do with more and more memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vl_convert

from collegium.files import atomic_file
from collegium.report.draw import save_figures
from collegium.report.figure import Figure, Readout
from collegium.report.figures._columns import plot_lines

__all__ = ["sweep", "write_sweep"]

_PARTS = (
    ("sweep-hits", "Requests served from memory", Readout("hits", "requests served from memory", ".0%"), "hit_rate"),
    ("sweep-speed", "Predicted speed", Readout("speed", "tokens a second", ",.3~s"), "tokens_per_second"),
    ("sweep-bytes", "Bytes read", Readout("megabytes", "megabytes read a token", ",.3~s"), "megabytes_per_token"),
)
_CAPTIONS = {
    "sweep-hits": "A request is one expert of one token. The optimum (opt) knows the requests to come; with one pool "
    "for all layers no policy that loads on demand can pass it.",
    "sweep-speed": "Simulated with measured times of reads and computation.",
    "sweep-bytes": "Everything that was read, what was read ahead in vain included.",
}


def sweep(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Hit rate, speed and bytes against the share of the experts that memory holds, a line a policy.

    Args:
        rows: one simulation each: "policy", "share" of the experts in memory, "experts", "hit", "prefetched",
            "bytes_per_token" and "tokens_per_second".
    """
    policies = list(dict.fromkeys(str(row["policy"]) for row in rows))
    ordered = [row for name in policies for row in rows if row["policy"] == name]
    value = {
        "hit_rate": lambda row: row["hit"] + row["prefetched"],
        "tokens_per_second": lambda row: row["tokens_per_second"],
        "megabytes_per_token": lambda row: row["bytes_per_token"] / 1e6,
    }
    figures = []
    for name, title, readout, key in _PARTS:
        kinds = {
            policy: [(row["share"], value[key](row)) for row in ordered if row["policy"] == policy]
            for policy in policies
        }
        spec, columns = plot_lines(
            kinds,
            readout,
            x=Readout("share", "part of the experts in memory", ".0%"),
            top=1.0 if name == "sweep-hits" else None,
            ordinal=False,
            fields=[Readout("experts", "experts in memory", ",")],
            more={"experts": [row["experts"] for row in ordered]},
        )
        spec = {**spec, "height": 360}
        alt = _words(ordered, value[key], readout)
        figures.append(Figure(name, title, _CAPTIONS[name], alt, spec, columns))
    return figures


def _words(rows: Sequence[Mapping[str, Any]], value: Any, readout: Readout) -> str:
    """The best and the worst at the middle budget."""
    shares = sorted({row["share"] for row in rows})
    at = shares[len(shares) // 2]
    here = sorted((row for row in rows if row["share"] == at), key=value)
    low, high = here[0], here[-1]
    return (
        f"With {at:.0%} of the experts in memory, {readout.title} range from {value(low):,.3g} ({low['policy']}) to "
        f"{value(high):,.3g} ({high['policy']})."
    )


def write_sweep(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw `sweep` into ``sweep-*.png``, ``.svg`` and self-contained ``.html`` files of a folder.

    Raises:
        StorageError: a file cannot be written.
    """
    figures = sweep(rows)
    written = save_figures(figures, folder)
    for figure in figures:
        page = folder / f"{figure.name}.html"
        with atomic_file(page) as partial:
            partial.write_text(vl_convert.vegalite_to_html(figure.drawn(), bundle=True), encoding="utf-8")
        written.append(page)
    return written
