"""Claims of the routing systems that take an experiment of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from claim_base import SEEDS
from shrink_subjects import Subject
from torch import Tensor

from collegium import load
from collegium.data import document_batches, open_corpus
from collegium.layer import moe_layers
from collegium.measure import load as load_of
from collegium.routing.capacity import PositionCapacity, RandomCapacity
from collegium.trace import Trace

pytestmark = pytest.mark.claim

DOMAINS = 4
"""The largest, of which each is served by few experts."""


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def bits(outcomes: list[Any]) -> list[float]:
    return [one.bits_per_byte for one in outcomes]


# ---- EMO -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def preferred(subject: Subject, domain: str) -> list[Tensor]:
    """``[E]`` mean router probability of each layer, on the domain's calibration documents."""
    layers = moe_layers(subject.model)
    sums = {layer.gate: torch.zeros(layer.gate.num_experts) for layer in layers}

    def add(gate: Any, args: Any, routing: Any) -> None:
        sums[gate] += routing.probs.sum(0)

    handles = [gate.register_forward_hook(add) for gate in sums]
    batches = document_batches(
        subject.corpus, subject.tokenizer, "valid", sequence_length=128, batch_size=32, max_tokens=60_000
    )
    number = subject.corpus.domains.index(domain)
    for batch in batches:
        rows = (batch["domain"] == number).nonzero()[:, 0]
        if len(rows):
            subject.model(input_ids=batch["input_ids"][rows])
    for handle in handles:
        handle.remove()
    return list(sums.values())


def loss_with(subject: Subject, domain: str, kept: list[Tensor]) -> float:
    """Nats a token of the domain's held-out documents, when only these experts of each layer can be chosen."""
    for layer, ids in zip(moe_layers(subject.model), kept, strict=True):
        allowed = torch.zeros(layer.gate.num_experts, dtype=torch.bool)
        allowed[ids] = True
        own = type(layer.gate).logits
        layer.gate.logits = lambda x, gate=layer.gate, own=own, allowed=allowed: own(gate, x).masked_fill(
            ~allowed, -torch.inf
        )
    try:
        return subject.losses(subject.model)[domain]
    finally:
        for layer in moe_layers(subject.model):
            del layer.gate.logits


