"""What every score, transform, selection and weighing must do, over all catalogued ones that choose K experts by what a
token alone says; `test_check_router` runs over the others, too."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from collegium.catalog import methods
from collegium.errors import ConfigError
from collegium.layer import MoE, moe_layers
from collegium.models import MoEConfig, install
from collegium.routing import Router, RoutingContext, check_parts, router_from
from collegium.routing.parts import Part, Score, Scores, Selection, Transform, Weigh
from collegium.routing.scores import Sigmoid, Softmax
from collegium.routing.selection import GroupedTopK, RandomExpert, SparseMixer, SparseMixerWeights, TopK
from collegium.routing.transforms import GroupLimit, LogitSelection, SelectionBias
from collegium.routing.weighing import Renormalised, SoftmaxSelected
from collegium.routing.weighing_except import RenormalisedExcept
from tiny import tiny_inputs, tiny_model

T, E, D = 40, 8, 16
BASES = {"score": Score, "transform": Transform, "selection": Selection, "weigh": Weigh}

EXAMPLES: dict[tuple[str, str], list[Part]] = {
    ("transform", "group_limit"): [GroupLimit(4, 2), GroupLimit(4, 2, "max", 0.0)],
    ("selection", "sparse_mixer"): [SparseMixer(), SparseMixer(0.5)],
    ("weigh", "sparse_mixer"): [SparseMixerWeights(0.5)],
    ("selection", "grouped_top_k"): [GroupedTopK(1)],
    ("weigh", "renormalised_except"): [RenormalisedExcept(2)],
    ("transform", "document_pool"): [],
    ("transform", "attention_mix"): [],
    ("weigh", "renormalised"): [Renormalised(), Renormalised(epsilon=1e-6), Renormalised(minimum=0.9)],
}
"""Settings to test where the defaults do not do, or are not all there is; none where a part looks at more than the
token (see test_check_router)."""

COMPANIONS = {SparseMixerWeights(0.5): {"selection": SparseMixer(0.5), "transforms": (LogitSelection(),)}}
"""What a part needs beside it in a router."""


def members(kind: str) -> list[Part]:
    found: list[Part] = []
    for entry in methods(kind):
        found += EXAMPLES[kind, entry.name] if (kind, entry.name) in EXAMPLES else [entry.obj()]
    return [part for part in found if part.learns and not part.remembers and getattr(part, "fixed", True)]


ALL = [part for kind in BASES for part in members(kind)]


def router_with(part: Part, top_k: int = 3) -> Router:
    slot = next(kind for kind, base in BASES.items() if isinstance(part, base))
    settings = {"transforms": (part,)} if slot == "transform" else {slot: part}
    router = Router(D, E, top_k, **{**COMPANIONS.get(part, {}), **settings})
    torch.manual_seed(0)
    router.reset_parameters(std=0.5)
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias.normal_(std=0.3)
    return router


def contexts() -> list[RoutingContext]:
    return [RoutingContext(), RoutingContext(training=True, seed=3, step=5)]


def random_scores(seed: int = 0) -> Scores:
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(seed))
    probs = logits.softmax(-1)
    return Scores(logits, probs, probs, torch.linspace(-0.3, 0.3, E))


def test_every_kind_has_members():
    assert {kind: len(members(kind)) >= 2 for kind in BASES} == dict.fromkeys(BASES, True)


@pytest.mark.parametrize("part", ALL, ids=str)
def test_part_is_a_frozen_dataclass_of_its_kind(part):
    entry = next(m for kind in BASES for m in methods(kind) if m.obj is type(part))
    assert isinstance(part, BASES[entry.kind])
    assert dataclasses.fields(part) is not None
    assert hash(part) == hash(dataclasses.replace(part))
    with pytest.raises(dataclasses.FrozenInstanceError):
        part.anything = 1
    assert torch.nn.Module not in type(part).__mro__


@pytest.mark.parametrize("part", members("score"), ids=str)
def test_scores_are_non_negative_finite_and_ordered(part):
    logits = torch.randn(T, E) * torch.logspace(-3, 3, T)[:, None]
    probs = part(logits)
    assert probs.shape == logits.shape
    assert torch.isfinite(probs).all()
    assert (probs >= 0).all()
    order = logits.argsort(-1)
    assert (probs.gather(-1, order).diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("part", members("transform"), ids=str)
@pytest.mark.parametrize("context", contexts(), ids=["inference", "training"])
def test_transforms_are_pure(part, context):
    scores = random_scores()
    before = [t.clone() for t in (scores.logits, scores.probs, scores.selection)]
    out = part(scores, context)
    for tensor, copy in zip((scores.logits, scores.probs, scores.selection), before, strict=True):
        assert torch.equal(tensor, copy)
    assert out.selection.shape == (T, E)
    assert not out.selection.isnan().any()
    assert (out.probs >= 0).all()


@pytest.mark.parametrize("part", members("selection"), ids=str)
@pytest.mark.parametrize("context", contexts(), ids=["inference", "training"])
def test_selection_never_picks_an_expert_twice_and_picks_k(part, context):
    for k in range(1, E + 1):
        index = part(random_scores(k), k, context)
        used = index < E
        assert index.dtype == torch.int64
        assert index.min() >= 0
        assert index.max() <= E
        for row, mask in zip(index, used, strict=True):
            assert row[mask].unique().numel() == mask.sum()
        if part.fixed:
            assert index.shape == (T, k)
            assert used.all()


@pytest.mark.parametrize("part", members("selection"), ids=str)
@pytest.mark.parametrize("context", contexts(), ids=["inference", "training"])
def test_selection_leaves_forbidden_experts_alone(part, context):
    scores = random_scores()
    forbidden = torch.rand(T, E).argsort(-1) < 5
    scores = dataclasses.replace(scores, selection=scores.logits.masked_fill(forbidden, -torch.inf))
    index = part(scores, 3, context)
    chosen = torch.zeros(T, E + 1, dtype=torch.bool).scatter(-1, index, True)[:, :E]
    assert not (chosen & forbidden).any()


@pytest.mark.parametrize("part", members("weigh"), ids=str)
@pytest.mark.parametrize("context", contexts(), ids=["inference", "training"])
def test_weights_are_finite_non_negative_and_per_choice(part, context):
    routing = router_with(part)(torch.randn(T, D), context)
    weight = routing.weight_TK
    assert torch.isfinite(weight).all()
    assert (weight >= 0).all()
    assert (weight > 0).any(-1).all()


@pytest.mark.parametrize("part", ALL, ids=str)
@pytest.mark.parametrize("context", contexts(), ids=["inference", "training"])
def test_gradient_reaches_the_router_weight_but_not_through_selection(part, context):
    router, x = router_with(part), torch.randn(T, D)
    target = torch.randn(T * 3)
    for read in (lambda r: (r.weight * target).sum(), lambda r: r.probs.square().sum()):
        router.zero_grad()
        read(router(x, context)).backward()
        assert torch.isfinite(router.weight.grad).all()
        assert router.weight.grad.abs().sum() > 0
    router.keep_logits = True
    assert not router(x, context).selection.requires_grad


@pytest.mark.parametrize("part", ALL, ids=str)
@pytest.mark.parametrize("context", contexts(), ids=["inference", "training"])
def test_same_key_replays_and_the_global_generator_is_untouched(part, context):
    router, x = router_with(part), torch.randn(T, D)
    state = torch.get_rng_state()
    first, second = router(x, context), router(x, context)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.expert, second.expert)
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("part", [p for p in ALL if p.batch_invariant], ids=str)
def test_batch_invariant_parts_route_a_token_alone_as_in_company(part):
    router, x = router_with(part), torch.randn(T, D)
    together = router(x)
    for t in range(0, T, 5):
        alone = router(x[t : t + 1])
        assert torch.equal(alone.index_TK[0], together.index_TK[t])
        torch.testing.assert_close(alone.weight_TK[0], together.weight_TK[t], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("part", [p for p in ALL if p.causal], ids=str)
def test_causal_parts_do_not_see_later_tokens(part):
    router, x = router_with(part), torch.randn(T, D)
    changed = x.clone()
    changed[20:] = torch.randn(20, D)
    before, after = router(x), router(changed)
    assert torch.equal(before.index_TK[:20], after.index_TK[:20])
    assert not torch.equal(before.index_TK[20:], after.index_TK[20:])


# What single methods promise


@pytest.mark.parametrize("limit", EXAMPLES["transform", "group_limit"], ids=str)
def test_group_limit_keeps_each_token_in_its_best_groups(limit):
    router = router_with(limit)
    router.keep_logits = True
    routing = router(torch.randn(T, D))
    groups = routing.index_TK // 2
    assert all(row.unique().numel() <= 2 for row in groups)
    per_group = routing.probs.unflatten(-1, (4, 2))
    score = per_group.amax(-1) if limit.group_score == "max" else per_group.sum(-1)
    best = score.topk(2).indices
    assert (groups[..., None] == best[:, None, :]).any(-1).all()


def test_selection_bias_moves_choices_but_no_weight():
    router = router_with(SelectionBias())
    x = torch.randn(T, D)
    router.e_score_correction_bias.zero_()
    plain = router(x)
    router.e_score_correction_bias[5] = 2.0
    biased = router(x)
    assert (biased.index_TK == 5).any(-1).all()
    assert not (plain.index_TK == 5).any(-1).all()
    torch.testing.assert_close(biased.probs, plain.probs)
    torch.testing.assert_close(biased.weight_TK, biased.probs.gather(-1, biased.index_TK))


def test_logits_separate_what_a_saturated_softmax_cannot():
    logits = torch.zeros(1, E)
    logits[0, 2], logits[0, 5], logits[0, 6] = 300.0, 100.0, 99.0
    probs = logits.softmax(-1)
    scores = Scores(logits, probs, probs)
    assert probs[0, 5] == probs[0, 6] == 0
    assert TopK()(LogitSelection()(scores, RoutingContext()), 3, RoutingContext()).tolist() == [[2, 5, 6]]


def test_softmax_selected_is_the_renormalised_softmax():
    a, b = router_with(SoftmaxSelected()), router_with(Renormalised())
    x = torch.randn(T, D)
    torch.testing.assert_close(a(x).weight, b(x).weight)


def test_sparse_mixer_draws_from_the_candidates_only_in_training():
    scores = Scores(*(torch.tensor([[4.0, 3.9, 1.0, 0.5]]).expand(4000, 4),) * 3)
    first = SparseMixer(0.05)(scores, 1, RoutingContext(training=True)).squeeze(1).bincount(minlength=4) / 4000
    expected = torch.tensor([4.0, 3.9]).softmax(-1)
    torch.testing.assert_close(first[:2], expected, atol=0.03, rtol=0)
    assert first[2:].sum() == 0
    assert (SparseMixer(0.05)(scores, 2, RoutingContext()) == torch.tensor([0, 1])).all()
    other_step = SparseMixer(0.05)(scores, 1, RoutingContext(training=True, step=1))
    assert not torch.equal(other_step, SparseMixer(0.05)(scores, 1, RoutingContext(training=True)))


# Experts by chance


def experts_by_chance(inference: str, **context) -> torch.Tensor:
    """``[T, 2]``: who computes at inference."""
    router = Router(D, E, 2, selection=RandomExpert(inference=inference))
    return router(torch.randn(T, D), RoutingContext(**context)).index_TK


def test_each_token_draws_by_its_position():
    position = torch.arange(T) % 20
    index = experts_by_chance("token", position=position)
    assert torch.equal(index[:20], index[20:])
    assert len(index[:20].unique(dim=0)) > 10


@pytest.mark.parametrize(
    "context",
    [
        {"shape": (8, 5)},
        {"document": torch.arange(8).repeat_interleave(5) + 1000},
        {"document": torch.arange(T) % 8, "position": torch.arange(T), "shape": (2, 20)},
    ],
    ids=["rows", "documents", "documents in rows"],
)
def test_a_sequence_keeps_its_experts_and_others_draw_theirs(context):
    index = experts_by_chance("sequence", **context)
    of = context.get("document", torch.arange(8).repeat_interleave(5))
    drawn = [index[of == one].unique(dim=0) for one in of.unique()]
    assert all(len(one) == 1 for one in drawn)
    assert len(torch.cat(drawn).unique(dim=0)) > 4
    other = experts_by_chance("sequence", layer=1, **context)
    assert not torch.equal(index, other)
    assert torch.equal(other, experts_by_chance("sequence", layer=1, step=9, micro_batch=3, **context))
    experts_by_chance("sequence", seed=2**62, **context)


def test_all_experts_are_drawn_alike():
    index = experts_by_chance("sequence", document=torch.arange(T) + 7)
    counts = sum(
        experts_by_chance("sequence", document=torch.arange(T) + start).flatten().bincount(minlength=E)
        for start in range(0, 4000, T)
    )
    assert index.shape == (T, 2)
    assert counts.sum() == 8000
    assert (counts - 1000).abs().max() < 4 * 1000**0.5


@pytest.mark.parametrize("layer", [{}, {"shared": 8}], ids=["routed", "with shared"])
def test_an_ensemble_is_the_mean_of_all_experts(layer):
    router = router_from({"select": {"random_expert": {"inference": "ensemble"}}, "weigh": "even"}, D, E, 1)
    moe = MoE(D, 12, E, 1, router=router, **layer).eval()
    moe.reset_parameters(0.3)
    x = torch.randn(2, 5, D)
    outputs = []
    for gate_up, down in zip(moe.experts.gate_up_proj, moe.experts.down_proj, strict=True):
        gate, up = (x @ gate_up.T).chunk(2, -1)
        outputs.append((torch.nn.functional.silu(gate) * up) @ down.T)
    expected = torch.stack(outputs).mean(0)
    if layer:
        expected = expected + moe.shared_experts(x)
    torch.testing.assert_close(moe(x), expected)
    moe.train()(x)
    assert moe.last.index_TK.unique().numel() == 1, "in training one expert serves the micro-batch"


def test_an_ensemble_leaves_forbidden_experts_out():
    said = {"transforms": [{"group_limit": {"groups": 4, "keep": 1}}]}
    said |= {"select": {"random_expert": {"inference": "ensemble"}}, "weigh": "even"}
    router = router_from(said, D, E, 1)
    x = torch.randn(T, D) * 50
    routing = router(x)
    best = router.logits(x).softmax(-1).view(T, 4, 2).topk(2).values.sum(-1).argmax(-1)
    assert torch.equal(routing.expert.view(T, 2), 2 * best[:, None] + torch.arange(2))
    assert (routing.weight == 0.5).all()


@pytest.mark.parametrize("inference", ["token", "sequence", "ensemble"])
def test_a_model_writes_with_a_cache_as_without(inference):
    settings = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = MoEConfig.model_validate({**settings, "router": {"thor": {"inference": inference}}})
    model = install(tiny_model("qwen3"), config).eval()
    ids = tiny_inputs(model, batch=3, length=12)["input_ids"]
    seen = []
    moe_layers(model)[-1].experts.register_forward_pre_hook(lambda _, args: seen.append(args[1].to_topk()[0]))
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        found = model(input_ids=ids[:, :4], use_cache=True)
        logits = [found.logits]
        for at in range(4, 12):
            found = model(input_ids=ids[:, at : at + 1], past_key_values=found.past_key_values, use_cache=True)
            logits.append(found.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-5)
    pieces = torch.cat([one.view(3, -1, one.shape[-1]) for one in seen[1:]], 1)
    assert torch.equal(seen[0].view_as(pieces), pieces)
    experts = [len(row.unique()) for row in pieces]
    assert experts == [1] * 3 if inference == "sequence" else min(experts) > 1


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 9}, "top_k is 9 but the layer has 8 experts"),
        ({"top_k": 0}, "top_k is 0 but the layer has 8 experts"),
        ({"transforms": [GroupLimit(3, 1)]}, r"groups \(n_group\) is 3, which does not divide 8 experts"),
        ({"transforms": [GroupLimit(0, 1)]}, r"groups \(n_group\) is 0"),
        ({"transforms": [GroupLimit(4, 5)]}, r"keep \(topk_group\) is 5; with 4 groups it must be 1 to 4"),
        ({"transforms": [GroupLimit(4, 1)], "top_k": 3}, "top_k is 3, but 1 groups of 2 experts hold only 2"),
        ({"transforms": [GroupLimit(8, 4)], "top_k": 2}, "'top2_sum' needs two experts per group"),
        ({"transforms": [GroupLimit(4, 2, "mean")]}, "group_score is 'mean'"),
        ({"selection": RandomExpert("step")}, "unit is 'step'; it must be 'batch' or 'token'"),
        ({"selection": RandomExpert(inference="mean")}, "inference is 'mean'; it must be 'token', 'sequence' or"),
        ({"weigh": SparseMixerWeights()}, "SparseMixer.*the router has Softmax"),
        ({"weigh": SparseMixerWeights(), "selection": SparseMixer(0.5), "transforms": [LogitSelection()]}, "0.01"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_configured(settings, message):
    with pytest.raises(ConfigError, match=message):
        Router(D, E, **{"top_k": 2, **settings})


@dataclasses.dataclass(frozen=True)
class LooksAhead(Transform):
    causal = False
    train_only = True
    needs_documents = True

    def __call__(self, scores: Scores, context: RoutingContext) -> Scores:
        return scores


def test_parts_are_refused_where_they_cannot_serve():
    router = Router(D, E, 2, transforms=[LooksAhead()])
    check_parts(router.parts)
    with pytest.raises(ConfigError, match=r"LooksAhead acts in training only"):
        check_parts(router.parts, inference=True)
    with pytest.raises(ConfigError, match=r"LooksAhead lets a token's routing depend on later tokens"):
        check_parts(router.parts, causal_decoding=True)
    check_parts(Router(D, E, 2, score=Sigmoid()).parts, inference=True, causal_decoding=True)


def test_a_context_that_lacks_what_a_part_needs_is_refused():
    router = Router(D, E, 2, transforms=[LooksAhead()])
    with pytest.raises(ConfigError, match=r"LooksAhead needs RoutingContext\.document"):
        router(torch.randn(3, D))
    router(torch.randn(3, D), RoutingContext(document=torch.zeros(3, dtype=torch.int64)))


def test_selection_bias_without_a_bias_is_refused():
    scores = dataclasses.replace(random_scores(), correction_bias=None)
    with pytest.raises(ConfigError, match="correction_bias, which is None"):
        SelectionBias()(scores, RoutingContext())
    assert Router(D, E, 2, score=Softmax()).e_score_correction_bias is None
