"""Local routing consistency: the published vector, a plain implementation, controls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.errors import ConfigError
from collegium.measure import Locality, local_routing_consistency
from measure_traces import make_trace


def plain_srp(active: list[np.ndarray], m: int) -> tuple[float, float]:
    """``(SRP, size ratio)`` of a group of experts by the definition; `active` are sequences ``[N, E]`` of 0 and 1."""
    windows = [a[s : s + m].sum(0) for a in active for s in range(len(a) - m + 1)]
    if not windows or not np.sum(windows):
        return np.nan, np.nan
    f = np.stack(windows)
    best = (-1.0, 0.0)
    for alpha in range(m, -1, -1):
        predicted = m * (f >= alpha).sum()
        score = 2 * f[f >= alpha].sum() / (predicted + f.sum())
        if score > best[0] + 1e-12:
            best = (score, predicted / f.sum())
    return best


def sequences_of(experts: np.ndarray, sequence: np.ndarray, E: int) -> list[np.ndarray]:
    active = (experts[:, :, None] == np.arange(E)).any(1).astype(int)
    return [active[sequence == s] for s in np.unique(sequence)]


def sticky(N: int, E: int, K: int, keep: float, seed: int = 0) -> np.ndarray:
    """[N, K] experts, of which each stays with probability `keep`."""
    random = np.random.default_rng(seed)
    rows = [random.permutation(E)[:K]]
    for _ in range(N - 1):
        stay = rows[-1][random.random(K) < keep]
        rows.append(np.concatenate([stay, random.permutation(np.setdiff1d(np.arange(E), stay))])[:K])
    return np.stack(rows)


def test_the_published_vector(tmp_path: Path) -> None:
    experts = np.array([0, 0, 1, 1, 0, 0, 1, 1])[:, None]  # E = 1: id 1 is an unused slot
    layer, whole = local_routing_consistency(make_trace(tmp_path, {6: experts}, 1), segments=(2,))
    for found in (layer, whole):
        assert found.srp[0].value == pytest.approx(14 / 17)
        assert found.size_ratio[0] == pytest.approx(10 / 7)
        assert found.bound[0] == pytest.approx(2 * 0.5 / 1.5)  # a = 7 / 14
    assert (layer.layer, whole.layer) == (6, None)
    assert layer.srp_expert.tolist() == [[pytest.approx(14 / 17)]]
    assert whole.srp_expert.shape == (1, 0)


def test_one_token_decides_for_itself(tmp_path: Path) -> None:
    trace = make_trace(tmp_path, {0: sticky(64, 8, 2, 0.3)}, 8)
    layer, whole = local_routing_consistency(trace, segments=(1,))
    assert layer.srp[0].value == layer.size_ratio[0] == whole.srp[0].value == 1


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    E=st.integers(1, 9),
    K=st.integers(1, 3),
    N=st.integers(1, 50),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True),
)
def test_agrees_with_the_definition(
    tmp_path_factory: pytest.TempPathFactory, seed: int, E: int, K: int, N: int, lengths: list[int]
) -> None:
    random = np.random.default_rng(seed)
    layers = {n: np.stack([random.permutation(E + 2)[:K] for _ in range(N)]).clip(max=E) for n in (0, 3)}
    sequence = np.sort(random.integers(0, 4, N))
    trace = make_trace(tmp_path_factory.mktemp("trace"), layers, E, sequences=sequence)
    *found, whole = local_routing_consistency(trace, segments=lengths)
    active = {n: sequences_of(experts, sequence, E) for n, experts in layers.items()}
    assert whole.segments.tolist() == sorted(lengths)
    for at, m in enumerate(sorted(lengths)):
        for layer in found:
            assert layer.layer is not None
            assert (layer.srp[at].value, layer.size_ratio[at]) == pytest.approx(
                plain_srp(active[layer.layer], m), nan_ok=True
            )
            for e in range(E):
                expected = plain_srp([a[:, [e]] for a in active[layer.layer]], m)[0]
                assert layer.srp_expert[at, e] == pytest.approx(expected, nan_ok=True)
            if layer.srp[at].value == layer.srp[at].value:
                assert layer.srp[at].value >= layer.bound[at] - 1e-12
        both = [np.concatenate(pair, axis=1) for pair in zip(active[0], active[3], strict=True)]
        assert (whole.srp[at].value, whole.size_ratio[at]) == pytest.approx(plain_srp(both, m), nan_ok=True)


def test_shuffled_tokens_fall_to_the_bound_and_sticky_ones_stay_above(tmp_path: Path) -> None:
    sequence = np.arange(4096) // 256
    trace = make_trace(tmp_path, {0: sticky(4096, 16, 2, 0.95)}, 16, sequences=sequence)
    found = local_routing_consistency(trace, segments=(4, 64))[0]
    assert found.srp[0].low > found.shuffled[0] + 0.2
    assert found.srp[1].low > found.shuffled[1]
    assert found.bound[1] <= found.shuffled[1] < found.bound[1] + 0.06
    assert found.srp[0].low < found.srp[0].value < found.srp[0].high
    assert found.size_ratio[0] < found.size_ratio[1]
    assert found.summary()["SRP 4"] == found.srp[0]  # the nearest to 16


def test_windows_do_not_cross_sequences(tmp_path: Path) -> None:
    """One expert a sequence: consistent inside, and a window across the border would lower it."""
    trace = make_trace(tmp_path, {0: np.repeat([0, 1], 8)[:, None]}, 2, sequences=np.repeat([0, 1], 8))
    assert local_routing_consistency(trace, segments=(4,))[0].srp[0].value == 1


def test_the_order_of_recording_does_not_matter(tmp_path: Path) -> None:
    experts, sequence = sticky(60, 6, 2, 0.8), np.repeat([0, 1, 2], 20)
    position = np.tile(np.arange(20), 3)
    side_by_side = np.argsort(position, kind="stable")
    results = [
        local_routing_consistency(
            make_trace(
                tmp_path / str(at), {0: experts[order]}, 6, sequences=sequence[order], positions=position[order]
            ),
            segments=(4, 8),
        )[0]
        for at, order in enumerate((np.arange(60), side_by_side))
    ]
    assert [e.value for e in results[0].srp] == [e.value for e in results[1].srp]


def test_sequences_too_short_for_a_segment_have_no_number(tmp_path: Path) -> None:
    for name, experts in (("one", [[1]]), ("empty", [[2], [2], [2], [2]])):
        layer, whole = local_routing_consistency(make_trace(tmp_path / name, {0: experts}, 2), segments=(4,))
        for found in (layer, whole):
            assert np.isnan([found.srp[0].value, found.srp[0].low, found.size_ratio[0], found.bound[0]]).all()
            assert np.isnan(found.shuffled).all()


@pytest.mark.parametrize("segments", [(), (0, 4), (-1,)])
def test_impossible_segments_are_refused(tmp_path: Path, segments: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        local_routing_consistency(make_trace(tmp_path, {0: [[1]]}, 2), segments=segments)


def test_layers_of_different_sizes_make_one_group(tmp_path: Path) -> None:
    layers = {0: sticky(40, 4, 1, 0.5), 1: sticky(40, 300, 6, 0.5)}
    found = local_routing_consistency(make_trace(tmp_path, layers, {0: 4, 1: 300}), segments=(4,))
    assert [at.srp_expert.shape for at in found] == [(1, 4), (1, 300), (1, 0)]
    whole: Locality = found[-1]
    assert min(at.srp[0].value for at in found[:2]) <= whole.srp[0].value <= max(at.srp[0].value for at in found[:2])
