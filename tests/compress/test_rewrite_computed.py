"""Rewriting with computed tensors: merged and slimmer experts, and router rows that follow, in every layout on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from collegium.compress.mask import apply_mask
from collegium.compress.matrices import LayerExperts
from collegium.compress.plan import Plan
from collegium.compress.rewrite import apply_plan
from collegium.compress.target import Target
from collegium.errors import ConfigError, NonFiniteError, PlanError, UnsupportedFamilyError
from collegium.measure.collect import weights_of
from collegium.models.checkpoint import open_checkpoint
from collegium.sites import sites
from pruning import logits, plan_of, saved
from tiny import families

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "olmoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    "deepseek_v3": {"num_hidden_layers": 3},
    "gpt_oss": {},
    "granitemoe": {},
    "ernie4_5_moe": {"num_hidden_layers": 3},
}
GROUPS = ((0, 1), (3, 2), (5,), (6, 4, 7))
WEIGHTS = ((0.75, 0.25), (0.5, 0.5), (1.0,), (0.5, 0.25, 0.25))
KEEP = (0, 3, 5, 6)


def changed(source: Path, **changes: Any) -> Plan:
    """The plan `plan_of` makes, every layer of it with `changes`; those of the plan itself begin with "plan_"."""
    target = {one.layer: one for one in Target.of(open_checkpoint(source)).layers}
    record = plan_of(source).model_dump(mode="json")
    for layer in record["layers"]:
        one = target[layer["layer"]]
        sizes = {name: getattr(one, name) for name in ("intermediate_size", "neuron_nbytes", "neuron_parameters")}
        layer.update(sizes, **{name: value for name, value in changes.items() if not name.startswith("plan_")})
    record |= {name.removeprefix("plan_"): value for name, value in changes.items() if name.startswith("plan_")}
    return Plan.model_validate_json(Plan.model_construct(**record).model_dump_json(warnings=False))


def merged(source: Path, mode: str = "rows", operator: str = "average", **settings: Any) -> Plan:
    return changed(
        source,
        op="merge",
        keep=KEEP,
        groups=GROUPS,
        weights=WEIGHTS,
        plan_operator={"name": operator, "settings": {}},
        plan_router={"mode": mode, "settings": settings},
    )


def slim(source: Path, gone: int = 8) -> Plan:
    """Every expert without its first `gone` neurons but one, in turns."""
    target = Target.of(open_checkpoint(source)).layers[0]
    f = target.intermediate_size or 0
    E = target.num_experts
    neurons = [[k for k in range(f) if not e % 2 <= k < gone + e % 2] for e in range(E)]
    return changed(source, op="slim", keep=list(range(E)), neurons=neurons)


def opened(folder: Path) -> Any:
    """The model in `folder`, every key of which was found in its place."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def matrices(model: Any) -> list[list[dict[str, Tensor]]]:
    """Of each layer and expert, by name."""
    layers = [LayerExperts(weights_of(site)) for site in sites(model)]
    return [
        [{k: v for k, v in vars(layer.read(e)).items() if v is not None} for e in range(layer.num_experts)]
        for layer in layers
    ]


@pytest.mark.parametrize("family", families(*FAMILIES))
def test_members_of_a_group_become_their_weighted_average(tmp_path: Path, family: str) -> None:
    source = saved(tmp_path, family, **FAMILIES[family])
    new = matrices(opened(apply_plan(merged(source), source, tmp_path / "out")))
    old = matrices(opened(source))
    for layer, experts in enumerate(new):
        assert len(experts) == len(GROUPS)
        for found, group, shares in zip(experts, GROUPS, WEIGHTS, strict=True):
            for name, value in found.items():
                wanted = sum(w * old[layer][e][name] for e, w in zip(group, shares, strict=True))
                torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)
            if len(group) == 1:
                assert all(torch.equal(value, old[layer][group[0]][name]) for name, value in found.items())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "olmoe"])
