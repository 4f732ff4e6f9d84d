"""The congestion game: its equilibrium, the fit on loads made with a known gamma, and phases over checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from collegium.errors import ConfigError, TraceError
from collegium.measure.congestion import congestion, congestion_series, find_phases
from collegium.measure.game import equilibrium, fit_gamma, fit_temperature
from collegium.trace import Trace
from measure_traces import make_trace

M = 64
GAMMAS = [0.0, 9.0, 14.0, 38.0]


def qualities(E: int = M, spread: float = 1.0, seed: int = 0) -> np.ndarray:
    Q = np.random.default_rng(seed).normal(0, spread, E)
    return Q - Q.mean()


def softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max())
    return p / p.sum()


def played(p: np.ndarray, N: int) -> np.ndarray:
    """[N] experts in the shares `p`, as exactly as N allows, in order of expert."""
    counts = np.floor(p * N).astype(int)
    rest = np.argsort(counts - p * N)[: N - counts.sum()]
    counts[rest] += 1
    return np.repeat(np.arange(len(p)), counts)


def game_trace(folder: Path, Q: np.ndarray, p: np.ndarray, *, documents: int = 8, N: int = 8192) -> Trace:
    """Loads `p` in every document, logits Q with noise around it."""
    noise = np.random.default_rng(1).normal(0, 0.5, (N // 2, len(Q)))
    return make_trace(
        folder,
        {1: played(p, N)[:, None]},
        len(Q),
        logits={1: Q + np.concatenate([noise, -noise])},
        sequences=(np.arange(N) % documents).tolist(),
        part_rows=3000,
    )


@settings(deadline=None)  # the first call compiles
@given(
    arrays(np.float64, st.integers(2, 40), elements=st.floats(-20, 20)),
    st.one_of(st.just(0.0), st.floats(1e-6, 1e5)),
)
def test_the_equilibrium_is_a_fixed_point(Q: np.ndarray, gamma: float) -> None:
    p = equilibrium(Q, gamma)
    assert (p >= 0).all()
    assert p.sum() == pytest.approx(1, abs=1e-12)
    # in logarithms: log p + gamma p - Q is one constant
    level = (np.log(p) + gamma * p - Q)[p > 1e-250]
    assert np.ptp(level) < 1e-7 * max(1.0, gamma)
    if gamma < 10:
        assert np.abs(p - softmax(Q - gamma * p)).max() < 1e-10


def test_the_ends_of_gamma() -> None:
    Q = qualities()
    np.testing.assert_allclose(equilibrium(Q, 0.0), softmax(Q), atol=1e-14)
    np.testing.assert_allclose(equilibrium(Q, 1e9), np.full(M, 1 / M), atol=1e-6)
    np.testing.assert_allclose(equilibrium(np.full(M, 3.0), 14.0), np.full(M, 1 / M), atol=1e-14)


@pytest.mark.parametrize("gamma", [*GAMMAS, 200.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_gamma_is_recovered_from_exact_loads(gamma: float, seed: int) -> None:
    Q = qualities(seed=seed)
    assert fit_gamma(Q, equilibrium(Q, gamma)) == pytest.approx(gamma, rel=1e-3, abs=0.01)


def test_near_even_loads_the_game_is_a_softmax_of_temperature_one_plus_gamma_over_experts() -> None:
    Q = qualities(spread=0.5)
    p = equilibrium(Q, 30.0)
    assert fit_temperature(Q, p) == pytest.approx(1 + 30 / M, rel=0.1)
    apart = [np.abs(p - other).sum() for other in (softmax(Q / (1 + 30 / M)), softmax(Q), np.full(M, 1 / M))]
    assert apart[0] < 0.05 < apart[1] < apart[2]


@pytest.mark.parametrize("gamma", GAMMAS)
def test_gamma_is_recovered_from_a_trace(gamma: float, tmp_path: Path) -> None:
    Q = qualities()
    p = equilibrium(Q, gamma)
    (found,) = congestion(game_trace(tmp_path / "t", Q, p), resamples=20)
    assert found.layer == 1
    assert found.why == ""
    assert found.gamma is not None
    assert found.gamma.value == pytest.approx(gamma, rel=0.1, abs=0.3)
    assert found.gamma.low <= found.gamma.value <= found.gamma.high
    assert found.residual is not None
    assert found.residual < 0.03
    assert found.residual_uniform is not None
    assert found.residual_temperature is not None
    assert found.residual <= found.residual_temperature + 0.01
    assert found.residual_temperature < found.residual_uniform
    assert found.b0 == pytest.approx(M * p.max(), rel=0.02)
    assert found.estimators["selected logit"] == pytest.approx(gamma, rel=0.3, abs=3)
    assert set(found.summary()) >= {"layer", "gamma", "note"}


def test_the_interval_covers_gamma_when_documents_are_random(tmp_path: Path) -> None:
    Q, rng = qualities(), np.random.default_rng(5)
    N = 16384
    expert = rng.choice(M, N, p=equilibrium(Q, 14.0))
    trace = make_trace(
        tmp_path / "t", {0: expert[:, None]}, M, logits={0: np.tile(Q, (N, 1))},
        sequences=(np.arange(N) // 256).tolist(), part_rows=8192,
    )  # fmt: skip
    (found,) = congestion(trace)
    assert found.gamma is not None
    assert found.gamma.low < 14 < found.gamma.high
    assert 0.5 < found.gamma.high - found.gamma.low < 14


def test_names_of_experts_do_not_matter(tmp_path: Path) -> None:
    Q = qualities(8)
    p, order = equilibrium(Q, 4.0), np.random.default_rng(0).permutation(8)
    (one,) = congestion(game_trace(tmp_path / "a", Q, p, N=2048), resamples=2)
    (two,) = congestion(game_trace(tmp_path / "b", Q[order], p[order], N=2048), resamples=2)
    assert one.gamma is not None
    assert two.gamma is not None
    assert one.gamma.value == pytest.approx(two.gamma.value, rel=0.1)


def test_equal_qualities_tell_nothing(tmp_path: Path) -> None:
    (found,) = congestion(
        make_trace(
            tmp_path / "t",
            {0: np.arange(64)[:, None] % 4},
            4,
            logits={0: np.zeros((64, 4))},
            sequences=(np.arange(64) // 8).tolist(),
        )
    )
    assert found.gamma is None
    assert "equal" in found.why
    assert found.b0 == 1
    assert set(found.estimators.values()) == {None}


def test_even_loads_leave_gamma_open_to_above(tmp_path: Path) -> None:
    (found,) = congestion(game_trace(tmp_path / "t", qualities(8), np.full(8, 1 / 8), N=2048), resamples=10)
    assert found.gamma is None
    assert "even" in found.why
    assert found.residual_uniform == pytest.approx(0, abs=0.02)


def test_one_document_one_token_and_one_expert_have_no_answer(tmp_path: Path) -> None:
    one = make_trace(tmp_path / "a", {0: [[1]]}, 4, logits={0: [[1, 2, 3, 4]]})
    assert "single document" in congestion(one)[0].why
    lonely = make_trace(tmp_path / "b", {0: [[0], [0]]}, 1, logits={0: [[1], [2]]}, sequences=[0, 1])
    assert "no rivals" in congestion(lonely)[0].why


def test_infinite_logits_are_said(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", {0: [[0], [1]]}, 2, logits={0: [[np.inf, 0], [0, 1]]}, sequences=[0, 1])
    assert "not finite" in congestion(trace)[0].why


def test_empty_slots_and_layers_of_other_sizes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    N, sizes = 400, {0: 4, 3: 7}
    experts = {layer: np.stack([rng.permutation(E)[:2] for _ in range(N)]) for layer, E in sizes.items()}
    experts[3][::3, 1] = 7
    trace = make_trace(
        tmp_path / "t", experts, sizes, sequences=(np.arange(N) // 20).tolist(),
        logits={layer: rng.normal(0, 1, (N, E)) + np.arange(E) for layer, E in sizes.items()},
    )  # fmt: skip
    first, second = congestion(trace, resamples=4)
    counts = trace.counts(3)
    assert second.b0 == pytest.approx(counts.max() / counts.mean())
    assert [first.layer, second.layer] == [0, 3]


def test_a_trace_without_logits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="logits"):
        congestion(make_trace(tmp_path / "t", {0: [[0], [1]]}, 2))


STEPS = [100, 300, 1000, 3000, 10000, 30000, 100000, 300000]


def test_three_phases_are_found() -> None:
    found = find_phases(np.array([5, 15, 25, 35, 36, 35, 22, 9.0]), STEPS)
    assert found.kinds == ("surge", "stabilisation", "relaxation")
    assert found.breaks == pytest.approx((3000, 30000))
    assert found.explained is not None
    assert found.control is not None
    assert found.explained > 0.99 > 0.5 > found.control


def test_a_straight_rise_has_one_phase() -> None:
    found = find_phases(np.arange(8.0), [10**n for n in range(8)])
    assert set(found.kinds) == {"surge"}
    assert found.slopes == pytest.approx((1, 1, 1))
    assert found.control == pytest.approx(1)


def test_a_constant_gamma_is_stable_and_holes_are_left_out() -> None:
    gamma = np.full(8, 3.0)
    gamma[2] = np.nan
    found = find_phases(gamma, STEPS)
    assert set(found.kinds) == {"stabilisation"}
    assert found.explained is None
    gamma[3:6] = np.nan
    assert "4 checkpoints" in find_phases(gamma, STEPS).why


def test_a_series_of_traces(tmp_path: Path) -> None:
    Q = qualities(8, spread=0.7)
    traces = [
        game_trace(tmp_path / str(i), Q, equilibrium(Q, gamma), N=2048)
        for i, gamma in enumerate([1.0, 3.0, 5.0, 5.0, 5.0, 3.0, 1.0])
    ]
    steps = STEPS[:7]
    layer, mean = congestion_series(traces, steps, resamples=3)
    assert (layer.layer, mean.layer) == (1, None)
    assert layer.gamma == pytest.approx([1, 3, 5, 5, 5, 3, 1], rel=0.15)
    assert layer.kinds == mean.kinds == ("surge", "stabilisation", "relaxation")
    with pytest.raises(ConfigError, match="at least 6"):
        congestion_series(traces[:5], steps[:5])
    with pytest.raises(ConfigError, match="ascend"):
        congestion_series(traces, steps[::-1])
    other = make_trace(tmp_path / "other", {1: [[0]]}, 8, logits={1: np.zeros((1, 8))})
    with pytest.raises(TraceError, match="same tokens"):
        congestion_series([*traces[:6], other], steps)
