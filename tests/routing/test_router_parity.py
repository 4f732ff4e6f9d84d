"""`router_from_gate` against what transformers models really hand to their experts.

Each model is tiny and random; its router weights are drawn large enough that the order of experts is not a tie.
"""

from __future__ import annotations

import copy
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from collegium.errors import ConfigError, UnsupportedFamilyError
from collegium.routing import Router, RoutingContext, router_from_gate
from collegium.routing.from_gate import FAMILIES

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "num_experts_per_tok": 4,
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
ROUTED = {"n_routed_experts": 16, "n_shared_experts": 1, "first_k_dense_replace": 0, "routed_scaling_factor": 2.5}
GROUPS = {"n_group": 4, "topk_group": 2}
LFM2 = {"num_experts": 8, "num_dense_layers": 0, "layer_types": ["conv", "full_attention"]}

CASES = {
    "mixtral": ("mixtral", {"num_local_experts": 8}),
    "olmoe": ("olmoe", {"num_experts": 8, "norm_topk_prob": False}),
    "olmoe-norm": ("olmoe", {"num_experts": 8, "norm_topk_prob": True}),
    "qwen2": ("qwen2_moe", {"num_experts": 8, "shared_expert_intermediate_size": 16, "norm_topk_prob": False}),
    "qwen2-norm": ("qwen2_moe", {"num_experts": 8, "shared_expert_intermediate_size": 16, "norm_topk_prob": True}),
    "qwen3": ("qwen3_moe", {"num_experts": 8, "norm_topk_prob": False}),
    "qwen3-norm": ("qwen3_moe", {"num_experts": 8, "norm_topk_prob": True}),
    "deepseek_v2-greedy": ("deepseek_v2", {**MLA, **ROUTED, "topk_method": "greedy"}),
    "deepseek_v2-groups": ("deepseek_v2", {**MLA, **ROUTED, **GROUPS, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("deepseek_v3", {**MLA, **ROUTED, **GROUPS, "norm_topk_prob": False}),
    "deepseek_v3-norm": ("deepseek_v3", {**MLA, **ROUTED, **GROUPS, "norm_topk_prob": True}),
    "deepseek_v3-one-group": ("deepseek_v3", {**MLA, **ROUTED, "n_group": 1, "topk_group": 1}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 8}),
    "granitemoe": ("granitemoe", {"num_local_experts": 8}),
    "phimoe": ("phimoe", {"num_local_experts": 8, "num_experts_per_tok": 2, "router_jitter_noise": 0.2}),
    "ernie4_5": ("ernie4_5_moe", {"moe_num_experts": 8, "moe_k": 4, "moe_layer_start_index": 0, "moe_norm_min": 0.6}),
    "glm4": ("glm4_moe", {**ROUTED, **GROUPS, "norm_topk_prob": False}),
    "glm4-norm": ("glm4_moe", {**ROUTED, **GROUPS, "norm_topk_prob": True}),
    "dots1": ("dots1", {**ROUTED, **GROUPS, "norm_topk_prob": False}),
    "dots1-norm": ("dots1", {**ROUTED, **GROUPS, "norm_topk_prob": True}),
    "minimax_m2": ("minimax_m2", {"num_local_experts": 8, "rotary_dim": 8}),
    "hunyuan_v1": ("hunyuan_v1_moe", {"num_experts": 8, "moe_topk": 4}),
    "lfm2": ("lfm2_moe", {**LFM2, "norm_topk_prob": False}),
    "lfm2-norm": ("lfm2_moe", {**LFM2, "norm_topk_prob": True}),
    "lfm2-no-bias": ("lfm2_moe", {**LFM2, "use_expert_bias": False}),
    "flex_olmo": ("flex_olmo", {"num_experts": 8, "norm_topk_prob": False}),
    "flex_olmo-norm": ("flex_olmo", {"num_experts": 8, "norm_topk_prob": True}),
}


def build(case: str, seed: int = 0) -> nn.Module:
    model_type, settings = CASES[case]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **settings})).eval()
    for gate, block in gates(model):
        spread(gate, block)
    return model


