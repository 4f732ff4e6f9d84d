"""Likeness of experts: copies are found whatever the order of their neurons; random experts are the control."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from collegium.errors import ConfigError
from collegium.experts.weights import ExpertWeights
from collegium.measure.collect import collect
from collegium.measure.redundancy import OutputCosine, redundancy, weight_cosine
from collegium.sites import sites
from collegium.trace import Trace, record
from tiny import tiny_model


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 64, (1, 16), generator=generator)} for _ in range(4)]


@torch.no_grad()
def copy_permuted(experts: Any, source: int, target: int) -> None:
    """Make `target` the same function as `source`, its neurons in another order."""
    f = experts.down_proj.shape[2]
    order = torch.randperm(f, generator=torch.Generator().manual_seed(1))
    gate, up = experts.gate_up_proj[source].chunk(2)
    experts.gate_up_proj[target] = torch.cat([gate[order], up[order]])
    experts.down_proj[target] = experts.down_proj[source][:, order]


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model("qwen3_moe")
    copy_permuted(sites(model)[1].experts, 5, 2)
    return model


@pytest.fixture(scope="module")
def trace(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return record(model, batches(), tmp_path_factory.mktemp("traces") / "t")


def test_a_permuted_copy_is_found_by_weights_and_by_outputs(model: Any, trace: Trace) -> None:
    plain, planted = redundancy(trace, model)
    assert (plain.layer, planted.layer) == (0, 1)
    assert planted.by_weights[2, 5] == pytest.approx(1, abs=1e-5)
    assert planted.by_outputs[2, 5] == pytest.approx(1, abs=1e-5)
    assert planted.in_order[2, 5] < 0.5, "neurons in order do not show it"
    assert planted.closest[0][:2] == (2, 5)
    others = planted.by_weights[~np.eye(8, dtype=bool)]
    assert np.sort(others)[-3] < 0.6, "no other pair looks like a copy"
    assert plain.closest[0][2] < 0.9
    assert "2, 5 (1.00)" in str(planted.summary()["closest pair"])


def test_random_experts_are_like_the_control(model: Any, trace: Trace) -> None:
    found = redundancy(trace, model)[0]
    assert found.mean_by_outputs.value == pytest.approx(found.control_outputs, abs=0.1)
    others = found.by_outputs[~np.eye(8, dtype=bool)]
    assert found.mean_by_outputs.value == pytest.approx(others.mean(), abs=1e-6)
    assert found.mean_by_weights == pytest.approx(found.control, abs=0.05)
    for square in (found.by_weights, found.by_outputs, found.in_order):
        np.testing.assert_allclose(square, square.T, atol=1e-6)
        np.testing.assert_allclose(np.diag(square), 1, atol=1e-5)
        assert np.abs(square).max() <= 1 + 1e-5
    assert found.tokens == 64
    assert redundancy(trace, model, max_tokens=10)[0].tokens == 10


@torch.no_grad()
def test_output_cosines_are_those_of_a_loop(model: Any) -> None:
    site, seen = sites(model)[0], []
    handle = site.experts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = collect(model, batches(), [OutputCosine(tokens=20)])
    handle.remove()
    x = torch.cat([seen[0], seen[1][[0, 5, 10, 15]]])  # 16 tokens, then 4 spread over the next 16
    ys = []
    for e in range(8):
        gate, up = (x @ site.experts.gate_up_proj[e].T).chunk(2, -1)
        ys.append(F.normalize((F.silu(gate) * up) @ site.experts.down_proj[e].T, dim=-1))
    expected = torch.einsum("ind,jnd->ij", torch.stack(ys), torch.stack(ys))
    assert found.get(0, "out_cos_n") == 20
    torch.testing.assert_close(found.get(0, "out_cos").float(), expected, rtol=1e-4, atol=1e-4)


def test_the_interval_is_over_the_documents_of_the_sample(model: Any, trace: Trace, tmp_path: Any) -> None:
    found = redundancy(trace, model)[0].mean_by_outputs  # four documents
    assert found.low < found.value < found.high
    alone = redundancy(record(model, batches()[:1], tmp_path / "one"), model)[0].mean_by_outputs
    assert np.isnan([alone.low, alone.high]).all()
    generator = torch.Generator().manual_seed(1)
    many = [{"input_ids": torch.randint(3, 64, (1, 16), generator=generator)} for _ in range(64)]
    wide = redundancy(record(model, many, tmp_path / "many"), model)[0].mean_by_outputs
    assert wide.low <= wide.value <= wide.high
    assert wide.high - wide.low < found.high - found.low
    turned = redundancy(record(model, many[::-1], tmp_path / "turned"), model)[0].mean_by_outputs
    assert turned.value == pytest.approx(wide.value, abs=1e-6)
    assert turned.high - turned.low == pytest.approx(wide.high - wide.low, rel=0.4)


def test_sums_of_blocks_are_those_of_the_documents(model: Any) -> None:
    data = [{**batch, "document": torch.tensor([n % 2 + 64])} for n, batch in enumerate(batches())]
    found = collect(model, data, [OutputCosine()])
    blocks = found.get(0, "out_cos_blocks")
    assert blocks[:, 1].nonzero().flatten().tolist() == [0, 1]
    assert blocks[:2, 1].tolist() == [32, 32]
    total = found.get(0, "out_cos")
    pairs = (total.sum() - total.diagonal().sum()) / 56
    assert blocks[:, 0].sum().item() == pytest.approx(pairs.item(), abs=1e-6)


def test_a_limit_for_each_batch_spreads_the_sample(model: Any) -> None:
    found = collect(model, batches(), [OutputCosine(tokens=10, per_batch=4)])
    assert found.get(0, "out_cos_n") == 10
    with pytest.raises(ConfigError, match="at least 1"):
        OutputCosine(per_batch=0)


def weights(E: int = 3, f: int = 24, d: int = 200, *, seed: int = 0) -> ExpertWeights:
    """Neurons of 3d = 600 numbers, long enough to be projected."""
    draw = torch.Generator().manual_seed(seed)
    return ExpertWeights(
        up=torch.randn(E, 2 * f, d, generator=draw), down=torch.randn(E, d, f, generator=draw), activation=F.silu
    )


def test_a_noisy_permuted_copy_of_long_neurons_is_found() -> None:
    one = weights()
    f, order = 24, torch.randperm(24, generator=torch.Generator().manual_seed(1))
    noise = weights(seed=7)
    one.up[1] = one.up[0][torch.cat([order, f + order])] + 0.1 * noise.up[1]
    one.down[1] = one.down[0][:, order] + 0.1 * noise.down[1]
    plain, paired = weight_cosine(one)
    assert paired[0, 1] == pytest.approx(1 / np.sqrt(1.01), abs=2e-3)
    assert abs(plain[0, 1]) < 0.2
    assert abs(paired[0, 2]) < 0.2


def test_the_layout_of_the_weights_does_not_matter() -> None:
    one = weights(d=40)
    plain, paired = weight_cosine(one)
    rows = torch.stack([torch.arange(24), 24 + torch.arange(24)], 1).flatten()
    for other in (
        replace(one, up=one.up.transpose(1, 2), down=one.down.transpose(1, 2), transposed=True),
        replace(one, up=one.up[:, rows], interleaved=True),
    ):
        np.testing.assert_allclose(weight_cosine(other), (plain, paired), atol=1e-5)


def test_pairing_in_parts_is_pairing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one = weights(d=10)
    whole = weight_cosine(one)
    monkeypatch.setattr("collegium.measure.redundancy._CHUNK", 24 * 5)
    np.testing.assert_allclose(weight_cosine(one), whole, atol=1e-6)


def test_experts_without_a_gate_and_a_single_expert() -> None:
    draw = torch.Generator().manual_seed(0)
    plain = ExpertWeights(
        up=torch.randn(2, 6, 5, generator=draw), down=torch.randn(2, 5, 6, generator=draw), activation=F.relu,
        gated=False,
    )  # fmt: skip
    plain.up[1], plain.down[1] = plain.up[0].flip(0), plain.down[0].flip(1)
    assert weight_cosine(plain)[1][0, 1] == pytest.approx(1)
    in_order, paired = weight_cosine(weights(E=1))
    assert in_order == pytest.approx(1)
    assert paired.tolist() == [[1]]


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "deepseek_v3"])
def test_other_layouts_of_whole_models(family: str, tmp_path: Any) -> None:
    model = tiny_model(family)
    found = redundancy(record(model, batches(), tmp_path / "t"), model, max_tokens=16)
    assert [one.layer for one in found] == sorted(site.layer for site in sites(model))
    assert all(np.isfinite(one.by_outputs).all() for one in found)
