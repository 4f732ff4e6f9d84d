"""Plans: round trips, plans edited into nonsense, plans for other models, and what follows from a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from shrinking import made_up_plan, made_up_target

from collegium.compress.plan import Asked, Plan, diff
from collegium.compress.target import Target, TargetLayer, fewest_kept
from collegium.errors import NotMoEError, PlanError, StorageError
from collegium.models.checkpoint import open_checkpoint
from collegium.models.summary import summarize
from tiny import families, tiny_model

KEEP = ((0, 1, 4, 5), (0, 2, 4, 6), (4, 5, 6, 7))


def edited(tmp_path: Path, plan: Plan, *path: Any, value: Any) -> Path:
    """A plan file with the entry at `path` replaced."""
    body: Any = json.loads(plan.model_dump_json())
    place = body
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(body))
    return file


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    plan = made_up_plan(KEEP, settings={"combine": "sum", "seed": 3, "share": 0.25}, notes=("look",))
    plan.save(tmp_path / "new" / "plan.json")
    assert Plan.load(tmp_path / "new" / "plan.json") == plan
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        plan.save(tmp_path / "file" / "plan.json")


def test_what_follows_from_it() -> None:
    plan = made_up_plan(KEEP)
    assert plan.uniform
    assert (plan.reached.experts, plan.reached.of_experts) == (12, 24)
    assert (plan.reached.nbytes, plan.reached.of_nbytes) == (3 * 6 * 200, 3 * 10 * 200)
    assert (plan.reached.parameters, plan.reached.of_parameters) == (3 * 6 * 100, 3 * 10 * 100)
    assert plan.layers[1].dropped == (1, 3, 5, 7)
    assert plan.layers[1].expected is None
    assert not made_up_plan([(0, 1), (0, 1, 2)]).uniform


def test_an_edit_by_hand_stays_consistent(tmp_path: Path) -> None:
    plan = made_up_plan([(0, 1, 2, 3)])
    scored = plan.layers[0].model_copy(update={"scores": (0.3, 0.1, 0.1, 0.1, 0.4, 0, 0, 0)})
    plan = plan.model_copy(update={"layers": (scored,)})
    assert plan.layers[0].expected == pytest.approx(0.6)
    again = Plan.load(edited(tmp_path, plan, "layers", 0, "keep", value=[0, 1, 4]))
    assert again.layers[0].expected == pytest.approx(0.8)
    assert again.reached.experts == 3


NONSENSE = [
    (("layers", 0, "keep"), [1, 0, 4, 5], "layers.0.*ascending ids below 8"),
    (("layers", 0, "keep"), [0, 0, 4, 5], "ascending"),
    (("layers", 0, "keep"), [0, 1, 4, 8], "below 8"),
    (("layers", 0, "keep"), [-1, 1, 4, 5], "layers.0.keep.0"),
    (("layers", 0, "keep"), [0.5, 1, 4, 5], "layers.0.keep.0"),
    (("layers", 0, "keep"), [True, 2, 4, 5], "layers.0.keep.0"),
    (("layers", 0, "keep"), ["0", 1, 4, 5], "layers.0.keep.0"),
    (("layers", 0, "keep"), [], "layers.0.keep"),
    (("layers", 0, "keep"), [3], "keeps 1 experts; the router chooses 2 and needs at least 2"),
    (("layers", 0, "keep"), list(range(8)), "op 'prune' with 8 of 8"),
    (("layers", 0, "op"), "identity", "op 'identity' with 4 of 8"),
    (("layers", 0, "op"), "merge", "names no operator"),
    (("layers", 0, "op"), "melt", "layers.0.op"),
    (("layers", 0, "protected"), [3], r"protected experts \[3\] are not in keep"),
    (("layers", 0, "scores"), [1.0, 2.0], "2 scores for 8 experts"),
    (("layers", 0, "scores"), [float("nan")] * 8, "layers.0.scores.0"),
    (("layers", 0, "layer"), 1, "must ascend without repeats"),
    (("layers", 0, "num_experts"), 1 << 20, "layers.0.num_experts"),
    (("layers",), [], "layers"),
    (("layers",), {"0": []}, "layers"),
    (("top_k",), 5, "needs at least 5"),
    (("groups",), 3, "do not form 3 groups"),
    (("top_groups",), 2, "more than the 1 groups"),
    (("groups",), 4, r"keeps \[2, 0, 2, 0\] experts of its 4 routing groups"),
    (("kind",), "place", "kind"),
    (("schema_version",), 2, "schema_version"),
    (("asked", "value"), float("inf"), "asked.value"),
    (("router", "mode"), "magic", "router.mode"),
    (("mtp",), "guess", "mtp"),
    (("colour",), "red", "colour"),
    (("fingerprint",), 7, "fingerprint"),
]


@pytest.mark.parametrize(("path", "value", "message"), NONSENSE, ids=lambda value: str(value)[:30])
def test_a_plan_edited_into_nonsense_is_refused_and_the_field_named(
    tmp_path: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    with pytest.raises(PlanError, match=rf"plan\.json: field .*{message}"):
        Plan.load(edited(tmp_path, made_up_plan(KEEP), *path, value=value))


@pytest.mark.parametrize(
    "content",
    [b"", b"not json", b"[]", b"null", b"{}", b'{"a": ' * 50_000, b"\xff\xfe{}", b'{"kind": "shrink"'],
    ids=range(8),
)
def test_what_is_no_plan_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.load(file)


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="No such file"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="directory"):
        Plan.load(tmp_path)


def test_groups_need_as_many_experts_each_and_enough_of_them() -> None:
    assert made_up_plan([(0, 1, 4, 5)], groups=2, top_groups=1).reached.experts == 4
    with pytest.raises(ValidationError, match="needs at least 4"):
        made_up_plan([(0, 4)], groups=2, top_groups=1)
    with pytest.raises(ValidationError, match="needs at least 4"):
        made_up_plan([(0, 4)], groups=2, top_groups=2)
    assert fewest_kept(256, 8, 8, 4) == 16
    assert fewest_kept(256, 32, 8, 4) == 64
    assert fewest_kept(8, 2, 8, 4) == 8
    assert fewest_kept(64, 6, 1, 1) == 6


def test_a_plan_for_another_model_is_refused() -> None:
    plan = made_up_plan(KEEP)
    plan.check(made_up_target())
    plan.check(made_up_target(fingerprint=None))
    for other, message in (
        (made_up_target(fingerprint="xyz"), "another model, or its weights were changed"),
        (made_up_target(4), "layer 3 has no experts in the plan and 8 in the model"),
        (made_up_target(2), "layer 2 has 8 experts in the plan and none in the model"),
        (made_up_target(3, 16), r"layer 0 has 8 experts .* 16 in the model \(3 layers differ\)"),
        (made_up_target(top_k=1), "top-2 routing over 1 groups"),
        (made_up_target(groups=2, top_groups=1), "over 2"),
    ):
        with pytest.raises(PlanError, match=message):
            plan.check(other)


def test_diff() -> None:
    plan = made_up_plan(KEEP)
    same = diff(plan, plan.model_copy(update={"created": "later", "notes": ("x",)}))
    assert (same.fields, same.layers, same.overlap) == ({}, (), 1)
    other = made_up_plan((KEEP[0], (0, 2, 5, 7), (0, 1, 2, 3)), method="else", asked=Asked(what="bytes", value=9))
    found = diff(plan, other)
    assert set(found.fields) == {"method", "asked"}
    assert found.fields["method"] == ("made up", "else")
    assert [(one.layer, one.only_a, one.only_b, one.both) for one in found.layers] == [
        (1, (4, 6), (5, 7), 2),
        (2, (4, 5, 6, 7), (0, 1, 2, 3), 0),
    ]
    assert found.overlap == pytest.approx((1 + 1 / 3 + 0) / 3)
    with pytest.raises(PlanError, match="different models"):
        diff(plan, made_up_plan(KEEP[:2]))
    with pytest.raises(PlanError, match="different models"):
        diff(plan, made_up_plan(KEEP, fingerprint="xyz"))


FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "deepseek_v3": {"n_routed_experts": 4},
    "ernie4_5_moe": {"moe_num_experts": 4},
}


@pytest.mark.parametrize("family", families(*FAMILIES))
def test_a_target_is_what_the_checkpoint_says_and_sizes_are_exact(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "whole")
    tiny_model(family, **FAMILIES[family]).save_pretrained(tmp_path / "half")
    target = Target.of(open_checkpoint(tmp_path / "whole"))
    assert target.fingerprint == open_checkpoint(tmp_path / "whole").fingerprint
    assert (target.family, target.top_k, target.model) == (family, 2, "whole")
    assert (target.groups, target.top_groups) == ((2, 1) if family == "deepseek_v3" else (1, 1))
    assert all(one.num_experts == 8 for one in target.layers)
    half = summarize(open_checkpoint(tmp_path / "half"))
    assert target.nbytes - sum(4 * one.expert_nbytes for one in target.layers) == half.nbytes
    assert target.parameters - sum(4 * one.expert_parameters for one in target.layers) == half.parameters


def test_groups_of_a_config_that_leaves_out_its_defaults(tmp_path: Path) -> None:
    tiny_model("deepseek_v3", n_routed_experts=16, n_group=8, topk_group=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("n_group", "topk_group"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    target = Target.of(open_checkpoint(tmp_path))
    assert (target.groups, target.top_groups) == (8, 4)


def test_greedy_routers_have_no_groups(tmp_path: Path) -> None:
    tiny_model("deepseek_v2", topk_method="greedy").save_pretrained(tmp_path)
    assert Target.of(open_checkpoint(tmp_path)).groups == 1


def test_a_dense_model_is_no_target(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(NotMoEError, match="llama"):
        Target.of(open_checkpoint(tmp_path))


def test_a_target_without_weights_has_no_fingerprint(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").config.save_pretrained(tmp_path)
    target = Target.of(open_checkpoint(tmp_path))
    assert target.fingerprint is None
    assert [one.num_experts for one in target.layers] == [8, 8]
    f, d = 16, 32
    expert = 3 * d * f + d  # with its row of the router
    assert target.layers[0] == TargetLayer(0, 8, 4 * expert, expert, f, 4 * 3 * d, 3 * d)
