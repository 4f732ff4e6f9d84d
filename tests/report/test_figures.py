"""Figures say what the numbers say, and are drawn from the same spec as on the page."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import vl_convert
from hand_made import estimate, make_curve, make_information, make_load, make_locality, random_trace

from collegium.errors import StorageError
from collegium.measure.cache import CacheCurve
from collegium.measure.confidence import QUANTILES, Confidence
from collegium.measure.drops import Drops
from collegium.report import measure, write_figures
from collegium.report.draw import save_figures
from collegium.report.figure import Figure
from collegium.report.figures import load, locality, router, specialisation
from collegium.report.figures._columns import spread
from collegium.report.sections import sections


def size_of(png: Path) -> tuple[int, int]:
    content = png.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_load_map_takes_layers_of_different_sizes() -> None:
    figure = load.load_map([make_load(0, [1, 2, 3, 4]), make_load(5, [4, 4])])
    rows = figure.rows()
    assert len(rows) == 6
    cell = next(row for row in rows if row["layer"] == 0 and row["expert"] == 3)
    assert cell["relative"] == pytest.approx(1.6)
    assert cell["rank"] == 0
    assert "expert is number 3 of layer 0, with 1.60 times" in figure.alt


def test_load_map_shows_one_group_at_a_time() -> None:
    groups = [make_load(0, [4, 0], "code"), make_load(0, [0, 4], "prose")]
    figure = load.load_map([make_load(0, [4, 4])], groups)
    assert [choice.name for choice in figure.choices] == ["group", "place"]
    assert figure.choices[0].options() == [(0, "of all domains"), (1, "code"), (2, "prose")]
    assert len(figure.rows()) == 2, "only what is chosen is drawn"
    assert len(figure.columns["group"]) == 6, "all of it is there"


def test_dead_experts_are_counted_in_words() -> None:
    assert "2 experts never used" in load.load_map([make_load(0, [4, 0, 0, 4])]).alt
    assert "Every expert was used" in load.load_map([make_load(0, [4, 4])]).alt


def test_domain_map_starts_with_the_layer_that_tells_domains_apart_best() -> None:
    figure = specialisation.domain_map([make_information(3, 0.1), make_information(5, 0.6), make_information(9, 0.3)])
    assert figure.choices[0].values[0] == 5
    assert {row["layer"] for row in figure.rows()} == {5}


def test_a_domain_without_tokens_is_left_out() -> None:
    found = make_information(0)
    found.share[1] = 0
    names = {row["domain"] for row in specialisation.domain_map([found]).rows()}
    assert names == {"code", "sums"}


def test_lift_is_relative_to_the_mean_over_domains() -> None:
    found = make_information(0, experts=2)
    found.share[:] = [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    assert {row["lift"] for row in specialisation.domain_map([found]).rows()} == {0.0}


def test_cache_curve_of_all_layers_weighs_layers_by_requests() -> None:
    grid, rates = locality.mean_curve([make_curve(0, [0.2, 0.6, 1.0]), make_curve(1, [0.4, 0.8, 1.0])])
    assert grid == pytest.approx([0.25, 0.625, 1.0])
    assert rates["lru"] == pytest.approx([0.3, 0.7, 1.0])


def test_cache_knows_bytes_only_when_told() -> None:
    curves = [make_curve(0, [0.2, 0.6, 1.0])]
    assert "megabytes" not in locality.cache(curves).columns
    figure = locality.cache(curves, 2_000_000)
    assert max(figure.columns["megabytes"]) == pytest.approx(16.0)


def with_intervals(layer: int, lru: list[float], width: float) -> CacheCurve:
    curve = make_curve(layer, lru)
    ends = {name: np.stack([getattr(curve, name) - width, getattr(curve, name) + width], 1) for name in ("lru", "sch")}
    return replace(curve, lru_interval=ends["lru"], sch_interval=ends["sch"])


def test_cache_curves_have_bands() -> None:
    curves = [with_intervals(0, [0.2, 0.6, 0.9], 0.02), with_intervals(1, [0.4, 0.8, 0.9], 0.04)]
    figure = locality.cache(curves)
    rows = [row for row in figure.rows() if row["kind"].startswith("least")]
    assert [row["high"] - row["low"] for row in rows] == pytest.approx([0.06] * 3), "the mean of the layers"
    own = np.array(figure.columns["high"]) - np.array(figure.columns["low"])
    layers = np.array(figure.columns["layer"])
    assert np.nanmax(own[layers == 0]) == pytest.approx(0.04)
    assert all(row["low"] is None for row in figure.rows() if "shuffled" in row["kind"])
    assert figure.spec["layer"][0]["mark"]["type"] == "area"
    assert "The 95 % interval of least recently used is" in figure.alt
    drawn = vl_convert.vegalite_to_svg(figure.drawn())
    plain = vl_convert.vegalite_to_svg(locality.cache([make_curve(0, [0.2, 0.6, 0.9])]).drawn())
    assert drawn.count("mark-area") == 2, "one a policy, none for the control"
    assert "mark-area" not in plain
    assert "no intervals" in locality.cache([make_curve(0, [0.2, 0.6, 0.9])]).caption


def test_tokens_that_another_k_would_change() -> None:
    def confident(layer: int, changed: dict[int, float]) -> Confidence:
        even, by_k = estimate(0.5), {k: estimate(value) for k, value in changed.items()}
        return Confidence(layer, dict.fromkeys(QUANTILES, even), even, even, {0.5: even}, by_k, even)

    figure = router.changed([confident(0, {1: 0.6, 3: 0.2}), confident(2, {1: 0.8})])
    assert figure is not None
    assert figure.alt == "Tokens that would change, mean over layers: 70% with 1 expert, 20% with 3 experts."
    rows = {(row["kind"], row["layer"]): row for row in figure.rows()}
    assert rows["with 3 experts", 0]["changed"] == 0.2
    assert rows["with 1 expert", 2]["low"] == pytest.approx(0.79)
    assert router.changed([confident(0, {})]) is None


def test_empty_slots_have_intervals_to_read_out() -> None:
    found = Drops(
        0, np.array([0, 8]), np.array([0.0, 0.5]), ("text",), np.zeros((1, 2)), np.ones((1, 2)), estimate(0.25),
        np.array([[0, 0], [0.4, 0.6]]),
    )  # fmt: skip
    figure = load.drops([found])
    assert figure is not None
    assert [readout.column for readout in figure.readout][-2:] == ["low", "high"]
    assert figure.rows()[1]["high"] == 0.6
    alone = load.drops([replace(found, interval=None)])
    assert alone is not None
    assert "low" not in alone.columns


def test_whole_model_comes_first_in_locality() -> None:
    figure = locality.consistency([make_locality(0), make_locality(1), make_locality(None, 0.6)])
    assert figure.choices[0].options()[0] == (locality.WHOLE, "whole model")
    assert figure.alt.startswith("The whole model: SRP 0.60 over 4 tokens")


def test_spread_keeps_both_ends() -> None:
    assert spread(list(range(10)), [10] * 10, 30) == [0, 4, 9]
    assert spread(list(range(10)), [10] * 10, 1000) == list(range(10))
    assert spread([1, 2], [10, 10], 1) == [1]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> list[Figure]:
    """Every figure that a trace with logits and domains has."""
    trace = random_trace(tmp_path_factory.mktemp("trace") / "t")
    return [figure for section in sections(measure(trace)) for figure in section.figures]


def test_every_figure_is_complete(figures: list[Figure]) -> None:
    assert len(figures) > 12
    assert {"confidence", "needed", "changed-by-k", "margin"} <= {figure.name for figure in figures}
    assert len({figure.name for figure in figures}) == len(figures)
    for figure in figures:
        assert len({len(values) for values in figure.columns.values()}) == 1, figure.name
        assert figure.alt.endswith("."), figure.name
        assert any(letter.isdigit() for letter in figure.alt), f"{figure.name}: a text alternative has numbers"
        assert "nan" not in figure.alt.lower().split(), figure.alt
        for readout in figure.readout:
            assert readout.column in figure.rows()[0], figure.name
        for choice in figure.choices:
            if not choice.copies:
                assert set(choice.values) <= set(np.asarray(figure.columns[choice.name]).tolist()), figure.name


def test_every_spec_compiles_and_draws(figures: list[Figure]) -> None:
    for figure in figures:
        svg = vl_convert.vegalite_to_svg(figure.drawn())
        assert svg.startswith("<svg"), figure.name
        assert svg.count("<path") > 3, figure.name


def test_files_are_drawn_without_a_browser(tmp_path: Path) -> None:
    trace = random_trace(tmp_path / "trace", layers=1, length=120)
    files = write_figures(trace, tmp_path / "out")
    assert {file.suffix for file in files} == {".png", ".svg"}
    assert min(min(size_of(file)) for file in files if file.suffix == ".png") > 100


def test_other_numbers_give_another_picture(tmp_path: Path) -> None:
    for name, counts in (("a", [1, 2, 3, 4]), ("b", [4, 3, 2, 1])):
        save_figures([load.load_map([make_load(0, counts)])], tmp_path / name)
    a, b = (tmp_path / name / "load.png" for name in "ab")
    assert size_of(a) == size_of(b)
    assert a.read_bytes() != b.read_bytes()


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match=r"load\.png"):
        save_figures([load.load_map([make_load(0, [1, 2])])], tmp_path / "file")
