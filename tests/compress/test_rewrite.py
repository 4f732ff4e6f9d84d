"""Rewriting: the pruned checkpoint loads cleanly and computes what the original does without the dropped experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from collegium.compress import rewrite
from collegium.compress.mask import apply_mask
from collegium.compress.rewrite import apply_plan
from collegium.compress.rewrite_layout import lay_out
from collegium.errors import UnsupportedFamilyError
from collegium.layer import moe_layers
from collegium.models import MoEConfig, install, load, save
from collegium.models.checkpoint import open_checkpoint, read_header
from collegium.models.shards import shards, write_shards
from collegium.models.summary import summarize
from pruning import KEEPS, logits, plan_of, saved
from tiny import SEAM, families, model_class, seam_model_type, tiny_model

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "olmoe": {"norm_topk_prob": False},
    "qwen2_moe": {},  # shared experts, softmax over all
    "qwen3_moe": {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    "deepseek_v2": {"num_hidden_layers": 3},  # groups by their best expert
    "deepseek_v3": {"num_hidden_layers": 3},  # groups by their two best experts, correction bias
    "gpt_oss": {},  # fused and transposed, biases everywhere
    "granitemoe": {},  # fused under other names
    "glm4_moe": {"num_hidden_layers": 3},
    "ernie4_5_moe": {"num_hidden_layers": 3},  # a correction bias [1, E]
    "minimax_m2": {},
    "lfm2_moe": {},  # expert_bias
}


def opened(folder: Path) -> Any:
    """The model in `folder`, every key of which was found in its place."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    as_bytes = [
        {n: (t.dtype, t.shape, t.contiguous().view(-1).view(torch.uint8)) for n, t in x.items()} for x in (a, b)
    ]
    return a.keys() == b.keys() and all(
        as_bytes[0][n][:2] == as_bytes[1][n][:2] and torch.equal(as_bytes[0][n][2], as_bytes[1][n][2]) for n in a
    )


@pytest.mark.parametrize("family", families(*FAMILIES))
def test_the_pruned_model_is_the_original_without_those_experts(tmp_path: Path, family: str) -> None:
    source = saved(tmp_path, family, **FAMILIES[family])
    plan = plan_of(source)
    out = apply_plan(plan, source, tmp_path / "out")
    pruned, whole = opened(out), opened(source)
    with apply_mask(whole, plan):
        torch.testing.assert_close(logits(pruned), logits(whole), rtol=0, atol=1e-5)
    difference = (logits(pruned) - logits(whole)).abs().max()
    assert difference > 1e-3, "the dropped experts made no difference"
    torch.testing.assert_close(logits(pruned), logits(whole, plan), rtol=0, atol=1e-5)
    assert {layer.num_experts for layer in summarize(open_checkpoint(out)).moe_layers} == {4}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_experts_stored_as_they_are_in_memory(tmp_path: Path, family: str) -> None:
    source = saved(tmp_path, family, fused=True, **FAMILIES[family])
    plan = plan_of(source)
    pruned = opened(apply_plan(plan, source, tmp_path / "out"))
    torch.testing.assert_close(logits(pruned), logits(opened(source), plan), rtol=0, atol=1e-5)


REFUSED = {
    "deepseek_v4": "tid2eid",  # a table from tokens to experts
    "ernie4_5_vl_moe": "fewer than would be kept",  # experts for text and for vision under one count
    "inkling": "no router weight",  # its router has rows for shared experts
    "zaya": "no router weight",  # its router is a network with a class for no expert
}
"""Family -> what its refusal names."""


@pytest.mark.slow
@pytest.mark.parametrize(("family", "experts_class"), SEAM, ids=[f"{f}-{c}" for f, c in SEAM])
def test_any_family_is_pruned_or_refused_by_name(tmp_path: Path, family: str, experts_class: str) -> None:
    whole = tiny_model(seam_model_type(family, experts_class))
    source, out = tmp_path / "source", tmp_path / "out"
    whole.save_pretrained(source)
    plan = plan_of(source)
    if family in REFUSED:
        with pytest.raises(UnsupportedFamilyError, match=REFUSED[family]):
            apply_plan(plan, source, out)
        assert not out.exists()
        return
    apply_plan(plan, source, out)
    (_, report), (pruned, same_report) = (
        model_class(whole.config).from_pretrained(folder, output_loading_info=True) for folder in (source, out)
    )
    assert same_report == report
    assert not same_report["mismatched_keys"]
    with apply_mask(whole, plan):
        torch.testing.assert_close(logits(pruned.eval()), logits(whole), rtol=0, atol=1e-5)


