"""Pages that the documentation makes of the catalogue."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from collegium.catalog import claims, methods

FILE = Path(__file__).parents[2] / "docs/method_pages.py"


@pytest.fixture
def made() -> Any:
    """The module of mkdocs' hooks."""
    spec = importlib.util.spec_from_file_location("method_pages", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_a_place_with_all_it_says(made: Any) -> None:
    pages = made.pages()
    for one in methods():
        path, _, anchor = made.address(one).partition("#")
        page = pages[path]
        if anchor:
            page = page.partition(f"{{#{anchor}}}")[2].partition("\n## ")[0]
        assert one.paper in page
        assert f"{one.module}.{one.obj.__qualname__}" in page
        assert (one.claim["numbers"] if one.claim else "no claim test yet") in page
        if "The same code as" not in page:
            assert all(f"```text\n{text}" in page for name, text in one.sections.items() if name == "Formula")
            assert all(f"**{name}:**" in page for name in one.sections if name != "Formula")
            assert all(f"| `{each.name}` |" in page for each in one.settings)


def test_the_navigation_has_every_page_once(made: Any) -> None:
    found: list[str] = re.findall(r"methods/[\w/]+\.md", json.dumps(made.navigation()))
    assert sorted(found) == sorted(made.pages())


def test_a_kind_that_is_in_no_group_has_a_page(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "GROUPS", {"Systems": ("system",)})
    assert "methods/cache.md" in made.pages()
    assert {"Cache": "methods/cache.md"} in made.navigation()


def test_the_overview_has_every_method_and_every_claim(made: Any) -> None:
    page = made.on_page_markdown((FILE.parent / "methods.md").read_text(encoding="utf-8"))
    links = set(re.findall(r"\(([^)]+\.md(?:#[\w-]+)?)\)", page))
    assert {made.address(one) for one in methods()} <= links
    # in a table cell a line is one, and a bar outside of code is escaped
    assert page.count("| holds |") + page.count("| not reproduced |") == len(claims())


def row(name: str, systems: list[str], scale: float) -> dict[str, Any]:
    def of(mean: float) -> dict[str, float]:
        return {"mean": scale * mean, "low": scale * mean, "high": scale * mean * 1.5}

    return {"name": name, "systems": systems, "numbers": {"bits_per_byte": of(2.0), "parameters": of(5e6)}}


def test_a_system_shows_its_row_of_the_arena_beside_the_baseline(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "RESULTS", tmp_path)
    assert "| number |" not in made.pages()["methods/system/ssr.md"]
    record = {
        "labels": {"bits_per_byte": "bits per byte", "parameters": "M parameters", "other": "not measured"},
        "methods": [row("top_k", [], 1.0), row("ssr", ["ssr"], 2.0), row("moge", ["moge"], 3.0)],
    }
    (tmp_path / "routing.json").write_text(json.dumps(record), encoding="utf-8")
    pages = made.pages()
    page = pages["methods/system/ssr.md"]
    assert "| number | ssr | top_k |" in page
    assert "| bits per byte | 4.0000 (4.0000 to 6.0000) | 2.0000 (2.0000 to 3.0000) |" in page
    assert "| M parameters | 10.00 (10.00 to 15.00) | 5.00 (5.00 to 7.50) |" in page
    assert "results/routing.md" not in page
    assert "| number |" not in pages["methods/system/thor.md"]
    (tmp_path / "routing.md").touch()
    assert "[the arena](../../results/routing.md)" in made.pages()["methods/system/ssr.md"]


def test_names_of_methods_become_links_and_those_of_settings_do_not(made: Any) -> None:
    page = made.pages()["methods/selection.md"]
    assert "[`RoutingEntropy`](routing_loss.md#routing_entropy)" in page
    assert "`most` bounds it" in page


def test_sections_in_the_reference_are_no_boxes(made: Any) -> None:
    box = '<details class="{}" open>\n  <summary>{}</summary>\n  <p>a\nb</p>\n</details>'
    html = made.on_page_content(box.format("formula", "Formula") + box.format("note", "Note") + box.format("n", "Not"))
    assert html == f"<pre><code>a\nb</code></pre>{box.format('note', 'Note')}<p><strong>Not:</strong> a\nb</p>"
