"""Collegium's own format: what no plain checkpoint holds is written, opened and used like any model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from shrinking import batches
from transformers import AutoModelForCausalLM

from collegium.compress.collectors import collectors_for
from collegium.compress.collectors_outputs import OutputNorms
from collegium.compress.factor import factor_plan
from collegium.compress.mask import apply_mask
from collegium.compress.own import load_own, save_own_model
from collegium.compress.own_write import save_own
from collegium.compress.plan import Operator, Plan
from collegium.compress.rewrite import apply_plan
from collegium.compress.stream import calibrate
from collegium.compress.target import Target
from collegium.errors import CheckpointError, ConfigError, PlanError, StorageError, UnsupportedFamilyError
from collegium.experts.loose import LooseExperts
from collegium.layerwise import LayerwiseModel
from collegium.measure.collect import collect, weights_of
from collegium.models import load
from collegium.models.checkpoint import open_checkpoint
from collegium.models.summary import summarize
from collegium.routing import Routing
from collegium.sites import Site, register, sites, tap
from collegium.trace import record
from pruning import logits, plan_of, saved
from tiny import families, tiny_inputs

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    "olmoe": {},
    "mixtral": {"tie_word_embeddings": True},
    "gpt_oss": {},  # fused and transposed, biases everywhere
    "deepseek_v3": {"num_hidden_layers": 3},  # groups, correction bias, dense first layer
    "granitemoe": {},  # other names on disk
    "ernie4_5_moe": {"num_hidden_layers": 3},
}
UNEVEN = ((0, 3, 5, 6), (1, 2, 3, 4, 6, 7))


def uneven(folder: Path, **changes: Any) -> Plan:
    """Four experts in the first MoE layer, six in the others; two, and three, of each routing group."""
    found = [layer.layer for layer in plan_of(folder).layers]
    return plan_of(folder, {layer: UNEVEN[min(i, 1)] for i, layer in enumerate(found)}, **changes)


def changed(plan: Plan, **layer: Any) -> Plan:
    """The plan with other fields in every layer."""
    record = plan.model_dump(mode="json")
    extra = {name: value for name, value in layer.items() if name in ("operator", "router")}
    for one in record["layers"]:
        one.update({name: value for name, value in layer.items() if name not in extra})
    return Plan.model_validate_json(json.dumps(record | extra))


def width(folder: Path) -> int:
    f = Target.of(open_checkpoint(folder)).layers[0].intermediate_size
    assert f is not None
    return f


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("family", families(*FAMILIES))
def test_layers_of_several_sizes_compute_what_the_mask_does(tmp_path: Path, family: str) -> None:
    source = saved(tmp_path, family, **FAMILIES[family])
    plan = uneven(source)
    assert not plan.portable
    out = save_own(plan, source, tmp_path / "out")
    model, whole = load_own(out), load(source)
    with apply_mask(whole, plan):
        torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-5)
    assert [site.num_experts for site in sites(model)] == [len(layer.keep) for layer in plan.layers]
    assert not any(isinstance(site.experts, LooseExperts) for site in sites(model)), "these run on the fast compute"
    assert [layer.num_experts for layer in summarize(open_checkpoint(out)).moe_layers] == [
        4,
        *[6] * (len(plan.layers) - 1),
    ]
    assert summarize(open_checkpoint(out)).score == summarize(open_checkpoint(source)).score
    edit = json.loads((out / "collegium_edit.json").read_text())
    assert Plan.model_validate_json(json.dumps(edit["plan"])) == plan


def test_a_portable_plan_gives_the_same_model_both_ways(tmp_path: Path) -> None:
    source = saved(tmp_path, "olmoe")
    plan = plan_of(source)
    register()
    model = load(apply_plan(plan, source, tmp_path / "plain"), experts_implementation="collegium")
    assert logits(load_own(save_own(plan, source, tmp_path / "own"))).equal(logits(model))


def test_it_generates_is_traced_and_looked_at(tmp_path: Path) -> None:
    source = saved(tmp_path, "qwen3_moe")
    plan = uneven(source)
    model = load_own(save_own(plan, source, tmp_path / "out"))
    inputs = tiny_inputs(model)
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    whole = load(source)
    with apply_mask(whole, plan):
        expected = whole.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert generated.equal(expected)
    trace = record(model, [inputs], tmp_path / "trace")
    assert [layer.num_experts for layer in trace.meta.layers] == [4, 6]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_of_several_widths(tmp_path: Path, family: str) -> None:
    source = saved(tmp_path, family)
    f = width(source)
    ids = [list(range(f)), [], [0], list(range(0, f, 2)), [f - 1], list(range(3)), list(range(f)), [1, 4]]
    plan = changed(plan_of(source, {0: range(8), 1: range(8)}), op="slim", intermediate_size=f, neurons=ids)
    assert not plan.portable
    model, whole = load_own(save_own(plan, source, tmp_path / "out")), load(source)
    with torch.no_grad():
        for site in sites(whole):
            for e, kept in enumerate(ids):
                gone = [k for k in range(f) if k not in kept]
                weights_of(site).down_t[e][gone] = 0
    torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-5)
    assert [expert.width for expert in sites(model)[0].experts.experts] == [len(one) for one in ids]
    # it still trains
    model.train()(**tiny_inputs(model), labels=tiny_inputs(model)["input_ids"]).loss.backward()
    assert sites(model)[0].gate.weight.grad is not None


def test_pruned_and_slimmed_to_one_width_by_layer(tmp_path: Path) -> None:
    source = saved(tmp_path, "qwen3_moe")
    record = uneven(source).model_dump(mode="json")
    for layer, f in zip(record["layers"], (4, 7), strict=True):
        layer["intermediate_size"] = width(source)
        layer["neurons"] = [list(range(e % 3, e % 3 + f)) for e in layer["keep"]]
    plan = Plan.model_validate_json(json.dumps(record))
    model, whole = load_own(save_own(plan, source, tmp_path / "out")), load(source)
    with torch.no_grad():
        for site, layer in zip(sites(whole), plan.layers, strict=True):
            for e, kept in zip(layer.keep, layer.neurons, strict=True):
                gone = [k for k in range(layer.intermediate_size) if k not in kept]
                weights_of(site).down_t[e][gone] = 0
    keep = {layer.layer: layer.keep for layer in plan.layers}
    with apply_mask(whole, plan_of(source, keep)):
        torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-5)
    assert [tuple(site.experts.down_proj.shape) for site in sites(model)] == [(4, 32, 4), (6, 32, 7)]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("name", ["svd", "mc_smoe"])
def test_factors_of_full_rank_change_nothing(tmp_path: Path, family: str, name: str) -> None:
    source = saved(tmp_path, family)
    plan = factor_plan(source, name, {"rank": 999})
    out = save_own(plan, source, tmp_path / "out")
    torch.testing.assert_close(logits(load_own(out)), logits(load(source)), rtol=0, atol=1e-4)


def test_factors_are_as_small_as_the_plan_says(tmp_path: Path) -> None:
    source = saved(tmp_path, "qwen3_moe")
    before = summarize(open_checkpoint(source)).parameters
    for name, settings in (("svd", {"share": 0.4}), ("mc_smoe", {"share": 0.3, "sparse": 0.25}), ("svd", {"rank": 2})):
        plan = factor_plan(source, name, settings)
        out = save_own(plan, source, tmp_path / f"{name}{len(settings)}{settings.get('rank')}")
        after = summarize(open_checkpoint(out))
        assert after.parameters == round(plan.asked.value * before) < before
        model = load_own(out)
        assert after.parameters == sum(p.numel() for p in model.parameters())
        assert not torch.allclose(logits(model), logits(load(source)), atol=1e-3)


def test_routers_whose_ids_share_experts(tmp_path: Path) -> None:
    source = saved(tmp_path, "qwen3_moe")
    groups = [[0, 1], [3, 2, 6], [4, 5], [7]]
    weights = [[0.5, 0.5], [0.5, 0.25, 0.25], [1.0, 0.0], [1.0]]
    plan = changed(
        plan_of(source, {0: (0, 3, 4, 7), 1: (0, 3, 4, 7)}), op="merge", groups=groups, weights=weights,
        operator={"name": "average", "settings": {}}, router={"mode": "many_to_one", "settings": {}},
    )  # fmt: skip
    model, whole = load_own(save_own(plan, source, tmp_path / "out")), load(source)
    merged = load(apply_plan(changed(plan, router={"mode": "rows", "settings": {}}), source, tmp_path / "plain"))
    with torch.no_grad():  # every old expert as the one it stands for
        for site, new in zip(sites(whole), sites(merged), strict=True):
            for number, group in enumerate(groups):
                for name, parameter in site.experts.named_parameters():
                    parameter[group] = new.experts.get_parameter(name)[number]
    torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-5)
    assert {site.num_experts for site in sites(model)} == {8}
    assert [len(site.experts.experts) for site in sites(model)] == [4, 4]


def test_router_rows_that_are_computed(tmp_path: Path) -> None:
    source = saved(tmp_path, "gpt_oss")
    groups, keep = [[0, 1], [3, 2, 6], [4, 5], [7]], (0, 3, 4, 7)
    plan = changed(
        plan_of(source, {0: keep, 1: keep}), op="merge", groups=groups,
        weights=[[0.5, 0.5], [0.5, 0.25, 0.25], [0.75, 0.25], [1.0]],
        operator={"name": "average", "settings": {}}, router={"mode": "freq_avg", "settings": {}},
    )  # fmt: skip
    own, plain = save_own(plan, source, tmp_path / "own"), apply_plan(plan, source, tmp_path / "plain")
    torch.testing.assert_close(logits(load_own(own)), logits(load(plain)), rtol=0, atol=1e-5)


def test_what_was_opened_can_be_changed_and_written_again(tmp_path: Path) -> None:
    source = saved(tmp_path, "qwen3_moe")
    model = load_own(save_own(factor_plan(source, "mc_smoe", {"sparse": 0.2}), source, tmp_path / "out"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    save_own_model(model, tmp_path / "again")
    again = load_own(tmp_path / "again")
    assert logits(again).equal(logits(model))
    assert [p.requires_grad for p in again.parameters()] == [True] * len(list(again.parameters()))
    with pytest.raises(ConfigError, match="no shrunk layers"):
        save_own_model(load(source), tmp_path / "plain")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    source = saved(tmp_path, "deepseek_v3", num_hidden_layers=3)
    stored = {
        name: t.to(torch.bfloat16 if "correction" not in name else t.dtype) for name, t in tensors(source).items()
    }
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    plan = uneven(source)
    out = save_own(plan, source, tmp_path / "out")
    register()
    model, whole = load_own(out), load(source, experts_implementation="collegium")
    assert {name: t.dtype for name, t in model.state_dict().items()} == {
        name: t.dtype for name, t in whole.state_dict().items()
    }
    with apply_mask(whole, plan):
        assert logits(model).equal(logits(whole))
    assert load_own(out, torch.float32).lm_head.weight.dtype == torch.float32


def test_taps_intervene(tmp_path: Path) -> None:
    source = saved(tmp_path, "qwen3_moe")
    f = width(source)
    ids = [list(range(e % 3 + f - 3)) for e in range(8)]
    plan = changed(plan_of(source, {0: range(8), 1: range(8)}), op="slim", intermediate_size=f, neurons=ids)
    model = load_own(save_own(plan, source, tmp_path / "out"))

    class First:
        """Every token loses its second expert."""

        def __call__(self, site: Site, x: torch.Tensor, routing: Routing) -> Routing:
            return Routing.from_topk(routing.index_TK[:, :1], routing.weight_TK[:, :1], routing.num_experts)

    before = logits(model)
    with tap(model, First()):
        assert not torch.allclose(logits(model), before, atol=1e-4)
    assert logits(model).equal(before)


def test_a_model_of_another_plan_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, "olmoe")
    plan = uneven(source)
    other = saved(tmp_path, "olmoe", name="other", num_hidden_layers=3)
    with pytest.raises(PlanError, match="fingerprint"):
        save_own(plan, other, tmp_path / "out")
    with pytest.raises(PlanError, match="layer 2"):
        save_own(plan.model_copy(update={"fingerprint": None}), other, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        save_own(plan, source, tmp_path / "out")


def test_plain_loaders_say_what_to_use(tmp_path: Path) -> None:
    source = saved(tmp_path, "olmoe")
    out = save_own(uneven(source), source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="load_own"):
        load(out)
    with pytest.raises(ValueError, match="CollegiumConfig"):
        AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(CheckpointError, match=r"collegium\.models\.load"):
        load_own(source)


def edit_section(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["collegium"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(version=2), "version"),
        (lambda s: s.update(base="none"), "describes no model"),
        (lambda s: s["shrunk"]["layers"][0].update(layer=9), "describes no model"),
        (lambda s: s["shrunk"]["layers"][0].update(widths=[3] * 4), "says"),
        (lambda s: s["shrunk"]["layers"][0].update(widths=[3, 2]), "fused experts"),
        (lambda s: s["shrunk"]["layers"][0].update(form="loose"), "missing"),
        (lambda s: s["shrunk"]["layers"][0].update(form="loose", expert_map=[7]), "beyond"),
        (lambda s: s["shrunk"]["layers"].pop(), "says"),
    ],
)
def test_a_section_that_does_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    source = saved(tmp_path, "olmoe")
    out = save_own(uneven(source), source, tmp_path / "out")
    edit_section(out, change)
    with pytest.raises(CheckpointError, match=message):
        load_own(out)


def test_damaged_files(tmp_path: Path) -> None:
    source = saved(tmp_path, "olmoe")
    out = save_own(factor_plan(source, "mc_smoe", {"sparse": 0.2}), source, tmp_path / "out")
    for number, file in enumerate(sorted(out.glob("*.safetensors"))):
        damaged = shutil.copytree(out, tmp_path / f"damaged{number}")
        content = (damaged / file.name).read_bytes()
        (damaged / file.name).write_bytes(content[:-7])
        with pytest.raises(CheckpointError, match="truncated"):
            load_own(damaged)
    file = sorted(out.glob("*.safetensors"))[-1]
    stored = load_file(file)
    stored[next(name for name in stored if name.endswith("rows"))].fill_(999)
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="rows"):
        load_own(out)


def test_a_source_that_changes_meanwhile_gives_nothing(tmp_path: Path) -> None:
    source = saved(tmp_path, "olmoe")
    file, content = source / "model.safetensors", (source / "model.safetensors").read_bytes()

    def change(done: int, total: int) -> None:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    with pytest.raises(CheckpointError, match="changed while it was read"):
        save_own(uneven(source), source, tmp_path / "out", progress=change)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from collegium.models import shards

    source = saved(tmp_path, "olmoe")
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match="needs"):
        save_own(uneven(source), source, tmp_path / "out")


def test_a_layer_that_is_not_what_was_planned_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collegium.compress import own_write

    source = saved(tmp_path, "olmoe")
    monkeypatch.setattr(own_write, "cut_router", lambda site, keep: lambda: None)
    with pytest.raises(CheckpointError, match="describes"):
        save_own(uneven(source), source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, "olmoe")
    plan = uneven(source).model_copy(update={"fingerprint": None})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UnsupportedFamilyError, match="quantised"):
        save_own(plan, source, tmp_path / "out")


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path, "olmoe", num_hidden_layers=4)
    seen = []
    loaded = LayerwiseModel.layer_loaded

    def watched(self: LayerwiseModel, number: int) -> Any:
        seen.append([i for i, layer in enumerate(self.layers) if not next(layer.parameters()).is_meta])
        return loaded(self, number)

    monkeypatch.setattr(LayerwiseModel, "layer_loaded", watched)
    save_own(uneven(source), source, tmp_path / "out")
    assert seen == [[]] * 4


def test_multi_token_prediction_has_no_place(tmp_path: Path) -> None:
    source = saved(tmp_path, "deepseek_v3")
    extra = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors(source).items() if "layers.1." in n}
    save_file(tensors(source) | extra, source / "model.safetensors", metadata={"format": "pt"})
    plan = uneven(source)
    for mtp in ("refuse", "keep"):
        with pytest.raises(PlanError, match=r'layers\.2\..*"drop"'):
            save_own(plan.model_copy(update={"mtp": mtp}), source, tmp_path / "out")
    out = save_own(plan.model_copy(update={"mtp": "drop"}), source, tmp_path / "out")
    assert not [name for name in open_checkpoint(out).tensors if "layers.2." in name]
    assert torch.isfinite(logits(load_own(out))).all()


def test_statistics_go_into_factors_and_can_be_taken_again(tmp_path: Path) -> None:
    source = saved(tmp_path, "qwen3_moe")
    gather = collectors_for(statistics=("c_in", "h_sq"))
    statistics = calibrate(source, batches(), gather, tmp_path / "stats", domains=("a", "b"))
    plan = factor_plan(source, "whitened_svd", {"share": 0.8}, statistics=statistics)
    with pytest.raises(ConfigError, match="c_in, h_sq"):
        save_own(plan, source, tmp_path / "out")
    out = save_own(plan, source, tmp_path / "out", statistics=statistics)
    model = load_own(out)
    plain = load_own(save_own(factor_plan(source, "svd", {"share": 0.8}), source, tmp_path / "svd"))
    with torch.no_grad():
        expected, found, other = (
            torch.cat([one(input_ids=b["input_ids"], attention_mask=b["attention_mask"])[0] for b in batches()])
            for one in (load(source), model, plain)
        )
    assert (found - expected).norm() < (other - expected).norm()
    # statistics of such a model itself: in memory, as it cannot be streamed
    whole = load_own(save_own(factor_plan(source, "svd", {"rank": 999}), source, tmp_path / "whole"))
    again, before = (collect(one, batches(), [OutputNorms()], domains=("a", "b")) for one in (whole, load(source)))
    assert again.get(0, "n").equal(before.get(0, "n"))
    torch.testing.assert_close(again.get(1, "ean_sum"), before.get(1, "ean_sum"), rtol=1e-3, atol=1e-4)
    with pytest.raises(UnsupportedFamilyError, match="load_own"):
        LayerwiseModel(open_checkpoint(out))


def test_names_of_operators_are_checked_first(tmp_path: Path) -> None:
    source = saved(tmp_path, "olmoe")
    plan = factor_plan(source).model_copy(update={"operator": Operator(name="none")})
    with pytest.raises(ConfigError, match="svd"):
        save_own(plan, source, tmp_path / "out")