def test_a_multimodal_wrapper_keeps_its_tower_and_its_text_config_follows(tmp_path: Path) -> None:
    source = saved(tmp_path, "qwen3_vl_moe")
    out = apply_plan(plan_of(source), source, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert 4 in (config["text_config"].get("num_experts"), config["text_config"].get("num_local_experts"))
    old, new = tensors(source), tensors(out)
    towers = [name for name in old if "visual" in name]
    assert towers
    assert same({n: old[n] for n in towers}, {n: new[n] for n in towers})
    auto = model_class(tiny_model("qwen3_vl_moe").config)
    report = auto.from_pretrained(out, output_loading_info=True)[1]
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_model_with_moe_blocks_of_ours(tmp_path: Path) -> None:
    settings = MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, selection_bias=True)
    model = install(tiny_model("qwen3"), settings)
    for moe in moe_layers(model):
        moe.reset_parameters(0.3)
    save(model, tmp_path / "source")
    plan = plan_of(tmp_path / "source")
    pruned = load(apply_plan(plan, tmp_path / "source", tmp_path / "out"))
    assert [len(moe.gate.weight) for moe in moe_layers(pruned)] == [4, 4]
    gates = zip(moe_layers(model), moe_layers(pruned), plan.layers, strict=True)
    assert all(torch.equal(old.gate.weight[list(one.keep)], new.gate.weight) for old, new, one in gates)


@pytest.mark.parametrize("fused", [False, True])
def test_a_plan_that_keeps_all_changes_no_byte(tmp_path: Path, fused: bool) -> None:
    source = saved(tmp_path, "deepseek_v3", fused=fused)
    out = apply_plan(plan_of(source, {1: range(8)}), source, tmp_path / "out")
    assert same(tensors(source), tensors(out))
    assert open_checkpoint(out).fingerprint == open_checkpoint(source).fingerprint
    assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_every_kept_tensor_is_the_old_one_byte_for_byte(tmp_path: Path) -> None:
    source = saved(tmp_path, "qwen2_moe")
    old, new = tensors(source), tensors(apply_plan(plan_of(source), source, tmp_path / "out"))
    expected = {}
    for name, tensor in old.items():
        parts = name.split(".")
        if "experts" in parts:
            keep = KEEPS[int(parts[2])]
            if int(parts[5]) in keep:
                parts[5] = str(keep.index(int(parts[5])))
                expected[".".join(parts)] = tensor
        else:
            expected[name] = tensor[list(KEEPS[int(parts[2])])] if ".mlp.gate." in name else tensor
    assert same(new, expected)


