"""The page of a smaller model: complete, safe, and true to its numbers."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from collegium.compress.judge_result import Continuation, DomainScore, Judgement, LayerScore
from collegium.compress.plan import Asked, LayerPlan, Operator, Plan
from collegium.errors import StorageError
from collegium.measure.estimate import Estimate
from collegium.models.summary import Summary
from collegium.report.shrink import Shrunk, write_shrink_figures, write_shrink_page
from collegium.report.shrink_words import findings

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def estimate(value: float) -> Estimate:
    return Estimate(value, value - 0.01, value + 0.01)


def plan(**changes: Any) -> Plan:
    layers = tuple(
        LayerPlan(
            layer=i, op="prune", num_experts=6, keep=keep, protected=(0,), scores=(0.3, 0.2, 0.2, 0.1, 0.1, 0.1),
            expert_nbytes=200, expert_parameters=100,
        )
        for i, keep in enumerate([(0, 1, 2), (0, 2, 5)])
    )  # fmt: skip
    fields: dict[str, Any] = {
        "model": "made up", "fingerprint": "abc", "family": "none", "method": "reap", "planner": "uniform",
        "asked": Asked(what="keep", value=0.5), "top_k": 2, "nbytes": 4000, "parameters": 2000, "layers": layers,
        "data": ("numbers",), "domains": ("code", "prose"), "notes": ("expert 3 saw no token",),
        "created": "2026-01-01T00:00:00+00:00", "collegium": "0",
    }  # fmt: skip
    return Plan(**(fields | changes))


def summary(parameters: int) -> Summary:
    return Summary(
        family="none", architecture=None, source="headers", num_layers=2, moe_layers=(), shared_experts=0, score=None,
        expert_width=4, parameters=parameters, active_parameters=parameters // 2, extra_parameters=0,
        nbytes=2 * parameters, parts={}, dtypes={}, quantization=None, missing=(),
    )  # fmt: skip


def score(domain: str, loss: float, *, whole: float | None = 2.0) -> DomainScore:
    if whole is None:
        return DomainScore(domain, 8, 100, 300, estimate(loss))
    return DomainScore(
        domain, 8, 100, 300, estimate(loss), whole, estimate(loss - whole), estimate(0.2), estimate(0.75)
    )


def judgement(shift: float = 0.0, *, whole: float | None = 2.0, text: str = "said", **changes: Any) -> Judgement:
    layers = tuple(
        LayerScore(i, 3, 6, estimate(0.6), estimate(0.9 - 0.3 * i), estimate(0.25 + 0.25 * i)) for i in range(2)
    )
    alone = whole is None
    fields: dict[str, Any] = {
        "model": "small", "whole": None if alone else "made up", "masked": False, "data": "numbers, split test",
        "overall": score("all", 2.25 + shift, whole=whole),
        "domains": (score("code", 2.1 + shift, whole=whole), score("prose", 2.4 + shift, whole=whole)),
        "layers": () if alone else layers,
        "continuations": (Continuation("code", "def f(", text, None if alone else "other words"),),
        "proxies": {"top1/mean": 0.5}, "whole_proxies": {} if alone else {"top1/mean": 0.625},
    }  # fmt: skip
    return Judgement(**(fields | changes))


def shrunk(**changes: Any) -> Shrunk:
    whole = Shrunk(plan(), summary(2000), summary(1400), judgement(), judgement(), supers={1: (2,)})
    return replace(whole, **changes)


class Page(HTMLParser):
    """Tags, and words outside of scripts and styles."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self.inside, self.scripts = "", "", 0
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        self.scripts += tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.words += data


def page_of(tmp_path: Path, **changes: Any) -> Page:
    write_shrink_page(shrunk(**changes), tmp_path / "page.html")
    return Page(tmp_path / "page.html")


def test_everything_is_inside_and_named(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert tag not in ("link", "iframe", "img")
        assert (attributes.get("href") or "#").startswith("#")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"} <= set(ids)
    names = [attributes.get("data-figure") for tag, attributes in page.tags if tag == "figure"]
    assert names == ["loss", "increase", "shares", "output-error", "experts"]
    for _, attributes in page.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name) is None or attributes[name] in ids


def test_numbers_are_those_that_were_given(tmp_path: Path) -> None:
    words = page_of(tmp_path).words
    for number in ("+0.250 nats per token", "2.0000 to 2.2500", "6 of 12 experts", "70.0%", "Expert 3 saw no token.",
                   "def f(", "other words", "0.6250", "+0.100", "75.0%", "60%", "1,400"):  # fmt: skip
        assert number in words, number
    assert not re.search(r"\b(nan|inf|None)\b", words)


