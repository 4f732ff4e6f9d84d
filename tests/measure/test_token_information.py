"""What experts look at: routing made from the token, from the position, and from the context."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from collegium.measure.information import mutual_information
from collegium.measure.token_information import token_information
from measure_traces import make_trace

DOCUMENTS, LENGTH = 60, 20
N = DOCUMENTS * LENGTH
SEQUENCES = np.arange(N) // LENGTH
DOMAINS = SEQUENCES % 2


def test_routing_by_token(tmp_path: Path) -> None:
    token = np.random.default_rng(0).integers(0, 2, N)
    experts = np.stack([2 * token, 2 * token + 1], 1)
    trace = make_trace(tmp_path / "t", {0: experts}, 4, tokens=token + 7, sequences=SEQUENCES)
    (found,) = token_information(trace)
    assert found.token.value == pytest.approx(1, abs=0.01)
    assert found.token.low > 0.9
    assert found.token_control < 0.01
    assert found.concentration == 1  # of an id's tokens, all use its favourite
    assert found.coverage == 1
    assert found.position < 0.05
    assert found.position == pytest.approx(found.position_control, abs=0.02)
    assert found.domain_given_token is None
    assert found.domain_given_token_control is None


def test_routing_by_position(tmp_path: Path) -> None:
    token = np.random.default_rng(0).integers(0, 3, N)
    expert = (np.arange(N) % LENGTH) % 2
    (found,) = token_information(make_trace(tmp_path / "t", {0: expert[:, None]}, 2, tokens=token, sequences=SEQUENCES))
    assert found.position == pytest.approx(1)
    assert found.position_control < 0.05
    assert found.token.value < 0.02


def test_routing_by_context(tmp_path: Path) -> None:
    """Expert = token xor domain: neither alone tells anything, both together everything."""
    token = np.random.default_rng(0).integers(0, 2, N)
    trace = make_trace(
        tmp_path / "t", {0: (token ^ DOMAINS)[:, None]}, 2, tokens=token, sequences=SEQUENCES, domains=DOMAINS,
        domain_names=("a", "b"),
    )  # fmt: skip
    (found,) = token_information(trace)
    assert found.token.value < 0.02
    assert found.domain_given_token == pytest.approx(1, abs=0.01)
    assert found.domain_given_token_control is not None
    assert found.domain_given_token_control < 0.3


def test_a_token_that_decides_leaves_nothing_to_the_domain(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    token = np.where(rng.random(N) < 0.8, DOMAINS, 1 - DOMAINS)  # domains use other words
    trace = make_trace(
        tmp_path / "t", {0: token[:, None]}, 2, tokens=token, sequences=SEQUENCES, domains=DOMAINS,
        domain_names=("a", "b", "empty"),
    )  # fmt: skip
    (found,) = token_information(trace)
    assert found.token.value == pytest.approx(1, abs=0.01)
    assert found.domain_given_token == 0


def test_rare_ids_are_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    token = np.concatenate([rng.integers(0, 4, 400), np.arange(100, 200)])
    experts = np.stack([rng.permutation(6)[:2] for _ in token])
    experts[rng.random(500) < 0.3, 1] = 6  # ragged
    (found,) = token_information(make_trace(tmp_path / "t", {0: experts}, 6, tokens=token))
    assert found.coverage == pytest.approx(0.8)
    table = np.zeros((4, 7))
    for t, row in zip(token[:400], experts[:400], strict=True):
        table[t, row] += 1
    assert found.token.value == pytest.approx(mutual_information(table[:, :6]))
    per_token = table[:, :6].max(1) / np.bincount(token[:400])
    assert found.concentration == pytest.approx(per_token.mean())


def test_chance_is_as_large_as_its_control(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    token, expert = rng.integers(0, 10, 600), rng.integers(0, 16, (600, 1))
    (found,) = token_information(make_trace(tmp_path / "t", {0: expert}, 16, tokens=token), min_hits=20)
    assert found.token.value > 0.1  # 9 x 15 degrees of freedom on 600 samples
    assert found.token.value == pytest.approx(found.token_control, rel=0.4)


def test_one_token(tmp_path: Path) -> None:
    first, second = token_information(make_trace(tmp_path / "t", {0: [[1]], 1: [[0, 2]]}, {0: 2, 1: 3}))
    for found in (first, second):
        assert (found.token.value, found.token_control, found.position, found.coverage) == (0, 0, 0, 0)
    (found, _) = token_information(make_trace(tmp_path / "u", {0: [[1]], 1: [[3]]}, {0: 2, 1: 3}), min_hits=1)
    assert (found.token.value, found.coverage, found.concentration) == (0, 1, 1)