def quantised(root: Path) -> Path:
    """An OLMoE whose experts are float8 with block scales, one of them left alone, as a quantiser writes it."""
    folder = saved(root, "olmoe")
    old, new = tensors(folder), {}
    for name, tensor in old.items():
        new[name] = tensor.to(torch.bfloat16)
        if ".experts." in name and ".experts.3.up" not in name:
            new[name] = tensor.to(torch.float8_e4m3fn)
            new[f"{name}_scale_inv"] = torch.rand(1, 1)
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    alone = [f"model.layers.{layer}.mlp.experts.{e}.up_proj" for layer in range(2) for e in (3, 4)]
    config["quantization_config"] = {
        "quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", *alone]
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_quantised_experts_move_with_their_scales_and_their_names_in_the_config_follow(tmp_path: Path) -> None:
    source = quantised(tmp_path)
    out = apply_plan(plan_of(source), source, tmp_path / "out")
    old, new = tensors(source), tensors(out)
    for layer in range(2):
        for e, before in enumerate(KEEPS[layer]):
            stems = [f"model.layers.{layer}.mlp.experts.{i}." for i in (before, e)]
            mine = {n.removeprefix(stems[0]): t for n, t in old.items() if n.startswith(stems[0])}
            assert len(mine) == (5 if before == 3 else 6)
            assert same(mine, {n.removeprefix(stems[1]): t for n, t in new.items() if n.startswith(stems[1])})
    skipped = json.loads((out / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert skipped == ["lm_head", "model.layers.0.mlp.experts.1.up_proj", "model.layers.1.mlp.experts.2.up_proj"]


def test_packed_fused_experts_move_as_bytes(tmp_path: Path) -> None:
    source = saved(tmp_path, "gpt_oss")
    old = tensors(source)
    new = {}
    for name, tensor in old.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            new[f"{name}_blocks"] = torch.randint(256, (8, tensor.shape[2], 1, 16), dtype=torch.uint8)
            new[f"{name}_scales"] = torch.randint(256, (8, tensor.shape[2], 1), dtype=torch.uint8)
        else:
            new[name] = tensor
    save_file(new, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (source / "config.json").write_text(json.dumps(config))
    written = tensors(apply_plan(plan_of(source), source, tmp_path / "out"))
    keep = list(KEEPS[1])
    for name in ("gate_up_proj_blocks", "down_proj_scales", "gate_up_proj_bias"):
        full = f"model.layers.1.mlp.experts.{name}"
        assert torch.equal(written[full], new[full][keep])
    assert torch.equal(written["model.layers.1.mlp.router.bias"], new["model.layers.1.mlp.router.bias"][keep])


def test_what_is_beside_the_weights(tmp_path: Path) -> None:
    source = saved(tmp_path, "olmoe")
    beside = {
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ x }}",
        "additional_chat_templates/tool.jinja": "t",
        "README.md": "---\nlicense: mit\n---\n# Mine\n",
        "pytorch_model.bin": "w",
        ".hidden": "h",
        "original/params.json": "",
    }
    for name, text in beside.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    plan = plan_of(source, model="/a/place/mine", data=("letters",))
    out = apply_plan(plan, source, tmp_path / "out")
    for name in ("tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"):
        assert (out / name).read_text() == beside[name]
    assert (out / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    assert not any((out / name).exists() for name in ("pytorch_model.bin", ".hidden", "original"))
    card = (out / "README.md").read_text()
    assert card.startswith(beside["README.md"])
    for fact in ("4 of the 8 experts of `mine`", "`every second` on letters", "collegium_edit.json"):
        assert fact in card
    assert "/a/place" not in card
    edit = json.loads((out / "collegium_edit.json").read_text())
    assert edit["maps"] == {"0": list(KEEPS[0]), "1": list(KEEPS[1])}
    assert edit["source"] == {"model": "mine", "fingerprint": open_checkpoint(source).fingerprint}
    assert edit["fingerprint"] == open_checkpoint(out).fingerprint
    assert edit["plan"] == plan.model_dump(mode="json")


def test_pruning_twice_is_pruning_once_and_the_first_edit_is_remembered(tmp_path: Path) -> None:
    source = saved(tmp_path, "olmoe")
    first = apply_plan(plan_of(source, {0: range(1, 7), 1: range(2, 8)}), source, tmp_path / "first")
    second = apply_plan(plan_of(first, {0: (0, 4), 1: (3, 5)}), first, tmp_path / "second")
    once = apply_plan(plan_of(source, {0: (1, 5), 1: (5, 7)}), source, tmp_path / "once")
    assert same(tensors(second), tensors(once))
    edit = json.loads((second / "collegium_edit.json").read_text())
    assert edit["previous"] == json.loads((first / "collegium_edit.json").read_text())


def test_shards_in_and_shards_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    plan = plan_of(tmp_path / "one")
    whole = apply_plan(plan, tmp_path / "one", tmp_path / "whole")
    monkeypatch.setattr(rewrite, "shards", lambda pieces: shards(pieces, 15_000))
    seen = []
    cut = apply_plan(plan, tmp_path / "many", tmp_path / "cut", progress=lambda *step: seen.append(step))
    files = sorted(cut.glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 15_000 + 5_000 for file in files)
    assert same(tensors(whole), tensors(cut))
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(cut).keys()
    assert index["metadata"]["total_size"] == seen[-1][0] == seen[-1][1]
    torch.testing.assert_close(logits(opened(cut)), logits(opened(whole)), rtol=0, atol=0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_rows_of_any_dtype(tmp_path: Path, data: st.DataObject) -> None:
    E = data.draw(st.integers(1, 9))
    keep = tuple(sorted(data.draw(st.sets(st.integers(0, E - 1), min_size=1))))
    dtypes = st.sampled_from([np.uint8, np.float16, np.float32, np.float64])
    shape = (E, *data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    random = np.random.default_rng(0)
    arrays = {
        "layers.0.experts.gate_up_proj": random.integers(0, 99, shape).astype(data.draw(dtypes)),
        "layers.0.router.weight": random.random((E, 3)).astype(data.draw(dtypes)),
        "layers.0.router.bias": random.random(E).astype(data.draw(dtypes)),
        "layers.0.moe_statics.e_score_correction_bias": random.random((1, E)).astype(data.draw(dtypes)),
        "norm.weight": random.random(5).astype(data.draw(dtypes)),
    }
    source, out = tmp_path / "in", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir(exist_ok=True)
    save_file({name: torch.from_numpy(a) for name, a in arrays.items()}, source / "model.safetensors")
    pieces, dropped = lay_out(read_header(source / "model.safetensors"), E, {("layers", 0): keep})
    assert dropped == []
    write_shards(shards(pieces), source, out)
    written = load_file(out / "model.safetensors")
    rows = list(keep)
    for name, array in arrays.items():
        cut = array if name.startswith("norm") else array[:, rows] if "statics" in name else array[rows]
        assert written[name].numpy().tobytes() == cut.tobytes()
        assert written[name].shape == cut.shape
    for info in read_header(out / "model.safetensors").values():
        assert info.offset % (info.nbytes // info.numel) == 0