def test_the_verdict_is_as_good_as_the_numbers() -> None:
    def grades(**changes: Any) -> dict[str, tuple[str, str]]:
        return {one.question: (one.answer, one.grade) for one in findings(shrunk(**changes))}

    same = grades()
    assert same["Is it what was predicted?"] == ("yes", "good")
    assert same["What does it cost?"] == ("+0.250 nats per token", "mixed")
    assert same["Which domain suffers most?"][0] == "prose"
    assert same["Where does it differ most?"][0] == "layer 1"
    assert same["Are the super experts kept?"] == ("yes", "good")
    assert same["Do routers choose as before?"] == ("75%", "mixed")
    assert grades(measured=judgement(0.01))["Is it what was predicted?"] == ("no", "poor")
    assert grades(measured=judgement(0.2))["What does it cost?"][1] == "poor"
    assert grades(measured=judgement(-0.24))["What does it cost?"][1] == "good"
    assert grades(supers={0: (5,)})["Are the super experts kept?"] == ("1 are not", "poor")
    assert "Are the super experts kept?" not in grades(supers={})


def test_the_largest_gap_of_a_domain_counts() -> None:
    odd = judgement(domains=(score("code", 2.1 + 0.5), score("prose", 2.4 - 0.5)))
    found = {one.question: one for one in findings(shrunk(measured=odd))}["Is it what was predicted?"]
    assert found.answer == "no"
    assert "5.0e-01" in found.text


@pytest.mark.parametrize(
    "changes",
    [
        {"predicted": None},
        {"measured": None},
        {"measured": judgement(whole=None), "predicted": None},
        {"measured": judgement(whole=None)},
        {"predicted": None, "measured": None, "notes": ("the loss was not predicted: too large",)},
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, changes: dict[str, Any]) -> None:
    page = page_of(tmp_path, **changes)
    assert not re.search(r"\b(nan|inf|None)\b", page.words)
    for note in changes.get("notes", ()):
        assert f"{note[0].upper()}{note[1:]}." in page.words
    if changes.get("predicted", 0) is None:
        assert "There is no prediction of the loss" in page.words


def test_what_training_regained_is_shown(tmp_path: Path) -> None:
    page = page_of(tmp_path, recovered=judgement(-0.15))
    assert "60% of what had been lost" in page.words
    assert "+0.100 nats per token" in page.words, "the result is what costs"
    assert page.words.count("recovered") >= 4
    assert "2.1000" in page.words
    found = {one.question: one for one in findings(shrunk(recovered=judgement(-0.15)))}
    assert found["Is it what was predicted?"].answer == "yes", "the prediction is of the model before"


def test_merged_experts_are_named(tmp_path: Path) -> None:
    record = plan().model_dump()
    groups = ((0,), (1, 3, 4), (2, 5))
    merged = LayerPlan(
        **{**record["layers"][0], "op": "merge", "groups": groups, "weights": ((1.0,), (0.5, 0.25, 0.25), (0.5, 0.5))}
    )
    mixed = plan(layers=(merged, plan().layers[1]), operator=Operator(name="average"))
    page = page_of(tmp_path, plan=mixed, predicted=None)
    assert "new experts by" in page.words
    assert "(or were merged into another)" in page.words
    assert "which no mask can do" in page.words


def test_names_and_texts_cannot_become_markup(tmp_path: Path) -> None:
    page = page_of(tmp_path, plan=plan(model=EVIL, notes=(EVIL,)), measured=judgement(text=EVIL), notes=(EVIL,))
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert page.scripts == 4
    assert page.words.count(EVIL) >= 4


def test_pictures_without_a_browser(tmp_path: Path) -> None:
    files = write_shrink_figures(shrunk(), tmp_path)
    assert len(files) == 10
    assert all(file.stat().st_size > 1000 for file in files)


def test_a_target_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError):
        write_shrink_page(shrunk(), tmp_path / "file" / "page.html")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
def test_a_browser_draws_it_without_complaints(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    write_shrink_page(shrunk(), tmp_path / "page.html")
    complaints: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 800}, color_scheme="dark")
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_selector("html[data-ready=true]", timeout=20_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.locator("[data-figure][data-ready=true] canvas").count() == 5
        plot = page.locator("[data-figure=experts] .plot")
        plot.focus()
        plot.press("End")
        readout = page.locator("[data-figure=experts] .readout").inner_text()
        assert re.search(r"expert: 5; .*fate: gone", readout)
        browser.close()
    assert complaints == []
