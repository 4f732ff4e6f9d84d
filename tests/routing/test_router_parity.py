"""`router_from_gate` against what transformers models really hand to their experts.

Each model is tiny and random; its router weights are drawn large enough that the order of experts is not a tie.
"""

from __future__ import annotations

import copy
import importlib
import inspect
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
from collegium.routing.weighing import Raw

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
        if case == "deepseek_v2-groups":
            block.num_experts = 16  # read and not set by transformers before 5.13, where such models fail
    return model


def gates(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    found = []
    for block in model.modules():
        gate = getattr(block, "gate", None) or getattr(block, "router", None)
        # GraniteMoE before transformers 5.13 has two modules in the place of experts
        if gate is not None and (hasattr(block, "experts") or hasattr(block, "output_linear")):
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


Told = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""x, index and weight that a block gives to its experts."""


def used(module: nn.Module, *inputs: torch.Tensor) -> list[Told]:
    """What the experts of each MoE block in `module` are told, in order, while it runs on `inputs`."""
    seen: list[Told] = []

    def at_experts(module, args, kwargs):
        seen.append(tuple(t.clone() for t in (*args, *kwargs.values())[:3]))

    def at_grouping_gate(module, args, output):
        slot, _, weight, size, _ = output
        expert = torch.repeat_interleave(torch.tensor(size)).view(-1, 1)
        index, weight = (torch.empty_like(t).scatter(0, slot[:, None], t) for t in (expert, weight[:, None]))
        seen.append((args[0].clone(), index.view(-1, module.top_k), weight.view(-1, module.top_k)))

    hooks = [
        block.experts.register_forward_pre_hook(at_experts, with_kwargs=True)
        if hasattr(block, "experts")
        else gate.register_forward_hook(at_grouping_gate)
        for gate, block in gates(module)
    ]
    with torch.no_grad():
        module(*inputs)
    for hook in hooks:
        hook.remove()
    return seen


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


LOGITS_ONLY = {
    "DeepseekV3", "DeepseekV32", "Dots1", "ExaoneMoe", "Glm4Moe", "Glm4MoeLite", "Glm4vMoeText", "GlmMoeDsa",
    "HunYuanMoEV1", "Mistral4", "NemotronH", "SolarOpen",
}  # fmt: skip
"""In older releases the blocks of these decide; tests/models compares blocks of every family as a whole."""


def test_every_known_family_routes_like_its_gate():
    """The gate class alone, built from a bag of settings, for all names in the table."""
    known = classes()
    assert len(known) > 30
    settings = SimpleNamespace(
        hidden_size=32, num_experts_per_tok=4, moe_topk=4, moe_k=4, topk_method="group_limited_greedy",
        norm_topk_prob=True, n_group=4, topk_group=2, routed_scaling_factor=2.5, router_scaling_factor=2.5,
        route_scale=2.5, num_experts=16, num_local_experts=16, moe_num_experts=16, n_routed_experts=16,
        use_expert_bias=True, moe_norm_min=0.1, router_jitter_noise=0.2, input_jitter_noise=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    x = torch.randn(2, 150, 32)
    logits_only = set()
    for stem, cls in known.items():
        gate, block = cls(settings).eval(), nn.Module()
        block.e_score_correction_bias = block.expert_bias = nn.Buffer(torch.randn(16) / 5)
        spread(gate)
        on_block = "bias" in " ".join(inspect.signature(cls.forward).parameters)
        given = x if stem in ("Afmoe", *LOGITS_ONLY) else x.flatten(0, 1)
        output = gate(given, block.expert_bias) if on_block else gate(given)
        if isinstance(output, torch.Tensor):
            logits_only.add(stem)
            continue
        index = next(t for t in output if not t.is_floating_point())
        weight = next(t for t in output if t.is_floating_point() and t.shape == index.shape)
        routing = router_from_gate(gate, block=block)(x.flatten(0, 1))
        ours, theirs = by_expert(routing.index_TK, routing.weight_TK), by_expert(index, weight)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0, msg=lambda text, stem=stem: f"{stem}: {text}")
    assert logits_only <= LOGITS_ONLY


@pytest.mark.parametrize(
    "case", ["mixtral", "olmoe", "qwen3-norm", "granitemoe", "gpt_oss", "deepseek_v3", "hunyuan_v1"]
)
def test_same_experts_in_bfloat16(case):
    """Where the family multiplies in half precision, so must we, or near ties go the other way."""
    model = build(case).to(torch.bfloat16)
    gate, block = gates(model)[0]
    ((x, index, weight),) = used(block, torch.randn(4, 100, 32, dtype=torch.bfloat16))
    routing = router_from_gate(gate, block=block)(x)
    ours, theirs = by_expert(routing.index_TK, routing.weight_TK), by_expert(index, weight.float())
    assert routing.weight.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=4e-3, rtol=1e-2)


class Lfm2MoeSparseMoeBlock(nn.Module):
    """Named and made like LFM2-MoE's block before transformers 5.13, which decides for a plain Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k, self.norm_topk_prob, self.routed_scaling_factor, self.use_expert_bias = 3, True, 2.5, True
        self.gate, self.expert_bias = nn.Linear(32, 8, bias=False), nn.Buffer(torch.randn(8) / 5)

    def forward(self, x):
        scores = self.gate(x).sigmoid()
        index = (scores + self.expert_bias).topk(3).indices
        weight = scores.gather(-1, index)
        return index, 2.5 * weight / (weight.sum(-1, keepdim=True) + 1e-6)


def test_a_block_may_decide_for_its_gate():
    block, x = Lfm2MoeSparseMoeBlock(), torch.randn(300, 32)
    routing = router_from_gate(block.gate, block=block)(x)
    torch.testing.assert_close((routing.index_TK, routing.weight_TK), block(x))
    with pytest.raises(UnsupportedFamilyError, match=r"gate Linear; .*pass block="):
        router_from_gate(block.gate)
    block.__class__ = type("Other", (Lfm2MoeSparseMoeBlock,), {"forward": lambda self, x: x})
    with pytest.raises(UnsupportedFamilyError, match="gate Linear in Other"):
        router_from_gate(block.gate, block=block)


class DeepseekV3TopkRouter(nn.Module):
    """Named and made like DeepSeek-V3's gate before transformers 5.13, which gives logits only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.e_score_correction_bias = nn.Parameter(torch.randn(8, 32)), nn.Buffer(torch.zeros(8))

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


def test_what_a_gate_does_not_say_is_the_blocks():
    gate, block = DeepseekV3TopkRouter(), nn.Module()
    block.top_k, block.n_group, block.topk_group, block.routed_scaling_factor, block.norm_topk_prob = (
        2,
        4,
        1,
        3.0,
        False,
    )
    router = router_from_gate(gate, block=block)
    routing = router(torch.randn(50, 32))
    assert (router.top_k, router.routed_scaling_factor, router.weigh) == (2, 3.0, Raw())
    assert (routing.index_TK[:, 0] // 2 == routing.index_TK[:, 1] // 2).all(), "a token stays within its one group"
    with pytest.raises(ConfigError, match="DeepseekV3TopkRouter gets its top_k from the MoE block"):
        router_from_gate(gate)


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
