"""The load-balancing loss against its definition and transformers; its scopes, masks, merges and conversions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from collegium.balance import LoadStats, load_balancing_loss, router_z_loss
from collegium.errors import ConfigError
from collegium.routing.record import Routing


def routing_of(logits: Tensor, k: int, **fields: Tensor) -> Routing:
    """Softmax top-k of ``[T, E]`` logits."""
    probs = logits.float().softmax(-1)
    weight, index = probs.topk(k)
    return Routing.from_topk(index, weight, logits.shape[1], logits=logits, probs=probs, **fields)


def random_routing(T: int = 12, E: int = 6, k: int = 2, seed: int = 0, **fields: Tensor) -> Routing:
    return routing_of(torch.randn(T, E, generator=torch.Generator().manual_seed(seed)), k, **fields)


def round_robin(T: int, E: int, k: int, probs: Tensor) -> Routing:
    """Every expert gets T*k/E assignments, whatever the probabilities say."""
    index = torch.arange(T * k).reshape(T, k) % E
    return Routing.from_topk(index, torch.full((T, k), 1 / k), E, probs=probs)


@given(E=st.integers(2, 8), k=st.integers(1, 3), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_uniform_load_is_exactly_one_whatever_the_probabilities(E: int, k: int, seed: int) -> None:
    probs = torch.rand(2 * E, E, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    k = min(k, E)
    assert load_balancing_loss(round_robin(2 * E, E, k, probs)).item() == pytest.approx(1, abs=1e-6)


@given(load=st.lists(st.integers(0, 20), min_size=2, max_size=8).filter(any))
@settings(max_examples=50, deadline=None)
def test_where_probability_equals_load_uniform_is_the_minimum(load: list[int]) -> None:
    expert = torch.arange(len(load)).repeat_interleave(torch.tensor(load))
    share = torch.tensor(load).float() / sum(load)
    routing = Routing.from_topk(
        expert[:, None], torch.ones(len(expert), 1), len(load), probs=share.expand(len(expert), -1)
    )
    loss = load_balancing_loss(routing).item()
    assert loss >= 1 - 1e-6
    assert loss == pytest.approx(len(load) * float(share.square().sum()), rel=1e-5)


def test_gradient_flows_through_probabilities_only_and_pushes_the_overloaded_expert_down() -> None:
    logits = torch.zeros(8, 4)
    logits[:, 0] = 0.5
    logits.requires_grad_()
    load_balancing_loss(routing_of(logits, 1)).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_one_layer_is_k_times_smaller_than_transformers() -> None:
    logits = torch.randn(20, 8)
    for k in (1, 2, 3):
        theirs = load_balancing_loss_func((logits,), 8, k)
        ours = routing_of(logits, k)
        assert k * load_balancing_loss(ours) == pytest.approx(theirs.item(), rel=1e-5)
        assert load_balancing_loss(ours, normalizer="tokens") == pytest.approx(theirs.item(), rel=1e-5)


def test_transformers_pools_layers_into_one_routing_and_lets_opposite_imbalances_cancel() -> None:
    first = torch.full((16, 4), 0.0)
    first[:, 0] = 5.0
    second = first.flip(-1)
    theirs = load_balancing_loss_func((first, second), 4, 1)
    pooled = load_balancing_loss(routing_of(torch.cat([first, second]), 1))
    per_layer = (load_balancing_loss(routing_of(first, 1)) + load_balancing_loss(routing_of(second, 1))) / 2
    assert pooled.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert per_layer > 1.9 * pooled


def test_transformers_padding_mask_agrees_with_valid() -> None:
    logits = torch.randn(20, 8)
    mask = torch.ones(4, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    theirs = load_balancing_loss_func((logits,), 8, 2, mask)
    ours = load_balancing_loss(routing_of(logits, 2, valid=mask.flatten().bool()), normalizer="tokens")
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_megatron_form() -> None:
    # probabilities summed over tokens, counts, E / (T * T * K)
    routing = random_routing(T=15, E=5, k=3)
    megatron = (routing.probs.sum(0) * routing.counts()).sum() * 5 / (15 * 15 * 3)
    assert load_balancing_loss(routing).item() == pytest.approx(megatron.item(), rel=1e-5)


def test_fairseq_counts_the_first_choice_only() -> None:
    routing = random_routing(T=40, E=5, k=2)
    top1 = torch.nn.functional.one_hot(routing.probs.argmax(-1), 5).float().mean(0)
    fairseq = 5 * (top1 * routing.probs.mean(0)).sum()
    assert load_balancing_loss(routing, counts="first").item() == pytest.approx(fairseq.item(), rel=1e-5)
    assert load_balancing_loss(routing, counts="first") != load_balancing_loss(routing)


def test_sigmoid_scores_are_normalised_per_token() -> None:
    logits = torch.randn(10, 4) - 12
    probs = logits.sigmoid()
    routing = Routing.from_topk(logits.topk(2).indices, torch.ones(10, 2), 4, probs=probs)
    rescaled = Routing.from_topk(logits.topk(2).indices, torch.ones(10, 2), 4, probs=probs * 1e-3)
    assert load_balancing_loss(routing) == pytest.approx(load_balancing_loss(rescaled).item(), rel=1e-5)


def test_padding_is_in_neither_counts_nor_probabilities() -> None:
    routing = random_routing(T=12)
    valid = torch.arange(12) < 7
    padded = load_balancing_loss(random_routing(T=12, valid=valid))
    cut = routing_of(routing.logits[:7], 2)
    assert padded.item() == pytest.approx(load_balancing_loss(cut).item(), rel=1e-6)
    assert load_balancing_loss(routing, token_mask=valid).item() == pytest.approx(padded.item(), rel=1e-6)
    z = router_z_loss(random_routing(T=12, valid=valid))
    assert z.item() == pytest.approx(router_z_loss(cut).item(), rel=1e-6)


def test_no_tokens_give_zero_and_a_gradient() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    nothing = torch.zeros(4, dtype=torch.bool)
    routing = routing_of(logits, 2, valid=nothing)
    total = load_balancing_loss(routing) + router_z_loss(routing)
    total.backward()
    assert total.item() == 0
    assert logits.grad.abs().max() == 0
    empty = routing_of(torch.randn(0, 3), 2)
    assert load_balancing_loss(empty).item() == 0


def test_counts_before_after_drops_and_of_true_experts() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.5, 0.4], [0.2, 0.2, 0.6]])
    routing = Routing(
        torch.tensor([0, 1, 1, 2, 2, 0]),
        torch.ones(6),
        3,
        3,
        slots=2,
        probs=probs,
        kept=torch.tensor([True, True, False, True, True, True]),
        num_true=2,
    )
    P = probs.mean(0)
    assert load_balancing_loss(routing).item() == pytest.approx(3 * float((torch.tensor([2, 2, 2]) / 6 * P).sum()))
    kept = 3 * (torch.tensor([2, 1, 2]) / 5 * P).sum()
    assert load_balancing_loss(routing, counts="kept").item() == pytest.approx(kept.item())
    P_true = (probs[:, :2] / probs[:, :2].sum(-1, keepdim=True)).mean(0)
    true = 2 * (torch.tensor([2, 1]) / 3 * P_true).sum()
    assert load_balancing_loss(routing, counts="true").item() == pytest.approx(true.item())


def test_sequence_scope_weights_sequences_by_their_tokens() -> None:
    routing = random_routing(T=10)
    sequence = torch.tensor([7] * 4 + [3] * 6)
    alone = [
        load_balancing_loss(routing_of(routing.logits[sequence == s], 2)) * int((sequence == s).sum()) for s in (7, 3)
    ]
    got = load_balancing_loss(routing, scope="sequence", sequence=sequence)
    assert got.item() == pytest.approx((sum(alone) / 10).item(), rel=1e-5)
    # one sequence is the micro-batch
    one = load_balancing_loss(routing, scope="sequence", sequence=torch.zeros(10, dtype=torch.int64))
    assert one.item() == pytest.approx(load_balancing_loss(routing).item(), rel=1e-6)


def test_ragged_routing_divides_by_the_assignments_there_are() -> None:
    probs = torch.rand(3, 4).softmax(-1)
    expert = torch.tensor([0, 1, 2, 3])
    ragged = Routing(expert, torch.ones(4), 3, 4, ragged_token=torch.tensor([0, 0, 0, 2]), probs=probs)
    assert load_balancing_loss(ragged).item() == pytest.approx(1, abs=1e-6)


def test_merging_by_device_is_deepseeks_device_loss() -> None:
    routing = random_routing(T=30, E=6, k=2)
    device = torch.tensor([0, 1, 1, 0, 2, 2])
    f = 6 / (2 * 30) * routing.counts().float()  # DeepSeekMoE's f, 1 at balance
    P = routing.probs.mean(0)
    theirs = sum(f[device == i].mean() * P[device == i].sum() for i in range(3))
    assert load_balancing_loss(routing, merge=device).item() == pytest.approx(theirs.item(), rel=1e-5)


def test_merging_null_experts_makes_them_interchangeable() -> None:
    index = torch.tensor([[0, 2], [1, 2], [0, 2], [1, 2]])  # all null choices fall on expert 2, none on 3
    routing = Routing.from_topk(index, torch.ones(4, 2), 4, probs=torch.full((4, 4), 0.25))
    merge = torch.tensor([0, 1, 2, 2])
    skewed = Routing.from_topk(index, torch.ones(4, 2), 4, probs=torch.tensor([0.1, 0.1, 0.8, 0.0]).expand(4, -1))
    assert load_balancing_loss(routing, merge=merge).item() == pytest.approx(1, abs=1e-6)
    assert load_balancing_loss(skewed, merge=merge).item() == pytest.approx(1, abs=1e-6)
    assert load_balancing_loss(skewed).item() > 1.5


@given(eta=st.lists(st.floats(0.2, 2), min_size=3, max_size=3))
@settings(max_examples=20, deadline=None)
def test_class_weights_move_the_minimum_to_their_inverse(eta: list[float]) -> None:
    weight = torch.tensor(eta)
    best = (1 / weight) / (1 / weight).sum()

    def loss(share: Tensor) -> float:
        stats = LoadStats(3)
        stats.add((share * 1e6).round().long())
        routing = Routing.from_topk(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), 3, probs=share[None])
        return load_balancing_loss(routing, scope="global", stats=stats, class_weight=weight).item()

    for other in (torch.full((3,), 1 / 3), best.roll(1), (best + torch.tensor([0.05, -0.05, 0.0])).abs()):
        assert loss(best) <= loss(other / other.sum()) + 1e-4


def test_global_scope_uses_the_micro_batches_so_far() -> None:
    first, second = random_routing(seed=1), random_routing(seed=2)
    stats = LoadStats(6)
    for routing in (first, second):
        stats.add(routing.counts(), routing.num_tokens)
        pooled = load_balancing_loss(routing, scope="global", stats=stats)
        f = stats.sync().float() / stats.sync().sum()
        assert pooled.item() == pytest.approx(6 * float((f * routing.probs.mean(0)).sum()), rel=1e-5)
    assert stats.sync().equal(first.counts() + second.counts())
    per_token = load_balancing_loss(second, scope="global", stats=stats, normalizer="tokens")
    assert per_token.item() == pytest.approx(2 * pooled.item(), rel=1e-5)


def test_z_loss_is_the_squared_logsumexp() -> None:
    routing = random_routing()
    by_hand = sum(torch.log(row.exp().sum()) ** 2 for row in routing.logits) / 12
    assert router_z_loss(routing).item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"scope": "sequence"}, "sequence"),
        ({"scope": "global"}, "LoadStats"),
        ({"scope": "galactic"}, "galactic"),
        ({"counts": "twice"}, "assigned, kept, true, first"),
        ({"normalizer": "hidden_size"}, "hidden_size"),
        ({"merge": torch.zeros(5, dtype=torch.int64)}, "merge"),
        ({"class_weight": torch.ones(7)}, "class_weight"),
        ({"scope": "global", "stats": LoadStats(5)}, "5 experts"),
        ({"scope": "global", "stats": LoadStats(6), "counts": "kept"}, "counts="),
    ],
)
def test_missing_or_clashing_parts_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_balancing_loss(random_routing(), **settings)


def test_losses_name_what_the_routing_lacks() -> None:
    bare = Routing.from_topk(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), 3)
    with pytest.raises(ConfigError, match=r"routing\.probs"):
        load_balancing_loss(bare)
    with pytest.raises(ConfigError, match="keep_logits"):
        router_z_loss(bare)
