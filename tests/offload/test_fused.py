"""Layers and routers of one token in one launch: who is taken, and that nothing else is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import continued
from torch import Tensor
from transformers import DynamicCache

from collegium.decode.kv import kv_cache
from collegium.experts.compute import stored_int8
from collegium.offload import model as offload_model
from collegium.offload.fused import _FusedLayer, _FusedRouter, fuse_routers
from collegium.offload.model import load_offloaded
from collegium.sites import sites
from tiny import families, tiny_model

pytestmark = pytest.mark.skipif(stored_int8.why_not() is not None, reason=str(stored_int8.why_not()))

SIZES = {"hidden_size": 128, "head_dim": 32, "tie_word_embeddings": False}
USUAL = ("olmoe", "qwen3_moe", "mixtral", "ernie4_5_moe", "minimax_m2", "dots1")
OTHERS = (
    "phimoe",
    "granitemoe",
    "deepseek_v3",
    "gpt_oss",
    "glm4_moe",
    "qwen2_moe",
    "flex_olmo",
    "nemotron_h",
    "hunyuan_v1_moe",
)


def saved(family: str, folder: Path) -> Path:
    sizes = SIZES if family in USUAL else {**SIZES, "head_dim": 8}  # not every family takes any
    model = tiny_model(family, **sizes)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases whose numbers matter
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.bfloat16().save_pretrained(folder)
    return folder


@torch.inference_mode()
def steps(model: Any, cache: Any) -> Tensor:
    """Logits of a prompt and of tokens one by one."""
    ids = torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(0))
    found = [model(input_ids=ids[:, :12], past_key_values=cache, use_cache=True).logits[0, -1:]]
    found += [
        model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits[0, -1:]
        for at in range(12, ids.shape[1])
    ]
    return torch.cat(found).float()


@pytest.mark.parametrize("dense_bits", [8, None])
@pytest.mark.parametrize("family", families(*USUAL, *OTHERS))
def test_a_token_is_that_of_the_familys_own_layer(
    family: str, dense_bits: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(family, tmp_path / "model")
    with load_offloaded(folder, context=64, dense_bits=dense_bits) as found:
        layers = [module for module in found.model.modules() if isinstance(module, _FusedLayer)]
        ours = [steps(found.model, make(found.model.config)) for make in (kv_cache, _dynamic)]
    monkeypatch.setattr(offload_model, "fuse_layers", lambda model, layers: 0)
    with load_offloaded(folder, context=64, dense_bits=dense_bits) as found:
        theirs = [steps(found.model, make(found.model.config)) for make in (kv_cache, _dynamic)]
    if family in USUAL:
        assert len(layers) == found.model.config.num_hidden_layers
    for one, other in zip(ours, theirs, strict=True):
        assert torch.nn.functional.cosine_similarity(one, other, -1).min() > 0.998
        assert (one - other).norm() < 0.06 * other.norm()
        assert torch.equal(one[0], other[0])  # a prompt takes the family's own way


def _dynamic(config: Any) -> DynamicCache:
    return DynamicCache(config=config)


def test_few_keys_and_hooks_go_other_ways(tmp_path: Path) -> None:
    with load_offloaded(saved("olmoe", tmp_path / "model"), context=64, dense_bits=8) as found:
        model, seen = found.model, []
        ids = torch.arange(5, 9)[None]
        with torch.inference_mode():
            whole = model(input_ids=ids).logits[0].float()
            for hooked in (False, True):
                cache = kv_cache(model.config)
                if hooked:
                    model.model.layers[1].self_attn.register_forward_hook(lambda *args: seen.append(args))
                single = [model(input_ids=ids[:, [at]], past_key_values=cache).logits[0, -1].float() for at in range(4)]
                assert torch.nn.functional.cosine_similarity(torch.stack(single), whole, -1).min() > 0.99
    assert len(seen) == 4


def test_generate_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("qwen3_moe", tmp_path / "model")
    ids = torch.randint(3, 60, (1, 20), generator=torch.Generator().manual_seed(3))
    with load_offloaded(folder, context=64) as found:
        ours = continued(found.model, ids)
    monkeypatch.setattr(offload_model, "fuse_layers", lambda model, layers: 0)
    monkeypatch.setattr(offload_model, "fuse_routers", lambda found: None)
    with load_offloaded(folder, context=64) as found:
        assert continued(found.model, ids) == ours


EXPERTS = {
    "olmoe": "num_experts",
    "qwen3_moe": "num_experts",
    "mixtral": "num_local_experts",
    "qwen2_moe": "num_experts",
}


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("adds_up", [False, True])
@pytest.mark.parametrize("experts", [16, 48])
def test_a_router_is_the_familys_own(family: str, adds_up: bool, experts: int) -> None:
    more = {} if family == "mixtral" else {"norm_topk_prob": adds_up}
    sizes = {**SIZES, "num_experts": experts, "num_local_experts": experts, "num_experts_per_tok": 3}
    model = tiny_model(family, **sizes, **more).bfloat16()
    found = sites(model)
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    gate: Any = found[0].gate
    with torch.inference_mode():
        theirs = [gate(row[None]) for row in x]
        many = gate(x)
        fuse_routers(found)
        assert isinstance(gate, _FusedRouter)
        ours = [gate(row[None]) for row in x]
        assert all(torch.equal(a, b) for a, b in zip(gate(x), many, strict=True))
    alike = 0
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
        torch.testing.assert_close(one[0], other[0], rtol=2e-2, atol=1e-2)
        same = torch.equal(one[2], other[2])
        alike += same
        if same:
            torch.testing.assert_close(one[1], other[1], rtol=2e-2, atol=1e-4)
    assert alike >= 45  # logits that round alike may come in either order


def test_nan_reaches_the_weights_with_ids_that_exist() -> None:
    model = tiny_model("olmoe", **SIZES, num_experts=16).bfloat16()
    fuse_routers(sites(model))
    with torch.inference_mode():
        _, weights, ids = sites(model)[0].gate(torch.full((1, 128), torch.nan).bfloat16())  # type: ignore[operator]
    assert weights.isnan().all()
    assert len({*ids[0].tolist()}) == ids.shape[1]
    assert 0 <= ids.min() <= ids.max() < 16


@pytest.mark.parametrize("family", families("deepseek_v3", "gpt_oss", "glm4_moe", "granitemoe"))
def test_other_routers_are_left_alone(family: str) -> None:
    model = tiny_model(family, **SIZES, n_routed_experts=16, num_local_experts=16).bfloat16()
    fuse_routers(sites(model))
    assert not any(isinstance(site.gate, _FusedRouter) for site in sites(model))
