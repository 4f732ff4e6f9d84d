"""Super experts: the rule on known values, and one planted in a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from collegium.errors import ConfigError, ModelError
from collegium.measure.collect import collect
from collegium.measure.statistics import LayerEntry, Statistics, StatisticsMeta
from collegium.measure.super_experts import DownMax, SuperExpertSettings, super_experts, super_experts_of
from collegium.sites import sites
from collegium.trace import Trace, record
from measure_traces import make_trace
from tiny import tiny_model


def statistics_of(values: np.ndarray, *, num_layers: int | None = None, n: np.ndarray | None = None) -> Statistics:
    """Statistics with ``down_max = values [L, E]``."""
    L, E = values.shape
    n = np.full((L, E), 10) if n is None else n
    meta = StatisticsMeta(
        model="made up", family="none", num_layers=num_layers or L, data=("numbers",), domains=("one",), tokens=10,
        layers=tuple(
            LayerEntry(layer=i, path=f"layers.{i}", num_experts=E, top_k=2, hidden_size=4, intermediate_size=4)
            for i in range(L)
        ),
        statistics=tuple(
            entry.model_copy(update={"collector": "down_max", "by_domain": False})
            for entry in (*DownMax.statistics, DownMax.statistics[1].model_copy(update={
                "name": "n", "axes": ("E",), "merge": "sum", "of": None}))
        ),
        collectors={"down_max": {}}, created="2026-01-01T00:00:00+00:00", collegium="0",
    )  # fmt: skip
    tensors = {}
    for i in range(L):
        tensors[i, "down_max"] = torch.tensor(values[i], dtype=torch.float64)
        tensors[i, "down_argmax"] = torch.arange(2 * E).view(E, 2)
        tensors[i, "n"] = torch.tensor(n[i], dtype=torch.int64)
    return Statistics(meta, tensors)


def test_the_rule_of_large_models() -> None:
    values = np.random.default_rng(0).uniform(0.5, 2, (16, 128))
    values[1, 68], values[2, 92] = 900, 400
    values[3, 5] = 60  # beyond the percentile, below a tenth of the largest
    values[13, 7] = 5000  # late
    found = super_experts(statistics_of(values))
    assert found.rule == "percentile"
    assert [(one.layer, one.expert, one.value) for one in found.found] == [(1, 68, 900), (2, 92, 400)]
    assert (found.found[0].channel, found.found[0].position) == (136, 137)
    assert found.searched == tuple(range(12))
    assert found.largest == 900
    assert found.threshold == 90
    everywhere = super_experts(statistics_of(values), SuperExpertSettings(depth=1))
    assert [(one.layer, one.expert) for one in everywhere.found] == [(13, 7), (1, 68)]


def test_even_values_have_no_more_than_the_percentile_lets_through() -> None:
    found = super_experts(statistics_of(np.random.default_rng(0).uniform(0.5, 2, (16, 128))))
    assert 0 < len(found.found) <= 16 * 128 * 0.75 * 0.005 + 1
    assert super_experts(statistics_of(np.ones((16, 128)))).found == ()


def test_the_rule_of_small_models() -> None:
    values = np.random.default_rng(0).uniform(0.5, 2, (6, 16))
    assert super_experts(statistics_of(values)).found == ()
    values[1, 3], values[2, 2], values[5, 0] = 100, 15, 1000
    found = super_experts(statistics_of(values))
    assert found.rule == "median"
    assert [(one.layer, one.expert) for one in found.found] == [(1, 3)]
    assert found.found[0].times_median == pytest.approx(100 / found.median)
    assert found.summary()["layer.expert"] == "1.3"


def test_experts_without_tokens_count_neither_way() -> None:
    values, n = np.ones((4, 8)), np.full((4, 8), 5)
    values[:3, 2:] = n[:3, 2:] = 0
    found = super_experts(statistics_of(values, n=n))
    assert (found.median, found.unseen) == (1, 18)
    nothing = super_experts(statistics_of(np.zeros((4, 8)), n=np.zeros((4, 8), int)))
    assert (nothing.found, nothing.largest, nothing.unseen) == ((), 0, 24)
    large = super_experts(statistics_of(np.zeros((16, 128)), n=np.zeros((16, 128), int)))
    assert (large.rule, large.found) == ("percentile", ())


def test_depth_counts_the_layers_of_the_model_not_those_with_experts() -> None:
    values = np.ones((4, 8))
    assert super_experts(statistics_of(values)).searched == (0, 1, 2)
    assert super_experts(statistics_of(values, num_layers=8)).searched == (0, 1, 2, 3)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="depth"):
        SuperExpertSettings(depth=0)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_moe", num_hidden_layers=4)


def batches(count: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 64, (1, 16), generator=generator)} for _ in range(count)]


@pytest.fixture(scope="module")
def trace(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return record(model, batches(), tmp_path_factory.mktemp("traces") / "t")


def test_an_ordinary_model_has_none(model: Any, trace: Trace) -> None:
    found = super_experts_of(trace, model)
    assert found.found == ()
    assert found.tokens == 128
    assert found.values[0].shape == (8,)


def test_a_planted_one_is_found_and_no_other(model: Any, trace: Trace) -> None:
    site = next(site for site in sites(model) if site.layer == 1)
    statistics = collect(model, batches(), [DownMax()])
    median = float(np.median([statistics.get(layer, "down_max") for layer in statistics.layers]))
    down = site.experts.down_proj
    before = down.detach().clone()
    with torch.no_grad():
        # a term of rank one: its output goes to channel 7 alone
        down[3, 7] *= 100 * median / float(statistics.get(1, "down_max")[3]) * before.norm() / before[3, 7].norm()
    try:
        found = super_experts_of(trace, model)
    finally:
        with torch.no_grad():
            down.copy_(before)
    assert [(one.layer, one.expert, one.channel) for one in found.found] == [(1, 3, 7)]
    assert 0 <= found.found[0].position < 16
    assert found.found[0].times_median > 20


def test_a_trace_gives_back_the_batches_it_was_recorded_from(model: Any, trace: Trace) -> None:
    direct = collect(model, batches(), [DownMax()])
    again = super_experts_of(trace, model)
    for layer, values in again.values.items():
        np.testing.assert_allclose(values, direct.get(layer, "down_max").numpy(), rtol=1e-4)
    assert super_experts_of(trace, model, max_tokens=20).tokens == 20


def test_a_trace_of_another_model_is_refused(model: Any, trace: Trace, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a trace of this model"):
        super_experts_of(trace, tiny_model("qwen3_moe"))
    experts = {layer: [[0, 1]] for layer in range(4)}
    with pytest.raises(ModelError, match="token id is 64 of 64"):
        super_experts_of(make_trace(tmp_path / "t", experts, 8, tokens=[64]), model)