def rises(folder: Path, seed: int) -> tuple[float, float]:
    """How much a domain's loss rises with a quarter of the experts: of those it prefers, and at random."""
    subject = Subject("run", folder / "model", open_corpus("local", max_bytes_per_domain=2_000_000))
    whole = subject.losses(subject.model)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for domain in list(whole)[:DOMAINS]:
        sums = preferred(subject, domain)
        few = [one.topk(len(one) // 4).indices for one in sums]
        chance = [torch.randperm(len(one), generator=generator)[: len(one) // 4] for one in sums]
        found.append([loss_with(subject, domain, kept) - whole[domain] for kept in (few, chance)])
    return mean(one[0] for one in found), mean(one[1] for one in found)


def test_a_quarter_of_the_experts_serves_a_domain(experiment: Callable, claim: Callable) -> None:
    """EMO (2026): keeping a quarter of the experts, those that a domain prefers, costs much less than in a model that
    was trained without pools; the full model is not more than 2 % worse."""
    plain, pooled = experiment(), experiment("moe.router=emo")
    rise = [[rises(one.folder, seed) for seed, one in enumerate(arm)] for arm in (plain, pooled)]
    chosen, chance = ([[pair[which] for pair in arm] for arm in rise] for which in (0, 1))
    holds = max(chosen[1]) < min(chosen[0]) and mean(bits(pooled)) <= 1.02 * mean(bits(plain))
    for method in ("system/emo", "transform/document_pool"):
        claim(
            method,
            holds,
            f"nats a token more with a quarter of the experts: EMO {spread(chosen[1])}, without pools "
            f"{spread(chosen[0])}; experts at random {spread(chance[1])} and {spread(chance[0])}; all experts, bits "
            f"per byte {spread(bits(pooled))} and {spread(bits(plain))}; 3 seeds, {DOMAINS} domains",
        )


# ---- expert-router coupling ------------------------------------------------------------------------------------------


def dominance(folder: Path) -> float:
    """Share of the router rows that excite their own expert most, mean over layers."""
    shares = []
    for layer in moe_layers(load(folder / "model")):
        half = layer.experts.gate_up_proj.shape[1] // 2
        gate, rows = layer.experts.gate_up_proj[:, :half].float(), layer.gate.weight.float()
        excited = torch.einsum("id,jfd->ijf", rows, gate).norm(dim=-1)
        shares.append(float((excited.argmax(1) == torch.arange(len(rows))).float().mean()))
    return mean(shares)


def test_router_rows_excite_their_own_experts(experiment: Callable, claim: Callable) -> None:
    """Expert-Router Coupling (2025): rows and experts belong together afterwards, and the model is better."""
    plain, coupled = experiment(), experiment("moe.router=erc")
    share = [[dominance(one.folder) for one in arm] for arm in (plain, coupled)]
    for method in ("system/erc", "weight_loss/expert_router_coupling"):
        claim(
            method,
            min(share[1]) > max(share[0]) and mean(bits(coupled)) < mean(bits(plain)),
            f"rows that excite their own expert most {spread(share[1])}, without the loss {spread(share[0])}; bits per "
            f"byte {spread(bits(coupled))}, without {spread(bits(plain))}; 3 seeds",
        )


# ---- THOR ------------------------------------------------------------------------------------------------------------


def test_consistency_makes_experts_by_chance_better(experiment: Callable, claim: Callable) -> None:
    """THOR (2021): two passes that are drawn together beat two passes that are not."""
    together, apart = (
        experiment("moe.router=thor", f"objective={{consistency: {{alpha: {alpha}}}}}") for alpha in (1.0, 0.0)
    )
    for method in ("system/thor", "objective/consistency", "selection/random_expert"):
        claim(
            method,
            mean(bits(together)) < mean(bits(apart)),
            f"bits per byte {spread(bits(together))}, two passes without the divergence {spread(bits(apart))}; 3 seeds",
        )


# ---- losses and capacities -------------------------------------------------------------------------------------------


def test_the_entropy_loss_keeps_experts_few(experiment: Callable, claim: Callable) -> None:
    """Harder Tasks Need More Experts (2024): without the loss on the entropy, top-p takes more experts."""
    few, many = experiment("moe.router=dynamic_moe"), experiment("moe.router={dynamic_moe: {entropy: 0.0}}")
    active = [[one.active for one in arm] for arm in (few, many)]
    claim(
        "routing_loss/routing_entropy",
        mean(active[0]) < mean(active[1]),
        f"experts a token {spread(active[0])}, without the loss {spread(active[1])}; bits per byte {spread(bits(few))} "
        f"and {spread(bits(many))}; 3 seeds",
    )


def test_tau_moves_tokens_to_experts_that_cost_nothing(experiment: Callable, claim: Callable) -> None:
    """MoE++ (2024): the smaller tau, the fewer experts that compute."""
    low, high = (experiment(f"moe.router={{moe_plus_plus: {{tau: {tau}}}}}") for tau in (0.25, 0.75))
    active = [[one.active for one in arm] for arm in (low, high)]
    for method in ("routing_loss/class_balance", "capacity/two_class"):
        claim(
            method,
            max(active[0]) < min(active[1]),
            f"computing experts a token {spread(active[0])} with tau 0.25, {spread(active[1])} with 0.75; bits per "
            f"byte {spread(bits(low))} and {spread(bits(high))}; 3 seeds",
        )


def test_places_by_chance_have_no_favourite_positions(experiment: Callable, claim: Callable) -> None:
    """Z-code M3 (2021), capacity factor 1: by position the late tokens of a batch are dropped, by chance any."""
    late: dict[str, list[float]] = {"position": [], "random": []}
    early: dict[str, list[float]] = {"position": [], "random": []}
    for one in experiment():
        subject = Subject("run", one.folder / "model", open_corpus("local", max_bytes_per_domain=2_000_000))
        model = load(one.folder / "model").train()
        batch = next(iter(subject.held_out))["input_ids"]
        for name, capacity in (("position", PositionCapacity(1.0)), ("random", RandomCapacity(1.0))):
            shares = []
            for layer in moe_layers(model):
                layer.gate.capacity = capacity
            with torch.no_grad():
                model(input_ids=batch)
            for layer in moe_layers(model):
                dropped = (~layer.last.kept).float().view(batch.numel(), -1).mean(1).view(4, -1).mean(1)
                shares.append(dropped)
            early[name].append(float(torch.stack(shares)[:, 0].mean()))
            late[name].append(float(torch.stack(shares)[:, -1].mean()))
    more = {name: [b - a for a, b in zip(early[name], late[name], strict=True)] for name in late}
    claim(
        "capacity/random",
        min(more["position"]) > 0.02 and abs(mean(more["random"])) < 0.2 * mean(more["position"]),
        f"dropped in the first and last quarter of a batch: by position {spread(early['position'])} and "
        f"{spread(late['position'])}, by chance {spread(early['random'])} and {spread(late['random'])}; 3 models",
    )


def test_devices_are_loaded_alike(experiment: Callable, claim: Callable) -> None:
    """DeepSeekMoE (2024): the loss between devices evens out groups of experts, without any between experts."""
    loss = "moe.balance.losses=[{device_balance: {coefficient: 0.05, groups: 4}}]"
    devices, nothing = experiment("moe.balance.load_balancing=0", loss), experiment("moe.balance.load_balancing=0")
    violation = [[group_violation(one.folder, 4) for one in arm] for arm in (devices, nothing)]
    claim(
        "routing_loss/device_balance",
        max(violation[0]) < min(violation[1]),
        f"MaxVio of 4 groups {spread(violation[0])}, without the loss {spread(violation[1])}; bits per byte "
        f"{spread(bits(devices))} and {spread(bits(nothing))}; {len(SEEDS)} seeds",
    )


def group_violation(folder: Path, groups: int) -> float:
    """MaxVio of groups of neighbouring experts on held-out text, mean over layers."""
    found = []
    for at in load_of(Trace.open(folder / "trace")):
        counts = at.counts.reshape(groups, -1).sum(1)
        found.append(float(counts.max() / counts.mean() - 1))
    return mean(found)
