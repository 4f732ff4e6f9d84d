"""A plan as a mask: the same numbers as a model that has only the kept experts, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shrinking import made_up_plan
from torch import Tensor

from collegium.compress.mask import apply_mask
from collegium.compress.plan import Plan
from collegium.errors import PlanError, UnsupportedFamilyError
from collegium.routing import Routing
from collegium.sites import Site, register, sites, tap
from tiny import SEAM, correction_biases, families, seam_model_type, tiny_inputs, tiny_model

KEPT = (0, 2, 5, 7)  # two of each routing group of four
FEWER = {
    "mixtral": "num_local_experts",
    "olmoe": "num_experts",
    "qwen2_moe": "num_experts",
    "qwen3_moe": "num_local_experts",
    "deepseek_v2": "n_routed_experts",
    "deepseek_v3": "n_routed_experts",
    "gpt_oss": "num_local_experts",
    "granitemoe": "num_local_experts",
    "glm4_moe": "n_routed_experts",
    "ernie4_5_moe": "moe_num_experts",
    "minimax_m2": "num_local_experts",
    "afmoe": "num_experts",
    "lfm2_moe": "num_experts",
}

REFUSED = {
    "deepseek_v4": "by a table",
    "inkling_text": "0 found",  # its matrix has rows for shared experts, too
    "zaya": "0 found",  # its matrix has a row for the choice to skip
}


def plan_for(model: Any, *keep: tuple[int, ...]) -> Plan:
    """Layer i of the MoE layers keeps ``keep[i]``, the last one given for those beyond."""
    found = sites(model)
    ids = [keep[min(i, len(keep) - 1)] for i in range(len(found))]
    plan = made_up_plan(ids, experts=found[0].num_experts, top_k=found[0].top_k)
    numbered = [one.model_copy(update={"layer": site.layer}) for one, site in zip(plan.layers, found, strict=True)]
    return plan.model_copy(update={"layers": tuple(numbered)})


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(model), use_cache=False)[0]


class Seen:
    """The routing of every block."""

    def __init__(self) -> None:
        self.routings: dict[int, Routing] = {}

    def __call__(self, site: Site, x: Tensor, routing: Routing) -> None:
        self.routings[site.layer] = routing


def cut(model: Any, family: str) -> Any:
    """A model that was built with the kept experts only, and has their weights."""
    small = tiny_model(family, **{FEWER[family]: len(KEPT)})
    theirs = model.state_dict()
    state = {}
    for name, tensor in small.state_dict().items():
        source = theirs[name]
        for axis in range(source.dim()):
            if source.shape[axis] != tensor.shape[axis]:
                source = source.index_select(axis, torch.tensor(KEPT))
        state[name] = source
    small.load_state_dict(state)
    for one, other in zip(sites(small), sites(model), strict=True):
        for bias, whole in zip(correction_biases(one.block), correction_biases(other.block), strict=True):
            with torch.no_grad():
                bias.copy_(whole[..., list(KEPT)])
    return small


@pytest.mark.parametrize("family", families(*FEWER))
def test_a_mask_gives_the_logits_of_the_smaller_model(family: str) -> None:
    model = tiny_model(family)
    whole, small = logits_of(model), logits_of(cut(model, family))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = Seen()
    with apply_mask(model, plan_for(model, KEPT)), tap(model, seen):
        masked = logits_of(model)
    torch.testing.assert_close(masked, small, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(masked, whole, atol=1e-3)
    for routing in seen.routings.values():
        assert set(routing.expert.tolist()) <= set(KEPT)
    assert logits_of(model).equal(whole)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", sorted({seam_model_type(*one) for one in SEAM}))
def test_every_family_keeps_all_bit_for_bit_and_selects_no_masked_expert_or_is_refused(family: str) -> None:
    model = tiny_model(family)
    found = sites(model)
    if len({site.layer for site in found}) < len(found) or len({site.num_experts for site in found}) > 1:
        pytest.skip("no plan has several MoE blocks in a layer")
    whole = logits_of(model)
    with apply_mask(model, plan_for(model, tuple(range(8)))):
        assert logits_of(model).equal(whole)
    seen = Seen()
    try:
        with apply_mask(model, plan_for(model, KEPT)), tap(model, seen):
            logits_of(model)
    except UnsupportedFamilyError as error:
        assert REFUSED[family] in str(error)  # noqa: PT017  (which families are refused is what is tested)
    else:
        assert family not in REFUSED
        assert seen.routings
        for routing in seen.routings.values():
            assert set(routing.expert.tolist()) <= set(KEPT)
    assert logits_of(model).equal(whole)


def test_layers_may_keep_different_numbers_and_observers_see_old_ids_and_logits() -> None:
    model = tiny_model("qwen3_moe")
    seen = Seen()
    with apply_mask(model, plan_for(model, (1, 2, 6), (0, 1, 2, 3, 4, 5, 6, 7))), tap(model, seen, logits=True):
        logits_of(model)
    first, second = seen.routings[0], seen.routings[1]
    assert set(first.expert.tolist()) == {1, 2, 6}
    assert first.logits is not None
    assert first.logits.shape == (24, 8)
    assert first.logits[:, [0, 3, 4, 5, 7]].isneginf().all()
    assert first.logits[:, [1, 2, 6]].topk(2).indices.shape == (24, 2)
    assert torch.tensor([1, 2, 6])[first.logits[:, [1, 2, 6]].topk(2).indices].equal(first.index_TK)
    assert set(second.expert.tolist()) > {1, 2, 6}


def test_generation_goes_on_under_a_mask_and_on_our_compute() -> None:
    model = tiny_model("qwen3_moe")
    slow = tiny_model("qwen3_moe")
    register()
    model.set_experts_implementation("collegium")
    plan, ids = plan_for(model, KEPT), tiny_inputs(model)["input_ids"][:1]
    results = []
    for one in (model, slow):
        with apply_mask(one, plan):
            results.append(one.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None))
    assert results[0].equal(results[1])
    assert not results[0].equal(model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None))


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = tiny_model("deepseek_v3")
    whole = logits_of(model)
    with pytest.raises(ValueError, match="mine"), apply_mask(model, plan_for(model, KEPT)):
        raise ValueError("mine")
    assert logits_of(model).equal(whole)


def test_a_plan_for_other_layers_is_refused() -> None:
    model = tiny_model("qwen3_moe")
    with (
        pytest.raises(PlanError, match="does not fit this Qwen3MoeForCausalLM"),
        apply_mask(model, made_up_plan([KEPT])),
    ):
        pass
    with (
        pytest.raises(PlanError, match="chooses 2 experts; the plan was made for 1"),
        apply_mask(model, made_up_plan([KEPT, KEPT], top_k=1)),
    ):
        pass


def test_a_family_outside_the_seam_is_refused_by_name() -> None:
    model = tiny_model("llama4_text")
    plan = plan_for(model, KEPT)
    with pytest.raises(UnsupportedFamilyError, match="llama4"), apply_mask(model, plan):
        pass