def test_experts_stored_as_they_are_in_memory(tmp_path: Path, family: str) -> None:
    apart, fused = (saved(tmp_path, family, fused=one, name=str(one), **FAMILIES[family]) for one in (False, True))
    torch.manual_seed(0)
    results = [
        matrices(opened(apply_plan(merged(source), source, tmp_path / f"out{source.name}")))
        for source in (apart, fused)
    ]
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", families("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe"))
def test_slimmer_experts_are_the_old_ones_with_those_neurons_silenced(tmp_path: Path, family: str) -> None:
    source = saved(tmp_path, family, **FAMILIES[family])
    plan = slim(source)
    small, whole = opened(apply_plan(plan, source, tmp_path / "out")), opened(source)
    before = logits(whole)
    with torch.no_grad():
        for site, layer in zip(sites(whole), plan.layers, strict=True):
            f = layer.intermediate_size or 0
            for e, kept in enumerate(layer.neurons):
                weights_of(site).down_t[e, [k for k in range(f) if k not in kept]] = 0
    torch.testing.assert_close(logits(small), logits(whole), rtol=0, atol=1e-5)
    assert (logits(small) - before).abs().max() > 1e-4, "the neurons made no difference"
    written = sum(info.nbytes for info in open_checkpoint(tmp_path / "out").tensors.values())
    assert written == plan.reached.nbytes


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_shared_experts_sized_by_the_same_key_are_refused(tmp_path: Path, family: str) -> None:
    source = saved(tmp_path, family, num_hidden_layers=3)
    with pytest.raises(UnsupportedFamilyError, match="shared experts"):
        apply_plan(slim(source), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_expert_kept_whole_moves_bytes(tmp_path: Path) -> None:
    source = saved(tmp_path, "mixtral")
    out = apply_plan(changed(source, op="identity", keep=list(range(8))), source, tmp_path / "out")
    assert all(
        torch.equal(one, other)
        for one, other in zip(opened(out).state_dict().values(), opened(source).state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("mode", ["freq_avg"])
def test_router_rows_follow_the_members(tmp_path: Path, family: str, mode: str) -> None:
    source = saved(tmp_path, family, **FAMILIES[family])
    out = apply_plan(merged(source, mode, rescale=False), source, tmp_path / "out")
    for new, old in zip(sites(opened(out)), sites(opened(source)), strict=True):
        for name, value in [*old.gate.named_parameters(), *old.gate.named_buffers()]:
            if value.shape[:1] != (8,):
                continue
            found = dict([*new.gate.named_parameters(), *new.gate.named_buffers()])[name]
            for row, group, shares in zip(found, GROUPS, WEIGHTS, strict=True):
                wanted = sum(w * value[e] for e, w in zip(group, shares, strict=True))
                torch.testing.assert_close(row, wanted, rtol=0, atol=1e-6)


def test_what_cannot_be_computed_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, "olmoe")
    plan = merged(source)
    with pytest.raises(PlanError, match="mask only hides"), apply_mask(opened(source), plan):
        pass
    with pytest.raises(PlanError, match="--own"):
        apply_plan(merged(source, "many_to_one"), source, tmp_path / "out")
    with pytest.raises(ConfigError, match="x_sample"):
        apply_plan(merged(source, "lse_fit"), source, tmp_path / "out")
    with pytest.raises(ValueError, match="no router_edit is named 'nonsense'"):
        merged(source, "nonsense")
    with pytest.raises(ConfigError, match="no merge is named 'nonsense'"):
        apply_plan(merged(source, operator="nonsense"), source, tmp_path / "out")
    ragged = slim(source).model_dump(mode="json")
    ragged["layers"][0]["neurons"][0] = [1]
    with pytest.raises(PlanError, match="several widths"):
        apply_plan(
            Plan.model_validate_json(Plan.model_construct(**ragged).model_dump_json(warnings=False)),
            source,
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_a_damaged_weight_does_not_end_up_in_a_merged_one(tmp_path: Path) -> None:
    source = saved(tmp_path, "olmoe")
    model = opened(source)
    with torch.no_grad():
        weights_of(sites(model)[1]).down_t[2, 3, 4] = torch.nan
    model.save_pretrained(tmp_path / "damaged")
    with pytest.raises(NonFiniteError, match=r"down_proj|experts"):
        apply_plan(merged(tmp_path / "damaged"), tmp_path / "damaged", tmp_path / "out")
    assert not (tmp_path / "out").exists()


NONSENSE = [
    ({"op": "merge", "keep": KEEP, "groups": ((0, 1), (3, 2), (5,), (6, 4))}, "one share for each member"),
    ({"groups": ((0, 1), (3, 2), (5,))}, "one group for each"),
    ({"groups": ((1, 0), (3, 2), (5,), (6, 4, 7))}, "begin with the experts in keep"),
    ({"groups": ((0, 1), (3, 1), (5,), (6, 4, 7))}, "must not share"),
    ({"groups": ((0, 9), (3, 2), (5,), (6, 4, 7))}, "below 8"),
    ({"groups": ((0, 1), (3, 2), (5,), (6, 7, 4))}, "must ascend"),
    ({"protected": [0]}, "protected experts cannot be merged"),
    ({"weights": ((0.75, 0.75), (0.5, 0.5), (1.0,), (0.5, 0.25, 0.25))}, "in sum 1"),
    ({"op": "prune"}, "op 'prune' with 4 of 8"),
    ({"plan_operator": None}, "names no operator"),
    ({"op": "factor"}, "op 'factor'"),
    ({"neurons": [[0]] * 3}, "3 lists of neurons for 4 experts"),
    ({"neurons": [[1, 0]] * 4}, "ascending ids"),
    ({"neurons": [[99]] * 4}, "ascending ids below"),
]


@pytest.mark.parametrize(("changes", "message"), NONSENSE)
def test_a_plan_edited_into_nonsense_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = saved(tmp_path, "olmoe")
    merge = {
        "op": "merge",
        "keep": KEEP,
        "groups": GROUPS,
        "weights": WEIGHTS,
        "plan_operator": {"name": "average", "settings": {}},
    }
    with pytest.raises(ValueError, match=message):
        changed(source, **(merge | changes))
