"""Claims of the routing systems that are read off the arena's table (``recipes/arena.yaml``).

Every one is the paper's effect against the baseline it names, with equal computation for a token. A difference of means
counts; the seeds' ranges are beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from arena_results import Arm, arm

from collegium.routing import router_from

pytestmark = pytest.mark.claim

Claim = Callable[[str, bool, str], None]
BITS, VIOLATION, ACTIVE = "bits_per_byte", "max_violation", "active_experts"


def bits_of(one: Arm, other: Arm) -> str:
    return f"bits per byte {one.says(BITS)}, {other.name} {other.says(BITS)}"


def report(claim: Claim, methods: list[str], holds: bool, numbers: str) -> None:
    for method in methods:
        claim(method, holds, f"{numbers}; arena, {len(arm('top_k').numbers[BITS])} seeds")


def test_finer_and_shared_experts_are_better(claim: Claim) -> None:
    """DeepSeekMoE (2024): experts cut in four, one of them shared, as many parameters and as much computation."""
    fine, coarse = arm("deepseek_moe"), arm("top_k")
    report(
        claim,
        ["system/deepseek_moe"],
        fine.mean(BITS) < coarse.mean(BITS),
        f"{bits_of(fine, coarse)}; parameters {fine.mean('parameters') / 1e6:.2f} M against "
        f"{coarse.mean('parameters') / 1e6:.2f} M",
    )


def test_groups_even_out_devices_at_little_cost(claim: Claim) -> None:
    """Pangu Pro MoE (2025): devices that hold a group each are loaded alike whatever the tokens; loss within 1 %."""
    grouped, plain = arm("moge"), arm("top_k")
    T, E, K, groups = 16, 64, 8, 8
    uneven = {}
    for name, select in (("moge", {"grouped_top_k": {"groups": groups}}), ("top_k", "top_k")):
        router = router_from({"select": select}, E, E, K)
        with torch.no_grad():
            router.weight.copy_(torch.eye(E))
        counts = [router(torch.randn(T, E)).counts().view(groups, -1).sum(1) for _ in range(200)]
        uneven[name] = sum(bool((one.max() > one.min()).item()) for one in counts) / len(counts)
    holds = uneven["moge"] == 0 and uneven["top_k"] > 0.99 and grouped.mean(BITS) <= 1.01 * plain.mean(BITS)
    report(
        claim,
        ["system/moge", "selection/grouped_top_k"],
        holds,
        f"batches of 16 tokens with uneven devices: {uneven['moge']:.0%}, top-k {uneven['top_k']:.0%}; "
        f"{bits_of(grouped, plain)}",
    )


def test_harder_tokens_get_more_experts(claim: Claim) -> None:
    """Harder Tasks Need More Experts (2024): not worse than top-2 with no more experts on average."""
    dynamic, plain = arm("dynamic_moe"), arm("top_k")
    holds = dynamic.mean(BITS) <= plain.mean(BITS) and dynamic.mean(ACTIVE) <= plain.mean(ACTIVE)
    report(
        claim,
        ["system/dynamic_moe", "selection/top_p"],
        holds,
        f"{bits_of(dynamic, plain)}; experts a token {dynamic.says(ACTIVE)} with a deviation of "
        f"{dynamic.says('active_spread')}, top_k 2",
    )


def test_null_experts_let_tokens_differ(claim: Claim) -> None:
    """AdaMoE (2024): as many true experts on average as top-2, but not the same for each token; not worse."""
    null, plain = arm("adamoe"), arm("top_k")
    near = abs(null.mean(ACTIVE) - 2) <= 0.2
    holds = near and null.mean("active_spread") > 0 and null.mean(BITS) <= plain.mean(BITS)
    report(
        claim,
        ["system/adamoe", "zero_expert/zero"],
        holds,
        f"{bits_of(null, plain)}; true experts a token {null.says(ACTIVE)} with a deviation of "
        f"{null.says('active_spread')}",
    )


def test_experts_without_computation_save_some(claim: Claim) -> None:
    """MoE++ (2024): better than top-2 of as many computing experts, with fewer of them for a token."""
    plus, plain = arm("moe_plus_plus"), arm("top_k")
    holds = plus.mean(BITS) <= plain.mean(BITS) and plus.mean(ACTIVE) < plain.mean(ACTIVE)
    report(
        claim,
        ["system/moe_plus_plus", "zero_expert/constant", "zero_expert/copy", "transform/gating_residual"],
        holds,
        f"{bits_of(plus, plain)}; computing experts a token {plus.says(ACTIVE)}, top_k 2",
    )


def test_switch_is_as_good_and_faster(claim: Claim) -> None:
    """Switch Transformers (2021): one expert a token does not cost quality against two of half the width, with the same
    capacity factor, and trains faster."""
    switch, gshard = arm("switch"), arm("gshard")
    speed = switch.mean("tokens_per_second") / gshard.mean("tokens_per_second")
    report(
        claim,
        ["system/switch"],
        switch.mean(BITS) <= gshard.mean(BITS) and speed > 1,
        f"{bits_of(switch, gshard)}; {speed:.2f} times its tokens per second",
    )


def test_a_capacity_limit_costs_little(claim: Claim) -> None:
    """GShard (2020): with a balance loss, 1.25 times an even share is room enough."""
    limited, free = arm("gshard"), arm("top_k")
    report(
        claim,
        ["system/gshard", "capacity/position"],
        limited.mean(BITS) <= 1.01 * free.mean(BITS),
        f"{bits_of(limited, free)} without a limit",
    )


def test_places_by_chance_are_not_worse(claim: Claim) -> None:
    """Z-code M3 (2021): places by chance instead of by position are not worse in quality."""
    chance, position = arm("random_token_selection"), arm("gshard")
    report(
        claim,
        ["system/random_token_selection"],
        chance.mean(BITS) <= position.mean(BITS),
        bits_of(chance, position),
    )


def test_experts_that_choose_are_loaded_alike(claim: Claim) -> None:
    """Expert Choice (2022): even load without a loss. Its faster convergence is not judged: in a causal model its
    training looks at later tokens."""
    choice, plain = arm("expert_choice"), arm("top_k")
    report(
        claim,
        ["system/expert_choice", "selection/expert_choice"],
        max(choice.numbers[VIOLATION]) < min(plain.numbers[VIOLATION]),
        f"MaxVio on held-out text {choice.says(VIOLATION)}, top_k with a loss {plain.says(VIOLATION)}",
    )


def test_a_few_transport_plans_balance(claim: Claim) -> None:
    """Selective Sinkhorn Routing (2025): in 1 % of the steps, without a loss: fewer dead experts and better balance
    than nothing at all, and quality not worse."""
    ssr, nothing = arm("ssr"), arm("unbalanced")
    dead = [one.mean("dead_experts") for one in (ssr, nothing)]
    holds = (
        ssr.mean(VIOLATION) < nothing.mean(VIOLATION)
        and (dead[0] < dead[1] or max(dead) == 0)
        and ssr.mean(BITS) <= nothing.mean(BITS)
    )
    report(
        claim,
        ["system/ssr", "transform/selective_sinkhorn"],
        holds,
        f"MaxVio {ssr.says(VIOLATION)}, without any balancing {nothing.says(VIOLATION)}; dead experts {dead[0]:.1%} "
        f"and {dead[1]:.1%}; {bits_of(ssr, nothing)}",
    )


def test_a_bias_balances_better_than_the_loss(claim: Claim) -> None:
    """Auxiliary-Loss-Free Load Balancing (2024): more even than with the loss, and not worse."""
    free, loss = arm("loss_free"), arm("top_k")
    report(
        claim,
        ["system/loss_free"],
        free.mean(VIOLATION) < loss.mean(VIOLATION) and free.mean(BITS) <= loss.mean(BITS),
        f"MaxVio {free.says(VIOLATION)}, with the loss {loss.says(VIOLATION)}; {bits_of(free, loss)}",
    )


def test_routing_that_looks_around_is_steadier(claim: Claim) -> None:
    """Graph of Tokens (2025): fewer changes of route late in training, quality not worse."""
    graph, plain = arm("graph_of_tokens"), arm("top_k")
    report(
        claim,
        ["system/graph_of_tokens", "transform/attention_mix"],
        graph.mean("fluctuation") < plain.mean("fluctuation") and graph.mean(BITS) <= plain.mean(BITS),
        f"tokens with other experts after the last third of training {graph.says('fluctuation')}, top_k "
        f"{plain.says('fluctuation')}; {bits_of(graph, plain)}",
    )


def test_experts_in_sequence_are_better(claim: Claim) -> None:
    """Chain-of-Experts (2025): two iterations of one expert each against two experts at once."""
    chain, plain = arm("chain_of_experts"), arm("top_k")
    report(claim, ["system/chain_of_experts"], chain.mean(BITS) < plain.mean(BITS), bits_of(chain, plain))
