"""Finding MoE blocks, and the names of their tensors on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from collegium.errors import NotMoEError, UnsupportedFamilyError
from collegium.layer import MoE
from collegium.sites import Site, sites
from collegium.sites.families import SINCE
from tiny import families, needs, tiny_model


def test_a_block_is_described() -> None:
    model = tiny_model("deepseek_v3", num_hidden_layers=3)
    found = sites(model)
    assert [(s.layer, s.path) for s in found] == [(1, "model.layers.1.mlp"), (2, "model.layers.2.mlp")]
    site, block = found[1], model.model.layers[2].mlp
    assert (site.block, site.gate, site.experts, site.shared) == (
        block,
        block.gate,
        block.experts,
        (block.shared_experts,),
    )
    assert (site.num_experts, site.top_k, site.family, site.score) == (8, 2, "deepseek_v3", "sigmoid")
    assert not site.scales_input


@needs("dots3_note")
def test_layers_may_differ_in_experts_and_slots() -> None:
    layers = {
        0: {"num_local_experts": 4, "num_experts_per_tok": 1},
        1: {"num_local_experts": 6, "num_experts_per_tok": 3},
    }
    sparse = ["sparse", "sparse"]
    model = tiny_model("dots3_note_vision_encoder", adapter_in_dim=32, mlp_layer_types=sparse, per_layer_config=layers)
    assert [(s.num_experts, s.top_k) for s in sites(model)] == [(4, 1), (6, 3)]


@pytest.mark.parametrize(
    ("model_type", "paths"),
    [
        ("qwen3_vl_moe", ["model.language_model.layers.0.mlp", "model.language_model.layers.1.mlp"]),
        ("gemma4", ["model.language_model.layers.0", "model.language_model.layers.1"]),
        ("llama4", ["language_model.model.layers.0.feed_forward", "language_model.model.layers.1.feed_forward"]),
        (
            "ernie4_5_vl_moe",
            ["model.language_model.layers.1.mlp.text_moe", "model.language_model.layers.1.mlp.vision_moe"],
        ),
    ],
)
def test_multimodal_models(model_type: str, paths: list[str]) -> None:
    found = sites(tiny_model(model_type))
    assert [s.path for s in found] == paths
    assert {s.family for s in found} == {f"{model_type}_text"}


@pytest.mark.parametrize(
    ("model_type", "shared"),
    [
        pytest.param("granitemoeshared", "shared_mlp", marks=needs("granitemoeshared")),
        ("qwen2_moe", "shared_expert"),
        ("mixtral", None),
    ],
)
def test_shared_experts_are_found_in_or_beside_the_block(model_type: str, shared: str | None) -> None:
    model = tiny_model(model_type)
    for site, layer in zip(sites(model), model.model.layers, strict=True):
        beside = [m for name, m in layer.named_modules() if name.rpartition(".")[2] == shared]
        assert list(site.shared) == beside
        assert len(beside) == (shared is not None)


def test_rewritten_classes_are_still_found() -> None:
    model = tiny_model("olmoe")
    for module in [m for m in model.modules() if "Experts" in type(m).__name__ or "Moe" in type(m).__name__]:
        module.__class__ = type("Patched", (type(module),), {})
    assert len(sites(model)) == 2


def test_our_own_layer_alone_and_in_a_model() -> None:
    alone = sites(MoE(16, 8, 4, 2))
    assert [(s.path, s.num_experts, s.top_k, s.family, s.score) for s in alone] == [("", 4, 2, "collegium", "softmax")]
    assert alone[0].checkpoint_names(3)["down_proj"] == "experts.down_proj"
    model = tiny_model("llama")
    model.model.layers[1].mlp = MoE(32, 8, 4, 2, shared=8, router={"score": "sigmoid"})
    (site,) = sites(model)
    assert (site.layer, site.path, site.family, site.score) == (1, "model.layers.1.mlp", "llama", "sigmoid")
    assert site.shared == (model.model.layers[1].mlp.shared_experts,)
    for name in site.checkpoint_names(0).values():
        assert name in model.state_dict()


def test_a_dense_model_is_told_what_to_do() -> None:
    with pytest.raises(NotMoEError, match=r"LlamaForCausalLM \(model type 'llama'\).*'gate' or 'router'.*install"):
        sites(tiny_model("llama"))
    with pytest.raises(NotMoEError):
        sites(tiny_model("doge", is_moe=False))


DBRX: dict[str, Any] = {
    "d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 64,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("dbrx", DBRX),
        ("doge", {"is_moe": True, "num_experts": 16}),
        ("jetmoe", {"kv_channels": 8}),
        ("longcat_flash", {"ffn_hidden_size": 24, "expert_ffn_hidden_size": 16, "zero_expert_num": 2, "moe_topk": 2}),
        pytest.param("step3p5", {"mlp_layer_types": ["dense", "sparse"]}, marks=needs("step3p5")),
        pytest.param("step3p7", {"text_config": {"mlp_layer_types": ["dense", "sparse"]}}, marks=needs("step3p7")),
        ("vitpose_backbone", {"num_experts": 2, "part_features": 8}),
    ],
)
def test_families_out_of_reach_are_named(model_type: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedFamilyError, match=repr(model_type)):
        sites(tiny_model(model_type, **settings))


@pytest.mark.parametrize("family", sorted(SINCE))
def test_a_family_behind_the_interface_later_is_refused_with_a_way_out(family: str) -> None:
    """Its older experts are known by what they lack; a newer release's, made to lack it too, stand for them here."""
    model = tiny_model(family)
    for module in model.modules():
        if "Experts" in type(module).__name__:
            module.__class__ = type("OldExperts", (nn.Module,), {"__module__": "transformers.old"})
    with pytest.raises(UnsupportedFamilyError, match=rf"'{family}.*since release {SINCE[family]}.*upgrade"):
        sites(model)


