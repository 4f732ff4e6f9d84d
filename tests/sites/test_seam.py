"""Registering with transformers, expert parallelism's local ids, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from collegium.errors import ModelError
from collegium.sites import register, seam, sites
from collegium.sites.seam import NAME, experts_forward
from tiny import tiny_inputs, tiny_model


def test_importing_collegium_loads_neither_torch_nor_transformers() -> None:
    code = "import collegium, sys; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registering_twice_changes_nothing() -> None:
    register()
    keys = set(ALL_EXPERTS_FUNCTIONS.keys())
    register()
    assert set(ALL_EXPERTS_FUNCTIONS.keys()) == keys
    assert ALL_EXPERTS_FUNCTIONS[NAME] is experts_forward


def test_quantised_experts_are_refused_with_a_way_out() -> None:
    register()
    forward = ALL_FP8_EXPERTS_FUNCTIONS.get_interface(NAME, None)
    with pytest.raises(ModelError, match=r"Identity holds FP8.*dequantize=True"):
        forward(torch.nn.Identity(), torch.zeros(1, 2), torch.zeros(1, 1), torch.zeros(1, 1))


@torch.no_grad()
def test_ranks_of_expert_parallelism_add_up_to_the_whole() -> None:
    """Two halves of the experts, each told the other's assignments by the sentinel id, as a rank is."""
    register()
    model = tiny_model("qwen3_moe", num_experts=8)
    experts = sites(model)[0].experts
    x, index, weight = torch.randn(20, 32), torch.rand(20, 8).topk(3).indices, torch.rand(20, 3)
    experts.config._experts_implementation = "eager"
    expected = experts(x, index, weight)
    experts.config._experts_implementation = NAME
    whole = {name: parameter.data for name, parameter in experts.named_parameters()}
    total = torch.zeros_like(x)
    for rank in range(2):
        for name, parameter in experts.named_parameters():
            parameter.data = whole[name][4 * rank : 4 * rank + 4]
        experts.num_experts, experts._is_expert_parallel = 4, True
        mine = index // 4 == rank
        total += experts(x, torch.where(mine, index - 4 * rank, 4), weight * mine)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["olmoe", "qwen3_vl_moe"])
def test_selected_on_loading_or_later(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    model = tiny_model(model_type)
    inputs = tiny_inputs(model)
    model.save_pretrained(tmp_path)
    model.set_experts_implementation("eager")
    expected = model(**inputs)[0]
    calls: list[int] = []
    monkeypatch.setattr(seam, "compute", lambda *args, real=seam.compute: calls.append(1) or real(*args))
    model.set_experts_implementation(NAME)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation=NAME)
    for one in (model, loaded):
        torch.testing.assert_close(one(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2 * len(sites(model))


@torch.no_grad()
def test_generation_keeps_our_implementation_and_the_tokens() -> None:
    register()
    model = tiny_model("mixtral")
    inputs = tiny_inputs(model)
    tokens = {}
    for name in ("eager", NAME):
        model.set_experts_implementation(name)
        tokens[name] = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert model.config._experts_implementation == name
    assert torch.equal(tokens["eager"], tokens[NAME])
