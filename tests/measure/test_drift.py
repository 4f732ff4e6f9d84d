"""Load over time: steady, switching, short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from collegium.errors import ConfigError
from collegium.measure import drift
from measure_traces import make_trace


def test_a_switch_of_experts_halfway(tmp_path: Path) -> None:
    (found,) = drift(make_trace(tmp_path, {4: np.repeat([0, 1], 50)[:, None]}, 3), windows=4)
    assert found.layer == 4
    assert found.share.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert found.shift == pytest.approx([0.5, 0.5, 0.5, 0.5])


def test_windows_follow_the_order_of_recording_not_of_reading(tmp_path: Path) -> None:
    """Two sequences generated side by side: expert 0 while the first step runs, expert 1 in the second."""
    trace = make_trace(tmp_path, {0: [[0], [0], [1], [1]]}, 2, sequences=[0, 1, 0, 1])
    (found,) = drift(trace, windows=2)
    assert found.share.tolist() == [[1, 0], [0, 1]]


def test_drift_stands_out_from_documents_in_random_order(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    documents = np.arange(3200) // 16
    early = random.integers(0, 4, 3200)
    (moving,) = drift(
        make_trace(tmp_path / "a", {0: (early + 4 * (documents >= 100))[:, None]}, 8, sequences=documents)
    )
    (steady,) = drift(make_trace(tmp_path / "b", {0: early[:, None]}, 8, sequences=documents))
    assert moving.shift.mean() > 2 * moving.control
    assert steady.shift.mean() < 1.5 * steady.control
    assert moving.summary()["mean shift"] == moving.shift.mean()


def test_fewer_tokens_than_windows_and_unused_slots(tmp_path: Path) -> None:
    (one,) = drift(make_trace(tmp_path / "one", {0: [[1]]}, 2))
    assert (one.share.tolist(), one.shift.tolist(), one.control) == ([[0, 1]], [0], 0)
    ragged, empty = drift(make_trace(tmp_path / "ragged", {0: [[0, 2], [2, 2]], 1: [[2], [2]]}, 2))
    assert ragged.share.tolist() == [[1, 0], [0, 0]]
    assert ragged.shift.tolist() == [0, 0]
    assert not empty.share.any()


def test_no_windows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 windows"):
        drift(make_trace(tmp_path, {0: [[1]]}, 2), windows=0)
