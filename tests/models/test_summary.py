"""Summaries: counts from names and headers equal counts of the live model, for the families transformers has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from collegium.errors import CheckpointError, RemoteCodeError
from collegium.models import MoEConfig, install, save
from collegium.models.checkpoint import open_checkpoint
from collegium.models.summary import part_of, summarize
from collegium.sites import sites
from tiny import families, tiny_model

FAMILIES = [
    "afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v4", "ernie4_5_moe", "gemma4_text", "glm4_moe", "gpt_oss",
    "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "jamba", "laguna", "lfm2_moe", "llama4_text",
    "minimax_m2", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe",
    "qwen3_vl_moe", "solar_open",
]  # fmt: skip


def direct_counts(model: PreTrainedModel) -> tuple[int, int]:
    """``(total, active)``: of each site's experts a token uses K of E."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for site in sites(model):
        own = sum(p.numel() for p in site.experts.parameters() if p.dim() > 1)
        idle += own * (site.num_experts - site.top_k) // site.num_experts
    return total, total - idle


@pytest.mark.parametrize("family", families(*FAMILIES))
def test_counts_are_those_of_the_live_model(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    found = sites(model)
    model.save_pretrained(tmp_path)
    summary = summarize(open_checkpoint(tmp_path))
    assert summary.source == "headers"
    total, active = direct_counts(model)
    assert summary.parameters == total
    assert summary.active_parameters == active
    assert [layer.num_experts for layer in summary.moe_layers] == [site.num_experts for site in found]
    assert [layer.top_k for layer in summary.moe_layers] == [site.top_k for site in found]
    assert [layer.layer for layer in summary.moe_layers] == [site.layer for site in found]
    assert summary.score == found[0].score
    assert (summary.shared_experts > 0) == any(site.shared for site in found)
    assert summary.nbytes == sum(info.nbytes for info in open_checkpoint(tmp_path).tensors.values())

    (tmp_path / "model.safetensors").unlink()
    predicted = summarize(open_checkpoint(tmp_path))
    assert predicted.source == "predicted"
    assert (predicted.parameters, predicted.active_parameters) == (total, summary.active_parameters)
    assert {part: n for part, (n, _) in predicted.parts.items()} == {part: n for part, (n, _) in summary.parts.items()}


def test_parts_add_up_and_are_what_they_say(tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe", num_hidden_layers=3, mlp_only_layers=[0])
    model.save_pretrained(tmp_path)
    summary = summarize(open_checkpoint(tmp_path))
    block = model.model.layers[1].mlp

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    parts = {part: n for part, (n, _) in summary.parts.items()}
    assert parts["experts"] == 2 * count(block.experts)
    assert parts["shared_experts"] == 2 * (count(block.shared_expert) + count(block.shared_expert_gate))
    assert parts["router"] == 2 * count(block.gate)
    assert parts["dense"] == count(model.model.layers[0].mlp)
    assert parts["attention"] == 3 * count(model.model.layers[0].self_attn)
    assert parts["embedding"] == count(model.model.embed_tokens) + count(model.lm_head)
    assert sum(parts.values()) == summary.parameters
    layer = summary.moe_layers[0]
    assert layer.expert_parameters == count(block.experts) // 8
    assert layer.expert_nbytes == 4 * layer.expert_parameters
    assert layer.parameters == count(model.model.layers[1])
    assert layer.active_parameters == layer.parameters - 6 * layer.expert_parameters
    assert [entry.layer for entry in summary.moe_layers] == [1, 2]
    assert summary.num_layers == 3


def test_a_model_of_ours_with_its_own_settings(tmp_path: Path) -> None:
    settings = MoEConfig(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1,
                         scoring_func="sigmoid", first_k_dense_replace=1, selection_bias=True)  # fmt: skip
    model = install(tiny_model("llama", num_hidden_layers=3), settings)
    save(model, tmp_path / "m")
    summary = summarize(open_checkpoint(tmp_path / "m"))
    assert (summary.parameters, summary.active_parameters) == direct_counts(model)
    assert [(e.layer, e.num_experts, e.top_k) for e in summary.moe_layers] == [(1, 6, 2), (2, 6, 2)]
    assert (summary.score, summary.shared_experts, summary.expert_width) == ("sigmoid", 1, 16)
    (tmp_path / "m" / "model.safetensors").unlink()
    predicted = summarize(open_checkpoint(tmp_path / "m"))
    assert (predicted.source, predicted.parameters) == ("predicted", summary.parameters)
    assert predicted.active_parameters == summary.active_parameters


def test_a_dense_model_is_no_error(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    summary = summarize(open_checkpoint(tmp_path))
    assert summary.moe_layers == ()
    assert summary.parameters == summary.active_parameters == sum(p.numel() for p in model.parameters())


def test_layers_may_differ_in_their_number_of_experts(tmp_path: Path) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    cut = {n: t for n, t in tensors.items() if "layers.1.mlp.experts" not in n or int(n.split(".")[5]) < 5}
    save_file(cut, tmp_path / "model.safetensors")
    summary = summarize(open_checkpoint(tmp_path))
    assert [layer.num_experts for layer in summary.moe_layers] == [8, 5]
    both = [layer.expert_parameters for layer in summary.moe_layers]
    assert both[0] == both[1]


def test_missing_shards_are_predicted_and_named(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    summary = summarize(open_checkpoint(tmp_path))
    assert summary.missing == (shards[1].name,)
    assert summary.source == "predicted"
    assert (summary.parameters, summary.active_parameters) == direct_counts(model)


def test_missing_shards_of_an_unknown_family_leave_what_is_there(tmp_path: Path) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing_known", "num_experts_per_tok": 2}))
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    checkpoint = open_checkpoint(tmp_path)
    summary = summarize(checkpoint)
    assert summary.source == "partial"
    assert summary.parameters == sum(info.numel for info in checkpoint.tensors.values())


@pytest.mark.parametrize("value", [None, 3, "x", [], [3], {}, {"g": 1}, {"config_groups": {"a": 3}}])
@pytest.mark.parametrize(
    "key",
    ["architectures", "quantization_config", "collegium", "text_config", "num_experts", "num_experts_per_tok",
     "num_hidden_layers", "scoring_func", "moe_intermediate_size", "n_shared_experts", "model_type"],
)  # fmt: skip
def test_odd_configs_are_no_crash(tmp_path: Path, key: str, value: object) -> None:
    save_file({"model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe", key: value}))
    assert summarize(open_checkpoint(tmp_path)).parameters == 4


def test_layers_beyond_the_config_are_kept_apart(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path)
    before = summarize(open_checkpoint(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    more = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if "layers.1." in n}
    save_file(tensors | more, tmp_path / "model.safetensors")
    after = summarize(open_checkpoint(tmp_path))
    assert after.parameters == before.parameters
    assert after.moe_layers == before.moe_layers
    assert after.extra_parameters == sum(t.numel() for n, t in more.items() if "correction_bias" not in n)


@pytest.mark.parametrize(
    ("quantization", "stored"),
    [
        ({"quant_method": "gptq", "bits": 4}, {"qweight": ("int32", [4, 24]), "scales": ("float16", [1, 24]),
                                               "qzeros": ("int32", [1, 3]), "g_idx": ("int32", [32])}),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8}}}},
         {"weight_packed": ("int32", [24, 8]), "weight_scale": ("float16", [24, 1]), "weight_shape": ("int64", [2])}),
        ({"quant_method": "fp8"}, {"weight": ("float8_e4m3fn", [24, 32]), "weight_scale_inv": ("float32", [1, 1])}),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True},
         {"weight": ("uint8", [384, 1]), "weight.absmax": ("float32", [12])}),
    ],
)  # fmt: skip
def test_quantised_weights_count_as_the_parameters_they_stand_for(tmp_path: Path, quantization, stored) -> None:
    names = [f"model.layers.0.mlp.experts.{e}.{p}_proj" for e in range(4) for p in ("gate", "up", "down")]
    tensors = {
        f"{name}.{suffix}": torch.zeros(shape, dtype=getattr(torch, dtype))
        for name in names
        for suffix, (dtype, shape) in stored.items()
    }
    config = {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "quantization_config": quantization,
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    summary = summarize(open_checkpoint(tmp_path))
    assert summary.parameters == 12 * 24 * 32
    assert summary.active_parameters == 3 * 24 * 32
    assert summary.quantization == quantization["quant_method"]
    assert summary.nbytes == sum(t.nbytes for t in tensors.values())


def test_what_cannot_be_predicted_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing_known"}))
    with pytest.raises(CheckpointError, match="cannot predict a model of type 'nothing_known'"):
        summarize(open_checkpoint(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(RemoteCodeError, match=r"evil\.Model"):
        summarize(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.3.mlp.experts.17.down_proj.weight", "experts"),
        ("model.layers.3.block_sparse_moe.experts.1.w2.weight", "experts"),
        ("model.language_model.layers.0.mlp.experts.gate_up_proj", "experts"),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", "shared_experts"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "router"),
        ("model.layers.3.mlp.gate_proj.weight", "dense"),
        ("model.layers.3.self_attn.gate.weight", "attention"),
        ("model.layers.3.mlp.router.weight", "router"),
        ("model.layers.3.input_layernorm.weight", "other"),
        ("model.visual.blocks.3.mlp.fc1.weight", "other"),
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "embedding"),
        ("transformer.blocks.3.ffn.experts.mlp.w1", "experts"),
    ],
)
def test_names_and_their_parts(name: str, part: str) -> None:
    assert part_of(name) == part
