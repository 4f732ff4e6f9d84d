"""Figures are drawn from what they are given, and written whole."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from collegium.errors import StorageError
from collegium.measure import DomainInformation, Load
from collegium.report import domain_figure, load_figure


def make_load(layer: int, counts: list[int]) -> Load:
    share = np.array(counts) / sum(counts)
    return Load(layer, np.array(counts), share, float(share.max() * len(counts) - 1), 0.0, ())


def make_information(layer: int, rows: int = 3, experts: int = 8) -> DomainInformation:
    share = np.random.default_rng(layer).random((rows, experts))
    names = tuple(f"domain {i}" for i in range(rows))
    return DomainInformation(layer, 0.5, 0.1, 0.12, share / share.sum(1, keepdims=True), names)


def pixels(path: Path) -> np.ndarray:
    return matplotlib.image.imread(path)


def test_load_figure_takes_layers_of_different_sizes(tmp_path: Path) -> None:
    load_figure([make_load(0, [1, 2, 3, 4]), make_load(5, [4, 4])], tmp_path / "a.png")
    load_figure([make_load(0, [4, 3, 2, 1]), make_load(5, [4, 4])], tmp_path / "b.png")
    a, b = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert min(a.shape[:2]) > 200
    assert a.shape == b.shape
    assert not np.array_equal(a, b), "other numbers must give another picture"


@pytest.mark.parametrize("layers", [1, 2, 3, 48])
def test_domain_figure_takes_any_number_of_layers(tmp_path: Path, layers: int) -> None:
    domain_figure([make_information(layer) for layer in range(layers)], tmp_path / "d.png")
    image = pixels(tmp_path / "d.png")
    assert image[..., :3].std() > 0.05
    assert min(image.shape[:2]) > 200


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match=r"a\.png"):
        load_figure([make_load(0, [1, 2])], tmp_path / "file" / "a.png")
