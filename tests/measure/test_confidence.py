"""Probabilities of routers, from logits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from collegium.errors import TraceError
from collegium.measure.confidence import QUANTILES, Confidence, _quantiles, router_confidence
from collegium.measure.estimate import Estimate
from measure_traces import make_trace

P = np.array([[0.6, 0.25, 0.1, 0.05]])


def values(estimates: Mapping[float, Estimate]) -> dict[float, float]:
    return {key: one.value for key, one in estimates.items()}


def test_softmax_by_hand(tmp_path: Path) -> None:
    (found,) = router_confidence(make_trace(tmp_path / "t", {3: [[0]]}, 4, logits={3: np.log(P) + 2}))
    assert found.layer == 3
    assert list(found.margin) == list(QUANTILES)
    assert values(found.margin) == pytest.approx(dict.fromkeys(QUANTILES, 0.35), abs=1e-3)
    assert found.top_mass.value == pytest.approx(0.6, abs=1e-3)
    assert found.entropy.value == pytest.approx(-(P * np.log2(P)).sum(), abs=1e-3)
    assert values(found.k_for_mass) == {0.5: 1, 0.8: 2, 0.9: 3}
    assert values(found.changed_by_k) == {2: 1}  # the second would take 0.25 of 0.85
    assert found.fragile.value == 0


def test_tokens_that_another_k_would_change(tmp_path: Path) -> None:
    """K = 2: the sure token would be served by one expert, the torn one would miss any."""
    p = np.array([[0.96, 0.03, 0.005, 0.005], [0.25, 0.25, 0.25, 0.25]])
    (found,) = router_confidence(make_trace(tmp_path / "t", {0: [[0, 1], [0, 1]]}, 4, logits={0: np.log(p)}))
    assert values(found.changed_by_k) == {1: 0.5, 3: 0.5, 4: 0.5}


def test_choices_that_are_not_the_best_have_negative_margins(tmp_path: Path) -> None:
    experts = [[1, 0], [0, 2], [3, 2]]
    (found,) = router_confidence(make_trace(tmp_path / "t", {0: experts}, 4, logits={0: np.log(P).repeat(3, 0)}))
    assert found.margin[0.5].value == pytest.approx(0.1 - 0.25, abs=1e-3)
    assert found.fragile.value == pytest.approx(2 / 3)
    assert found.top_mass.value == pytest.approx((0.85 + 0.7 + 0.15) / 3, abs=1e-3)


def test_sigmoid_is_normalised_for_masses_and_not_for_margins(tmp_path: Path) -> None:
    p = np.array([[0.9, 0.5, 0.3, 0.3]])
    trace = make_trace(tmp_path / "t", {0: [[0, 1]]}, 4, logits={0: np.log(p / (1 - p))}, score="sigmoid")
    (found,) = router_confidence(trace)
    assert found.margin[0.5].value == pytest.approx(0.2, abs=1e-3)
    assert found.top_mass.value == pytest.approx(0.7, abs=1e-3)
    q = p / 2
    assert found.entropy.value == pytest.approx(-(q * np.log2(q)).sum(), abs=1e-3)
    assert values(found.k_for_mass) == {0.5: 2, 0.8: 3, 0.9: 4}


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_many_tokens_against_numpy(tmp_path: Path, score: str) -> None:
    """Several parts, recorded out of reading order, layers of other sizes, ragged tokens."""
    rng = np.random.default_rng(0)
    N, sizes, logits, experts = 150, {0: 12, 2: 7}, {}, {}
    for layer, E in sizes.items():
        logits[layer] = rng.normal(size=(N, E)).astype(np.float16)
        experts[layer] = np.argsort(-logits[layer], 1)[:, :3]
        experts[layer][rng.random(N) < 0.2, 2] = E
    trace = make_trace(
        tmp_path / "t", experts, sizes, logits=logits, score=score, sequences=np.arange(N) % 10, part_rows=40
    )
    for found, (layer, E) in zip(router_confidence(trace), sizes.items(), strict=True):
        z = logits[layer].astype(np.float64)
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True) if score == "softmax" else 1 / (1 + np.exp(-z))
        q = p / p.sum(1, keepdims=True)
        chosen = (experts[layer][:, :, None] == np.arange(E)).any(1)
        margin = np.where(chosen, p, np.inf).min(1) - np.where(chosen, -np.inf, p).max(1)
        assert list(values(found.margin).values()) == pytest.approx(np.quantile(margin, QUANTILES).tolist(), abs=1e-5)
        assert found.fragile.value == pytest.approx((margin < 0.01).mean())
        assert found.top_mass.value == pytest.approx((q * chosen).sum(1).mean(), abs=1e-5)
        assert found.entropy.value == pytest.approx(-(q * np.log2(q)).sum(1).mean(), abs=1e-4)
        reached = -np.sort(-q, 1).cumsum(1)
        for mass, k in found.k_for_mass.items():
            assert k.value == pytest.approx((1 + (reached < mass).sum(1)).mean(), abs=0.01)
        assert found.top_mass.low < found.top_mass.value < found.top_mass.high


def test_masked_and_flat_logits_and_tokens_without_a_margin(tmp_path: Path) -> None:
    logits = np.array([[0.0, -np.inf], [0.0, 0.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (masked,) = router_confidence(make_trace(tmp_path / "a", {0: [[0], [0]]}, 2, logits={0: logits}))
        (full,) = router_confidence(make_trace(tmp_path / "b", {0: [[0, 1], [2, 2]]}, 2, logits={0: logits}))
    assert masked.entropy.value == pytest.approx(0.5)  # 0 bits and 1 bit
    assert masked.margin[0.5].value == pytest.approx(0.5)  # between 1 and 0
    assert masked.fragile.value == pytest.approx(0.5)
    assert all(np.isnan(one.value) for one in full.margin.values())
    assert full.top_mass.value == pytest.approx(0.5)
    assert full.fragile.value == 0


def unsure(folder: Path, count: int, *, order: np.ndarray | None = None, length: int = 40) -> Confidence:
    """Documents whose routers are sure to different degrees."""
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(length, 8)) * spread for spread in rng.uniform(0.3, 4, count)]
    z = np.concatenate([logits[i] for i in (np.arange(count) if order is None else order)]).astype(np.float16)
    sequences = np.repeat(np.arange(count), length)
    (found,) = router_confidence(
        make_trace(folder, {0: np.argsort(-z, 1)[:, :2]}, 8, logits={0: z}, sequences=sequences)
    )
    return found


def numbers(found: Confidence) -> dict[str, Estimate]:
    parts = {"margin": found.margin, "k": found.k_for_mass, "changed": found.changed_by_k}
    every = {f"{name} {key}": value for name, part in parts.items() for key, value in part.items()}
    return every | {"fragile": found.fragile, "mass": found.top_mass, "entropy": found.entropy}


def test_intervals_hold_the_value_and_shrink_with_more_documents(tmp_path: Path) -> None:
    few, many = (numbers(unsure(tmp_path / str(count), count)) for count in (8, 128))
    for found in (few, many):
        assert all(one.low <= one.value <= one.high for one in found.values())
    for name in few.keys() - {"margin 0.01"}:  # lies where margins are dense
        assert 0 < many[name].high - many[name].low < (few[name].high - few[name].low) / 1.8, name


def test_the_order_of_documents_changes_no_value_and_hardly_an_interval(tmp_path: Path) -> None:
    one = numbers(unsure(tmp_path / "one", 100))
    other = numbers(unsure(tmp_path / "other", 100, order=np.random.default_rng(2).permutation(100)))
    for name in one:
        assert one[name].value == pytest.approx(other[name].value, rel=1e-5), name
        assert one[name].high - one[name].low == pytest.approx(other[name].high - other[name].low, rel=0.5), name


def test_one_document_has_no_interval(tmp_path: Path) -> None:
    assert all(np.isnan([one.low, one.high]).all() for one in numbers(unsure(tmp_path, 1)).values())


def test_intervals_of_quantiles_cover_the_true_ones(tmp_path: Path) -> None:
    """Of margins that are uniform between 0 and 1, independent in 64 blocks."""
    rng = np.random.default_rng(4)
    block = np.arange(3200) % 64
    covered = np.zeros(len(QUANTILES))
    for _ in range(60):
        found = _quantiles(rng.random(3200).astype(np.float32), block, 64)
        covered += [one.low <= q <= one.high for one, q in zip(found, QUANTILES, strict=True)]
    assert (covered[1:] / 60 > 0.85).all()
    assert covered[0] / 60 > 0.75  # of 32 values below, seen in few blocks


def test_other_scores_and_traces_without_logits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="without router logits"):
        router_confidence(make_trace(tmp_path / "a", {0: [[0]]}, 2))
    trace = make_trace(tmp_path / "b", {5: [[0]]}, 2, logits={5: np.zeros((1, 2))}, score="sqrtsoftplus")
    with pytest.raises(TraceError, match="layer 5 is 'sqrtsoftplus'"):
        router_confidence(trace)
