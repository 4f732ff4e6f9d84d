"""Compressed Experts: at first a lower K without renormalising, then vectors that learn."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from collegium.compress.compressed_experts import VECTORS, install_compressed, tune_compressed
from collegium.compress.own import load_own, save_own_model
from collegium.compress.own_write import save_own
from collegium.errors import ConfigError, UnsupportedFamilyError
from collegium.layer import moe_layers
from collegium.models import MoEConfig, install, load
from collegium.routing import Routing
from collegium.sites import Site, sites, tap
from pruning import logits, plan_of, saved
from tiny import families, tiny_inputs, tiny_model

FAMILIES = ["qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "muse_spark_text"]


class DropLast:
    """The experts of least weight go; the others keep their weights."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, site: Site, x: Tensor, routing: Routing) -> Routing:
        weight, order = routing.weight_TK.sort(dim=1, descending=True, stable=True)
        index = routing.index_TK.gather(1, order)
        left = index.shape[1] - self.count
        return Routing.from_topk(index[:, :left], weight[:, :left], routing.num_experts)


def model_of(family: str, K: int = 4) -> Any:
    name = {"deepseek_v3": {"topk_group": 2}}.get(family, {})
    return tiny_model(family, num_experts_per_tok=K, **name)


@pytest.mark.parametrize("family", families(*FAMILIES))
@pytest.mark.parametrize("n_ce", [1, 3])
def test_at_first_it_is_a_lower_k(family: str, n_ce: int) -> None:
    model = model_of(family)
    assert {site.top_k for site in sites(model)} == {4}
    with tap(model, DropLast(n_ce)):
        expected = logits(model)
    whole = logits(model)
    install_compressed(model, n_ce)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, expected, atol=1e-3)


def by_definition(experts: Any, x: Tensor, index: Tensor, weight: Tensor, n_ce: int) -> Tensor:
    """Token by token and expert by expert, as the paper has it, for experts of the usual layout."""
    y = torch.zeros_like(x)
    for t in range(len(x)):
        order = weight[t].argsort(descending=True)
        main, aux = order[: len(order) - n_ce], order[len(order) - n_ce :]
        share = weight[t, aux] / weight[t, aux].sum()
        c0, c1, c2 = (
            sum(share[i] * getattr(experts, name)[index[t, a]] for i, a in enumerate(aux)) for name in VECTORS
        )
        for m in main:
            gate, up = experts.gate_up_proj[index[t, m]].chunk(2)
            h = nn.functional.silu(gate @ (x[t] * c0)) * (up @ (x[t] * c2))
            y[t] += weight[t, m] * (experts.down_proj[index[t, m]] @ (h * c1))
    return y


@torch.no_grad()
def test_vectors_modulate_the_main_experts() -> None:
    model = install_compressed(model_of("qwen3_moe"), 2)
    experts: Any = sites(model)[0].experts
    generator = torch.Generator().manual_seed(0)
    for name in VECTORS:
        getattr(experts, name).normal_(1, 0.3, generator=generator)
    x = torch.randn(6, 32, generator=generator)
    weight, index = torch.rand(6, 8, generator=generator).topk(4)
    shuffled = torch.randperm(4, generator=generator)  # routers need not sort
    found = experts(x, index[:, shuffled], weight[:, shuffled])
    torch.testing.assert_close(found, by_definition(experts, x, index, weight, 2), rtol=1e-4, atol=1e-5)
    # a token whose auxiliary slots are unused is not modulated
    index[0, 2:] = 8
    weight[0, 2:] = 0
    alone = experts(x[:1], index[:1], weight[:1])
    for name in VECTORS:
        getattr(experts, name).fill_(1)
    torch.testing.assert_close(alone, experts(x[:1], index[:1], weight[:1]))


def text(model: Any) -> list[dict[str, Tensor]]:
    """Two batches; the second has padding."""
    inputs = [tiny_inputs(model, seed=seed) for seed in range(2)]
    mask = torch.ones_like(inputs[1]["input_ids"])
    mask[1, -3:] = 0
    return [inputs[0], inputs[1] | {"attention_mask": mask}]


def test_tuning_the_vectors_leaves_the_rest_alone() -> None:
    model = install_compressed(model_of("qwen3_moe"), 2)
    before = copy.deepcopy(model.state_dict())
    losses = tune_compressed(model, text(model), steps=12, lr=3e-2, train="ce_only")
    assert len(losses) == 12
    assert sum(losses[-2:]) < sum(losses[:2])
    moved = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert moved == {name for name in before if name.rpartition(".")[2] in VECTORS}
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_tuning_all() -> None:
    model = install_compressed(model_of("gpt_oss"), 2)
    before = copy.deepcopy(model.state_dict())
    losses = tune_compressed(model, text(model), steps=6, lr=1e-2)
    assert losses[-1] < losses[1]
    assert not model.lm_head.weight.equal(before["lm_head.weight"])
    assert not sites(model)[0].experts.ce_hidden.equal(torch.ones_like(sites(model)[0].experts.ce_hidden))


def test_saved_and_opened(tmp_path: Path) -> None:
    model = install_compressed(model_of("qwen3_moe"), 2)
    tune_compressed(model, text(model), steps=2, lr=1e-2)
    save_own_model(model, tmp_path / "out")
    again = load_own(tmp_path / "out")
    assert logits(again).equal(logits(model))
    copied = copy.deepcopy(again)
    with torch.no_grad():
        sites(again)[0].experts.ce_gate.zero_()
    assert logits(copied).equal(logits(model)), "a copy has vectors of its own"


def test_with_fewer_experts_of_each_layer(tmp_path: Path) -> None:
    source = saved(tmp_path, "qwen3_moe")
    plan = plan_of(source, {0: (0, 3, 5), 1: (1, 2, 4, 6)})
    model = install_compressed(load_own(save_own(plan, source, tmp_path / "shrunk")), 1)
    assert [tuple(site.experts.ce_up.shape) for site in sites(model)] == [(3, 32), (4, 32)]
    tune_compressed(model, text(model), steps=2, lr=1e-2)
    save_own_model(model, tmp_path / "out")
    assert logits(load_own(tmp_path / "out")).equal(logits(model))


def test_refusals(tmp_path: Path) -> None:
    model = model_of("qwen3_moe")
    for count in (0, 4):
        with pytest.raises(ConfigError, match="1 to 3 can be compressed"):
            install_compressed(model, count)
    install_compressed(model, 1)
    with pytest.raises(ConfigError, match="already"):
        install_compressed(model, 1)
    with pytest.raises(ConfigError, match="0 vectors"):
        tune_compressed(model_of("olmoe"), text(model))
    with pytest.raises(ConfigError, match="0 batches"):
        tune_compressed(model, [])
    plain = tiny_model("nemotron_h", num_experts_per_tok=4, topk_group=2)
    with pytest.raises(UnsupportedFamilyError, match="no gate"):
        install_compressed(plain, 1)
    assert not any(name.rpartition(".")[2] in VECTORS for name, _ in plain.named_parameters())
    ours = load(saved(tmp_path, "qwen3_moe"))
    install(ours, MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8))
    assert moe_layers(ours)
    with pytest.raises(ConfigError, match="ours"):
        install_compressed(ours, 1)