def test_a_block_of_an_unknown_kind_is_named() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = nn.ModuleDict({"gate": nn.Linear(32, 4), "experts": nn.ModuleList([nn.Identity()])})
    with pytest.raises(UnsupportedFamilyError, match=r"'model.layers.1.mlp'.*family 'llama'.*ModuleList"):
        sites(model)


def parts(site: Site, expert: int) -> dict[str, torch.Tensor]:
    """The matrices of one expert as they are in memory, under the keys that the site gives on disk."""
    experts: Any = site.experts
    if isinstance(experts, nn.ModuleDict):
        named = experts[f"expert_{expert}"].named_parameters()
        return {name.removesuffix(".weight").replace(".", "_"): p for name, p in named}
    memory = {name: p[expert] for name, p in experts.named_parameters()}
    if "gate_up_proj" in memory and memory["gate_up_proj"].dim() == 2:
        half = memory["gate_up_proj"].shape[0] // 2
        memory |= {"gate_proj": memory["gate_up_proj"][:half], "up_proj": memory["gate_up_proj"][half:]}
    return memory


APART = ["deepseek_v3", "deepseek_v4", "ernie4_5_vl_moe", "jamba", "lfm2_moe", "mixtral", "nemotron_h", "qwen3_moe",
         "mistral_large4", "nllb-moe", "switch_transformers"]  # fmt: skip
TOGETHER = ["aria", "gemma4_text", "glm4v_moe_text", "gpt_oss", "granitemoe", "llama4_text", "qwen3_vl_moe"]


@pytest.mark.parametrize("model_type", families(*APART, *TOGETHER))
def test_names_and_values_on_disk(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for site in sites(model):
            for expert in (0, 5):
                names = site.checkpoint_names(expert)
                in_memory = parts(site, expert)
                for key, name in names.items():
                    on_disk = file.get_tensor(name)
                    on_disk = on_disk[expert] if model_type in TOGETHER else on_disk
                    assert torch.equal(on_disk, in_memory[key]), name
            shared_names = set(site.checkpoint_names(0).values()) & set(site.checkpoint_names(1).values())
            assert bool(shared_names) == (model_type in TOGETHER)


def test_a_loaded_model_has_the_names_it_was_loaded_from(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    site = sites(model)[1]
    wrapped = sites(nn.ModuleDict({"policy": model}))[1]
    assert wrapped.path == f"policy.{site.path}"
    assert (
        wrapped.checkpoint_names(3)
        == site.checkpoint_names(3)
        == {
            "gate_proj": "model.layers.1.block_sparse_moe.experts.3.w1.weight",
            "up_proj": "model.layers.1.block_sparse_moe.experts.3.w3.weight",
            "down_proj": "model.layers.1.block_sparse_moe.experts.3.w2.weight",
        }
    )


def test_there_is_no_name_for_an_expert_that_is_not_there() -> None:
    site = sites(tiny_model("mixtral"))[0]
    with pytest.raises(IndexError, match="experts 0 to 7, not 8"):
        site.checkpoint_names(8)
