"""The page in a real browser, from file://, without a network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hand_made import WordTokenizer, random_trace

from browsing import NEEDS_CHROMIUM
from collegium.report import write_report
from measure_traces import make_trace

pytestmark = NEEDS_CHROMIUM

EVIL = "</script><script>document.title='taken'</script>"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    tokens = [7, *(number % 50 for number in range(599))]
    trace = random_trace(folder / "trace", domain_names=("code", "prose", EVIL), tokens=tokens)
    write_report(trace, folder / "page.html", tokenizer=WordTokenizer(odd=EVIL))
    return folder / "page.html"


class Visit:
    """An opened page and what it complained about."""

    def __init__(self, context: Any, file: Path) -> None:
        self.complaints: list[str] = []
        self.page = context.new_page()
        self.page.set_default_timeout(20_000)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.fetched(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-ready=true]")

    def fetched(self, url: str) -> None:
        if not url.startswith(("file:", "blob:", "data:")):
            self.complaints.append(f"fetched {url}")

    def figure(self, name: str) -> Any:
        return self.page.locator(f"[data-figure={name}]")

    def pixels(self, name: str) -> str:
        """The picture of a figure."""
        return str(self.figure(name).locator("canvas").first.evaluate("canvas => canvas.toDataURL()"))


@pytest.fixture
def visit(browser: Any, report: Path) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")
    found = Visit(context, report)
    yield found
    context.close()
    assert found.complaints == []


def test_every_figure_is_drawn(visit: Visit) -> None:
    figures = visit.page.locator("[data-figure]")
    assert figures.count() > 12
    assert visit.page.locator("[data-figure][data-ready=true] canvas").count() == figures.count()
    assert visit.page.title() == "Routing of test", "a token or a domain must not run as a script"


def test_hover_shows_a_cell(visit: Visit) -> None:
    canvas = visit.figure("load").locator("canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.6)
    tip = visit.page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert re.search(r"load / even share\s*\d\.\d\d", tip.inner_text())


def test_the_keyboard_reads_out_cells(visit: Visit) -> None:
    plot, readout = visit.figure("load").locator(".plot"), visit.figure("load").locator(".readout")
    plot.focus()
    assert re.search(r"expert: 0;.* layer: 0;|layer: 0;.*expert: 0;", readout.inner_text())
    before = visit.pixels("load")
    plot.press("ArrowRight")
    plot.press("ArrowDown")
    assert re.search(r"layer: 1; .*expert: 1;", readout.inner_text())
    visit.page.wait_for_timeout(100)
    assert visit.pixels("load") != before, "the cell is marked"
    plot.press("End")
    assert "expert: 7;" in readout.inner_text()


@pytest.mark.parametrize(
    ("name", "choice", "option"),
    [("load", 0, "prose"), ("load", 1, "by load, busiest first"), ("domains", 0, "layer 0")],
)
def test_choices_change_the_picture(visit: Visit, name: str, choice: int, option: str) -> None:
    before = visit.pixels(name)
    select = visit.figure(name).locator("select").nth(choice)
    if name == "domains" and select.evaluate("s => s.selectedOptions[0].text") == option:
        option = "layer 1"
    select.select_option(label=option)
    visit.page.wait_for_selector(f"[data-figure={name}][data-drawn='1']")
    assert visit.pixels(name) != before


def test_order_by_load_puts_the_busiest_first(visit: Visit) -> None:
    figure = visit.figure("load")
    figure.locator("select").nth(1).select_option(label="by load, busiest first")
    visit.page.wait_for_selector("[data-figure=load][data-drawn='1']")
    plot, loads = figure.locator(".plot"), []
    plot.focus()
    for _ in range(8):
        loads.append(float(re.search(r"even share: (\d+\.\d+)", figure.locator(".readout").inner_text())[1]))
        plot.press("ArrowRight")
    assert loads == sorted(loads, reverse=True)


@pytest.mark.parametrize("kind", ["svg", "png", "csv"])
def test_downloads(visit: Visit, kind: str, tmp_path: Path) -> None:
    with visit.page.expect_download() as download:
        visit.figure("load").locator(f"[data-save={kind}]").click()
    download.value.save_as(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    assert download.value.suggested_filename == f"load.{kind}"
    if kind == "svg":
        assert content.startswith(b"<svg")
        assert content.count(b"<path") > 3 * 8
    elif kind == "png":
        assert content.startswith(b"\x89PNG")
    else:
        lines = content.decode().splitlines()
        assert lines[0] == "group,layer,expert,rank,relative,share,count"
        assert len(lines) == 1 + 4 * 3 * 8, "all tokens and three domains, whatever is chosen"
        share = sum(float(line.split(",")[5]) for line in lines[1:9])
        assert share == pytest.approx(1, abs=1e-3)


def test_token_viewer(visit: Visit) -> None:
    page = visit.page
    tokens = page.locator("#viewer-text span")
    assert tokens.count() == 60
    assert any(word == EVIL for word in tokens.all_inner_texts())
    tokens.nth(3).hover()
    rows = page.locator("#viewer-token tbody tr")
    assert rows.count() == 3, "all layers"
    assert rows.first.locator("button").count() == 2, "all slots"
    kept = page.locator("#viewer-token").inner_text()
    tokens.nth(3).click()
    tokens.nth(9).hover()
    assert page.locator("#viewer-token").inner_text() == kept, "a clicked token stays"
    rows.first.locator("button").first.click()
    panel = page.locator("#viewer-expert")
    assert re.match(r"Layer 0, expert \d is known for", panel.inner_text())
    assert panel.locator("tbody tr").count() > 3
    assert panel.locator(".context mark").count() == 8
    assert 0 < page.locator("#viewer-text span.dim").count() < 60


def test_token_viewer_by_keyboard_and_by_layer(visit: Visit) -> None:
    page, text = visit.page, visit.page.locator("#viewer-text")
    text.focus()
    for _ in range(3):
        text.press("ArrowRight")
    active = text.get_attribute("aria-activedescendant")
    assert page.locator(f"#{active}").get_attribute("aria-selected") == "true"
    assert "at position 2" in page.locator("#viewer-token").inner_text()
    colours = "spans => spans.map(span => span.style.background)"
    before = page.locator("#viewer-text span").evaluate_all(colours)
    page.locator("#viewer-layer").select_option(label="layer 2")
    assert page.locator("#viewer-text span").evaluate_all(colours) != before
    page.locator("#viewer-document").select_option(index=4)
    assert page.locator("#viewer-text span.here").count() == 0
    text.press("Escape")


def test_dark_follows_the_system_and_the_button(browser: Any, report: Path) -> None:
    context = browser.new_context(color_scheme="dark")
    visit = Visit(context, report)
    background = "getComputedStyle(document.body).backgroundColor"
    dark, picture = visit.page.evaluate(background), visit.pixels("load")
    visit.page.locator("#theme").click()
    visit.page.wait_for_timeout(500)
    assert visit.page.evaluate(background) != dark
    assert visit.page.locator("#theme").get_attribute("aria-pressed") == "false"
    assert visit.pixels("load") != picture
    context.close()
    assert visit.complaints == []


@pytest.mark.parametrize("width", [360, 800])
def test_nothing_is_wider_than_the_screen(browser: Any, report: Path, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800})
    visit = Visit(context, report)
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def test_every_control_has_a_name(visit: Visit) -> None:
    unnamed = visit.page.locator("button, select").evaluate_all(
        "all => all.filter(e => !(e.innerText || e.ariaLabel || e.labels?.length)).map(e => e.outerHTML)"
    )
    assert unnamed == []


def test_a_trace_of_one_token_is_drawn_without_complaints(browser: Any, tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "trace", {0: [[1, 0]]}, 4, logits={0: [[1.0, 2.0, 0.0, 0.0]]})
    write_report(trace, tmp_path / "page.html")
    context = browser.new_context()
    visit = Visit(context, tmp_path / "page.html")
    assert visit.page.locator("#viewer-text span").all_inner_texts() == ["0"]
    context.close()
    assert visit.complaints == []


def test_print_is_light_and_of_the_width_of_paper(browser: Any, report: Path) -> None:
    context = browser.new_context(viewport={"width": 1500, "height": 900}, color_scheme="dark")
    visit = Visit(context, report)
    visit.page.evaluate(
        """() => matchMedia("print").addEventListener("change", () => {
            window.printed ??= [...document.querySelectorAll(".plot")].map((plot) => {
                const canvas = plot.querySelector("canvas");
                return [canvas.offsetWidth, canvas.getContext("2d").getImageData(1, 1, 1, 1).data[0]];
            });
        })"""
    )
    assert visit.page.pdf().startswith(b"%PDF")
    printed = visit.page.evaluate("window.printed")
    assert len(printed) == visit.page.locator("[data-figure]").count()
    assert {width for width, _ in printed} == {660}
    assert all(red == 255 for _, red in printed), "a dark plot on white paper"
    red = "canvas.getContext('2d').getImageData(1, 1, 1, 1).data[0]"
    visit.page.wait_for_function(f"[...document.querySelectorAll('.plot canvas')].every((canvas) => {red} < 99)")
    assert visit.complaints == []
    context.close()
