"""The page as a file: complete, safe, and small."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hand_made import WordTokenizer, random_trace

from collegium.errors import StorageError, TraceError
from collegium.report import measure, write_figures, write_report
from collegium.trace import LayerRows, Trace, TraceWriter
from measure_traces import make_trace

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """Tags, visible words, and script elements of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.words += data


def renamed(trace: Trace, name: str) -> Trace:
    trace.meta = trace.meta.model_copy(update={"model": name})
    return trace


def test_nothing_is_fetched_and_everything_is_named(tmp_path: Path) -> None:
    write_report(random_trace(tmp_path / "t"), tmp_path / "page.html", tokenizer=WordTokenizer())
    page = Page(tmp_path / "page.html")
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert tag not in ("link", "iframe", "img")
        if "href" in attributes:
            assert (attributes["href"] or "").startswith("#")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert {anchor[1:] for anchor in anchors if anchor} <= set(ids)
    for _, attributes in page.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name) is None or attributes[name] in ids
    plots = [attributes for _, attributes in page.tags if "plot" in (attributes.get("class") or "").split()]
    assert len(plots) > 12
    assert all(plot["aria-label"] and plot["aria-describedby"] for plot in plots)


def test_names_and_tokens_cannot_become_markup(tmp_path: Path) -> None:
    trace = random_trace(tmp_path / "t", length=180, domain_names=(EVIL, "b & <i>", "c'\"{{ 1 }}"))
    write_report(renamed(trace, EVIL), tmp_path / "page.html", tokenizer=WordTokenizer(odd=EVIL))
    page = Page(tmp_path / "page.html")
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert len(page.scripts) == 5
    assert not [script for script in page.scripts if script.startswith("alert")]
    assert EVIL in page.words
    assert "{{ 1 }}" in page.words, "a name is no template"
    assert EVIL in json.loads(page.scripts[0])["viewer"]["texts"]


def test_what_is_missing_says_what_to_record(tmp_path: Path) -> None:
    trace = make_trace(
        tmp_path / "t", {0: np.arange(40).reshape(20, 2) % 8, 4: np.arange(20).reshape(20, 1) % 3}, {0: 8, 4: 3}
    )
    measured = write_report(trace, tmp_path / "page.html")
    words = Page(tmp_path / "page.html").words
    for name in ("confidence", "domains", "redundancy"):
        assert measured.missing[name] in words
    assert "--logits" in words
    assert "--model" in words


def test_one_token(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", {0: [[1, 0]]}, 4, logits={0: [[1.0, 2.0, 0.0, 0.0]]})
    write_report(trace, tmp_path / "page.html")
    assert not re.search(r"\b(nan|inf)\b", Page(tmp_path / "page.html").words.lower())


def test_a_domain_without_tokens_and_layers_of_different_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    experts = {1: rng.integers(0, 4, (90, 1)), 2: np.argsort(rng.random((90, 6)), axis=1)[:, :3]}
    trace = make_trace(
        tmp_path / "t",
        experts,
        {1: 4, 2: 6},
        sequences=(np.arange(90) // 9).tolist(),
        domains=(np.arange(90) // 9 % 2 * 2).tolist(),
        domain_names=("first", "empty", "last"),
        logits={1: rng.normal(size=(90, 4)), 2: rng.normal(size=(90, 6))},
    )
    write_report(trace, tmp_path / "page.html")
    words = Page(tmp_path / "page.html").words
    assert "layer 1: 4 experts, 1 per token; layer 2: 6 experts, 3 per token" in words
    assert not re.search(r"\b(nan|inf)\b", words.lower())


def test_a_trace_that_is_cut_off_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", {0: np.arange(80).reshape(80, 1) % 4}, 4, complete=False, part_rows=32)
    write_report(trace, tmp_path / "page.html")
    assert "(not complete)" in Page(tmp_path / "page.html").words


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", {0: np.zeros((0, 1), int)}, 4)
    with pytest.raises(TraceError, match="no tokens"):
        write_report(trace, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_damaged_trace_is_refused(tmp_path: Path) -> None:
    trace = random_trace(tmp_path / "t", length=300)
    content = bytearray(trace.files[1].read_bytes())
    content[len(content) // 2] ^= 255
    trace.files[1].write_bytes(content)
    for write in (write_report, write_figures):
        with pytest.raises(TraceError, match="damaged"):
            write(Trace.open(tmp_path / "t"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_target_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    trace = make_trace(tmp_path / "t", {0: [[0], [1]]}, 2)
    with pytest.raises(StorageError):
        write_report(trace, tmp_path / "file" / "page.html")


def test_the_other_trace_is_shown_beside(tmp_path: Path) -> None:
    trace = random_trace(tmp_path / "a", length=300)
    other = random_trace(tmp_path / "b", length=300, seed=1)
    measured = write_report(trace, tmp_path / "page.html", compare=other)
    page = Page(tmp_path / "page.html")
    assert {"fluctuation", "early-routing"} <= set(measured.results)
    names = {attributes.get("data-figure") for tag, attributes in page.tags if tag == "figure"}
    assert {"load-difference", "load-other", "fluctuation", "early-routing"} <= names
    assert "load: MaxVio" in page.words


def test_numbers_as_json(tmp_path: Path) -> None:
    measured = measure(random_trace(tmp_path / "t", length=300))
    record = json.loads(json.dumps(measured.record()))
    assert record["metrics"]["load"][0]["layer"] == 0
    assert record["metrics"]["load"][0]["MaxVio"].keys() == {"value", "low", "high"}
    assert set(record["missing"]) == set(measured.missing)


@pytest.mark.slow
def test_a_large_trace_stays_small(tmp_path: Path) -> None:
    """48 layers x 128 experts x 8 slots, 100,000 tokens: under 8 MB."""
    N, L, E, K = 100_000, 48, 128, 8
    rng = np.random.default_rng(0)
    small = make_trace(tmp_path / "small", dict.fromkeys(range(L), np.arange(K)[None]), E, domain_names=tuple("abcdef"))
    document = np.arange(N) // 512
    token = (rng.zipf(1.2, N) % 50_000).astype(np.int64)
    columns = {
        "token": token,
        "sequence": document,
        "document": document,
        "position": np.arange(N) % 512,
        "domain": document % 6,
    }
    taste = rng.gumbel(size=(256, E)).astype(np.float32)
    with TraceWriter(tmp_path / "large", small.meta.model_copy(update={"complete": False})) as writer:
        for first in range(0, N, 10_000):
            rows = slice(first, first + 10_000)
            layers = []
            for layer in range(L):
                score = taste[(token[rows] + 37 * layer) % 256] + rng.gumbel(size=(10_000, E)).astype(np.float32)
                chosen = np.argpartition(-score, K, axis=1)[:, :K]
                layers.append(LayerRows(chosen.ravel(), rng.dirichlet(np.ones(K), 10_000).ravel().astype(np.float16)))
            writer.add({name: values[rows] for name, values in columns.items()}, layers, phase="prefill", step=first)
    write_report(Trace.open(tmp_path / "large"), tmp_path / "page.html", tokenizer=WordTokenizer())
    assert (tmp_path / "page.html").stat().st_size < 8_000_000
