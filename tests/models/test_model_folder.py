"""Saving and loading: nothing changes on the way, and damaged, foreign or dangerous folders are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from collegium.balance import BalanceConfig
from collegium.errors import CheckpointError, ConfigError, NonFiniteError, RemoteCodeError
from collegium.layer import after_step, moe_layers
from collegium.models import MoEConfig, install, load, save
from tiny import tiny_inputs, tiny_model

SETTINGS = MoEConfig(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    n_shared_experts=1,
    scoring_func="sigmoid",
    first_k_dense_replace=1,
    balance=BalanceConfig(bias_update_rate=1e-2, scope="sequence"),
)


def fresh(family: str = "llama", **overrides):
    """A model with MoE blocks whose selection bias has moved."""
    model = install(tiny_model(family, num_hidden_layers=3, **overrides), SETTINGS).train()
    model(**tiny_inputs(model))
    after_step(model, 0)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(model)).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gpt_oss"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_fresh_model_comes_back_bit_identical(tmp_path: Path, family: str, tied: bool) -> None:
    model = fresh(family, tie_word_embeddings=tied)
    model.generation_config.max_new_tokens = 7
    save(model, tmp_path / "m")
    again = load(tmp_path / "m")
    assert logits(again).equal(logits(model))
    assert not again.training
    assert again.generation_config.max_new_tokens == 7
    assert again.config.collegium == model.config.collegium
    assert again.config.model_type == family
    assert [m.balance.config for m in moe_layers(again)] == [SETTINGS.balance] * 2
    theirs, ours = dict(again.named_parameters()), dict(model.named_parameters())
    assert list(theirs) == list(ours)  # optimizer states are stored by these names
    assert (again.get_input_embeddings().weight is again.lm_head.weight) == tied


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "ernie4_5_moe", "minimax_m2", "qwen2_moe"])
def test_a_wrapped_model_comes_back_and_stays_a_plain_folder(tmp_path: Path, family: str) -> None:
    model = install(tiny_model(family), balance=BalanceConfig(load_balancing=0.5))
    save(model, tmp_path / "m")
    again = load(tmp_path / "m")
    assert logits(again).equal(logits(model))
    assert [m.balance.config.load_balancing for m in moe_layers(again)] == [0.5] * len(moe_layers(model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-6)


def test_a_plain_folder_opens(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    save(model, tmp_path / "m")
    again = load(tmp_path / "m", experts_implementation="eager")
    assert again.config._experts_implementation == "eager"
    assert moe_layers(again) == []
    torch.testing.assert_close(logits(again), logits(model))


def test_dtype_is_kept_or_chosen_and_the_selection_bias_stays_float32(tmp_path: Path) -> None:
    model = fresh().to(torch.bfloat16)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.dtype == torch.bfloat16
    # logits would differ: a cast rounds the rotary frequencies too, which loading computes afresh
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].equal(tensor), name
    bias = moe_layers(again)[0].gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert bias.equal(moe_layers(model)[0].gate.e_score_correction_bias)
    assert bias.abs().min() > 0
    assert load(tmp_path / "m", dtype=torch.float32, device="cpu").dtype == torch.float32


def test_a_folder_that_transformers_wrote_opens_too(tmp_path: Path) -> None:
    model = fresh()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert logits(load(tmp_path)).equal(logits(model))


def test_plain_transformers_refuses_a_folder_with_fresh_blocks(tmp_path: Path) -> None:
    save(fresh(), tmp_path / "m")
    with pytest.raises(ValueError, match="CollegiumConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_saving_replaces_a_model_folder_and_nothing_else(tmp_path: Path) -> None:
    model = fresh()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is no model folder"):
        save(model, tmp_path / "notes")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"
    save(model, tmp_path / "m")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    save(model, tmp_path / "m")
    assert logits(load(tmp_path / "m")).abs().max() == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "notes"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(fresh(), tmp_path / "m")
    return tmp_path / "m"


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


EXPERT = "model.layers.1.mlp.experts.down_proj"


def test_missing_and_unexpected_tensors_are_both_listed(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.extra": t.pop(EXPERT)}))
    with pytest.raises(CheckpointError, match=rf"missing tensors {EXPERT}, unexpected tensors model\.extra"):
        load(folder)


def test_missing_tensors_of_a_plain_folder_are_refused_too(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path / "m")
    edit_tensors(tmp_path / "m", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load(tmp_path / "m")


def test_another_shape_is_refused(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({EXPERT: t[EXPERT][:3].clone()}))
    with pytest.raises(CheckpointError, match=rf"{EXPERT}.*\[3, 32, 16\].*\[4, 32, 16\]"):
        load(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(folder: Path, bad: float) -> None:
    edit_tensors(folder, lambda t: t[EXPERT].view(-1)[5].fill_(bad))
    with pytest.raises(NonFiniteError, match=EXPERT):
        load(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder)


def test_code_of_the_checkpoint_is_never_run(folder: Path) -> None:
    proof = folder.parent / "proof"
    (folder / "evil.py").write_text(f"open({str(proof)!r}, 'w').close()\n")
    edit_config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(RemoteCodeError, match="execute code"):
        load(folder)
    edit_config(folder, model_type="llama")  # a family that transformers knows: its own class is used
    assert type(load(folder)).__name__ == "LlamaForCausalLM"
    assert not proof.exists()


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"version": 2}, "version"),
        ({"moe": {"num_experts": 4}}, "moe"),
        ({"layers": [99]}, "99"),
        ({"base": "no_such_family"}, "describes no model"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_section_that_does_not_fit_is_refused(folder: Path, section: dict, says: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, collegium=config["collegium"] | section)
    with pytest.raises(CheckpointError, match=says):
        load(folder)


def test_no_folder_and_no_config(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match=str(path)):
            load(path)