def gates(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    found = []
    for block in model.modules():
        gate = getattr(block, "gate", None) or getattr(block, "router", None)
        if gate is not None and hasattr(block, "experts"):
            found.append((gate, block))
    return found


def spread(gate: nn.Module, block: nn.Module | None = None) -> None:
    """Large router weights and non-zero biases, in place."""
    for module in (gate, block) if block is not None else (gate,):
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            own = module is gate or "." not in name
            with torch.no_grad():
                if own and "bias" in name:
                    tensor.normal_(std=0.2)
                elif module is gate and tensor.dim() == 2:
                    tensor.normal_(std=0.3)


def used(model: nn.Module, tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(x the gate saw, index and weight its experts got) for each MoE block in order."""
    seen: list[list[torch.Tensor]] = []
    hooks = []
    for gate, block in gates(model):
        seen.append([])

        def at_gate(module, args, row=seen[-1]):
            row.append(args[0].reshape(-1, args[0].shape[-1]).clone())

        def at_experts(module, args, kwargs, row=seen[-1]):
            index, weight = (*args, *kwargs.values())[1:3]
            row.extend((index.clone(), weight.clone()))

        hooks.append(gate.register_forward_pre_hook(at_gate))
        hooks.append(block.experts.register_forward_pre_hook(at_experts, with_kwargs=True))
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return [tuple(row) for row in seen]


def by_expert(index: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    order = index.argsort(-1)
    return index.gather(-1, order), weight.gather(-1, order)


@pytest.mark.parametrize("case", CASES)
def test_same_experts_and_weights_as_the_model(case):
    model = build(case)
    tokens = torch.randint(1, 96, (4, 100))
    blocks = gates(model)
    assert blocks
    for (gate, block), (x, index, weight) in zip(blocks, used(model, tokens), strict=True):
        routing = router_from_gate(gate, block=block, config=model.config)(x)
        assert index.shape[0] == 400
        assert len(index.unique()) > 4, "the random router must use many experts for the test to mean something"
        if case.startswith(("deepseek", "glm4", "dots1", "minimax_m2")):  # unsorted top-k
            torch.testing.assert_close(
                by_expert(routing.index_TK, routing.weight_TK), by_expert(index, weight), atol=1e-6, rtol=0
            )
        else:
            torch.testing.assert_close((routing.index_TK, routing.weight_TK), (index, weight), atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", ["deepseek_v3", "deepseek_v2-groups", "ernie4_5", "minimax_m2", "lfm2"])
def test_bias_and_groups_change_something_in_these_models(case):
    """Guards the parity test: if biases and groups did not matter, it would not see a router that ignores them."""
    model = build(case)
    gate, block = gates(model)[0]
    x = torch.randn(300, 32)
    router = router_from_gate(gate, block=block)
    plain = Router(32, router.num_experts, router.top_k, score=router.score)
    plain.weight = router.weight
    same = (plain(x).index_TK.sort(-1).values == router(x).index_TK.sort(-1).values).all(-1)
    assert same.float().mean() < 0.9


@pytest.mark.parametrize(
    "case", ["mixtral", "gpt_oss", "deepseek_v3", "hunyuan_v1", "phimoe", "minimax_m2", "ernie4_5"]
)
def test_weights_are_shared_with_the_gate(case):
    gate, block = gates(build(case))[0]
    router = router_from_gate(gate, block=block)
    mine = {id(parameter) for parameter in router.parameters()}
    assert mine <= {id(parameter) for parameter in gate.parameters()}
    x = torch.randn(50, 32)
    router(x).weight.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in gate.parameters())
    if router.e_score_correction_bias is not None:
        owner = next(t for m in (gate, block) for n, t in m.state_dict().items() if "correction_bias" in n)
        router.e_score_correction_bias.fill_(3.0)
        assert (owner == 3.0).all()


def classes() -> dict[str, type[nn.Module]]:
    """Every transformers gate class that FAMILIES names, by stem."""
    found = {}
    pattern = re.compile(r"^class ((\w+?)(?:TokenChoice|Top[kK])?(?:Router|Gate))\(", re.MULTILINE)
    for file in Path(transformers.models.__path__[0]).glob("*/modeling_*.py"):
        for name, stem in pattern.findall(file.read_text(encoding="utf-8")):
            if stem in FAMILIES:
                module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
                found[stem] = getattr(module, name)
    return found


def test_every_known_family_routes_like_its_gate():
    """The gate class alone, built from a bag of settings, for all names in the table."""
    known = classes()
    assert len(known) > 30
    settings = SimpleNamespace(
        hidden_size=32, num_experts_per_tok=4, moe_topk=4, topk_method="group_limited_greedy", norm_topk_prob=True,
        n_group=4, topk_group=2, routed_scaling_factor=2.5, router_scaling_factor=2.5, route_scale=2.5,
        num_experts=16, num_local_experts=16, moe_num_experts=16, n_routed_experts=16, use_expert_bias=True,
        moe_norm_min=0.1, router_jitter_noise=0.2, input_jitter_noise=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    x = torch.randn(2, 150, 32)
    for stem, cls in known.items():
        gate, block = cls(settings).eval(), nn.Module()
        block.e_score_correction_bias = block.expert_bias = nn.Buffer(torch.randn(16) / 5)
        spread(gate)
        router = router_from_gate(gate, block=block)
        from_block = (FAMILIES[stem].correction_bias or "").startswith("block.")
        flat = x if stem == "Afmoe" else x.flatten(0, 1)
        _, weight, index = gate(flat, block.expert_bias) if from_block else gate(flat)
        routing = router(x.flatten(0, 1))
        ours, theirs = by_expert(routing.index_TK, routing.weight_TK), by_expert(index, weight)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0, msg=lambda text, stem=stem: f"{stem}: {text}")


@pytest.mark.parametrize(
    "case", ["mixtral", "olmoe", "qwen3-norm", "granitemoe", "gpt_oss", "deepseek_v3", "hunyuan_v1"]
)
def test_same_experts_in_bfloat16(case):
    """Where the family multiplies in half precision, so must we, or near ties go the other way."""
    model = build(case).to(torch.bfloat16)
    gate, block = gates(model)[0]
    x = torch.randn(400, 32, dtype=torch.bfloat16)
    _, weight, index = gate(x)
    routing = router_from_gate(gate, block=block)(x)
    ours, theirs = by_expert(routing.index_TK, routing.weight_TK), by_expert(index, weight.float())
    assert routing.weight.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=4e-3, rtol=1e-2)


def test_subclass_with_its_own_forward_is_refused():
    gate, _ = gates(build("olmoe"))[0]
    wrapped, other = copy.deepcopy(gate), copy.deepcopy(gate)
    wrapped.__class__ = type("Sharded", (type(gate),), {})
    other.__class__ = type("Other", (type(gate),), {"forward": lambda self, x: x})
    assert router_from_gate(wrapped).weight is wrapped.weight
    with pytest.raises(UnsupportedFamilyError, match=r"gate Other\b.*Mixtral"):
        router_from_gate(other)


def test_unknown_gate_names_the_known_ones():
    with pytest.raises(UnsupportedFamilyError, match=r"gate Linear of model type 'odd'.*DeepseekV3.*Mixtral"):
        router_from_gate(nn.Linear(4, 4), config=SimpleNamespace(model_type="odd"))


def test_bias_on_the_block_needs_the_block():
    gate, _ = gates(build("minimax_m2"))[0]
    with pytest.raises(ConfigError, match="pass block="):
        router_from_gate(gate)


def test_input_noise_that_is_left_out_is_announced():
    gate, block = gates(build("phimoe"))[0]
    gate.input_jitter_noise = 0.01
    with pytest.warns(UserWarning, match="noise in training"):
        router_from_gate(gate, block=block)


def test_our_router_passes_through():
    router = Router(8, 4, 2)
    assert router_from_gate(router) is router


def test_sparse_mixer_gradient_is_that_of_phimoe():
    """Same choice, same incoming gradient -> same gradient at the logits, in training (Heun's rule) and outside."""
    from transformers.models.phimoe.modeling_phimoe import PhimoeMultiplier

    from collegium.routing.parts import Scores
    from collegium.routing.selection import SparseMixer, SparseMixerWeights

    torch.manual_seed(0)
    logits = torch.randn(400, 8, requires_grad=True)
    scores = Scores(logits, logits.softmax(-1), logits.detach())
    context = RoutingContext(training=True, seed=1)
    index = SparseMixer(0.5)(scores, 2, context)
    weight = SparseMixerWeights(0.5)(scores, index, context)
    incoming = torch.randn(400, 2)
    (ours,) = torch.autograd.grad(weight, logits, incoming)

    theirs = torch.zeros_like(logits)
    taken = torch.zeros(400, 8, dtype=torch.bool)
    thirds = torch.empty(400, 2)
    for slot in range(2):
        open_ = logits.detach().masked_fill(taken, -torch.inf)
        best = open_.max(-1, keepdim=True).values
        far = (best - logits) / logits.abs().clamp(min=best) > 1.0
        gates_ = open_.masked_fill(far, -torch.inf).softmax(-1)
        chosen = index[:, slot : slot + 1]
        p = gates_.gather(-1, chosen)
        probe = logits.detach().clone().requires_grad_()
        PhimoeMultiplier.apply(probe, p, chosen, gates_, torch.ones_like(p)).backward(incoming[:, slot : slot + 1])
        theirs += probe.grad
        thirds[:, slot] = (weight[:, slot] / p[:, 0]).detach()
        taken.scatter_(-1, chosen, True)
        is_best = chosen == gates_.argmax(-1, keepdim=True)
        assert (thirds[is_best[:, 0], slot] - 1).abs().max() < 1e-5
        drawn = thirds[~is_best[:, 0], slot]
        assert len(drawn) > 50
        assert 0.6 < (drawn < 0.5).float().mean() < 0.9  # a third, three times out of four
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
