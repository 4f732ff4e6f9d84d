"""What routers do, counted; and what a model puts out when one expert is left out, against the model without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shrinking import batches, made_up_plan
from test_collectors import DOMAINS, EVERY, Seen, run

from collegium.compress import collectors_substitute
from collegium.compress.collectors import Ballots, CoActivations, LeaveOneOut, LogitGram
from collegium.compress.mask import apply_mask
from collegium.errors import UnsupportedFamilyError
from collegium.measure import site_batch
from collegium.measure.super_experts import DownMax
from collegium.sites import sites, tap
from tiny import families, tiny_model

VALID = torch.cat([batch["attention_mask"].flatten().bool() for batch in batches()])
DOMAIN = torch.cat([batch["domain"][:, None].expand(2, 10).flatten() for batch in batches()])


def test_ballots_products_of_logits_and_pairs() -> None:
    model, recorder = tiny_model("qwen3_moe"), Seen()
    with tap(model, recorder, logits=True):
        found = run(model, Ballots(), LogitGram(), CoActivations())
    for site in sites(model):
        routings = recorder.routings[site.path]
        logits = torch.cat([one.logits for one in routings])[VALID]
        index = torch.cat([one.index_TK for one in routings])[VALID]
        for code, name in enumerate(DOMAINS):
            ballots = torch.zeros(8, 8, dtype=torch.int64)
            for row in logits[DOMAIN[VALID] == code]:
                for place, e in enumerate(row.argsort(descending=True).tolist()):
                    ballots[e, place] += 1
            assert found.get(site.layer, "ballots", name).equal(ballots)
        torch.testing.assert_close(found.get(site.layer, "z_gram").float(), logits.T @ logits, rtol=1e-5, atol=1e-5)
        pairs = torch.zeros(8, 8, dtype=torch.int64)
        for row in index.tolist():
            for a in row:
                for b in row:
                    pairs[a, b] += 1
        assert found.get(site.layer, "coact").equal(pairs)
        assert found.get(site.layer, "coact").diagonal().equal(found.get(site.layer, "n"))


def first_block(model: Any) -> list[torch.Tensor]:
    """What the experts of the first layer put out together, for each batch ``[T, d]``."""
    seen: list[torch.Tensor] = []
    handle = sites(model)[0].experts.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        for batch in batches():
            model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    handle.remove()
    return [one.reshape(20, -1) for one in seen]


@pytest.mark.parametrize(
    "family", families("qwen3_moe", "olmoe", "mixtral", "gpt_oss", "granitemoe", "minimax_m2", "phimoe")
)
def test_an_expert_left_out_is_one_that_the_model_does_not_have(family: str) -> None:
    model = tiny_model(family).eval()
    site = sites(model)[0]
    if family == "minimax_m2":  # a bias that would bring any expert back
        site.block.e_score_correction_bias.copy_(torch.linspace(3, 6, site.num_experts))
    recorder, layers, E = Seen(), len(sites(model)), site.num_experts
    with tap(model, recorder):
        found = run(model, LeaveOneOut())
    index = torch.cat([one.index_TK for one in recorder.routings[site.path]])
    whole = torch.cat(first_block(model))
    changed = 0
    for e in range(E):
        keep = [[i for i in range(E) if i != e or layer] for layer in range(layers)]
        with apply_mask(model, made_up_plan(keep, E)):
            error = (torch.cat(first_block(model)) - whole).square().mean(1)
        for code, name in enumerate(DOMAINS):
            live = (index == e).any(1) & VALID & DOMAIN.eq(code)
            got = found.get(0, "loo_mse", name)[e].item()
            assert got == pytest.approx(error[live].sum().item(), rel=1e-3, abs=1e-9)
            changed += got > 0
    assert changed > 4  # where the bias decides, few experts are ever chosen


def test_groups_of_experts_are_limited_as_the_router_limits_them() -> None:
    found = run(tiny_model("deepseek_v3"), LeaveOneOut())
    for layer in found.layers:
        assert (found.get(layer, "loo_mse") > 0).equal(found.get(layer, "n") > 0)


def test_where_no_router_is_known_it_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedFamilyError, match=r"llama4_text.*leave_one_out"):
        run(tiny_model("llama4_text"), LeaveOneOut())
    with pytest.raises(UnsupportedFamilyError, match=r"gemma4_text.*no router is known.*leave_one_out"):
        run(tiny_model("gemma4_text"), LeaveOneOut())


def test_a_router_that_is_not_followed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = collectors_substitute.router_from_gate

    def another(gate: Any, **settings: Any) -> Any:
        router = made(gate, **settings)
        router.routed_scaling_factor = 2.0
        return router

    monkeypatch.setattr(collectors_substitute, "router_from_gate", another)
    with pytest.raises(UnsupportedFamilyError, match="not told what its router decides"):
        run(tiny_model("qwen3_moe"), LeaveOneOut())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_cutting_a_batch_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    collectors = [*EVERY, Ballots(), LogitGram(), CoActivations(), LeaveOneOut(), DownMax()]
    whole = run(model, *collectors)
    site = sites(model)[0]
    monkeypatch.setattr(site_batch, "PIECE", 3 * site.top_k * 32)
    monkeypatch.setattr(collectors_substitute, "_CHUNK", 100)
    parts = run(model, *collectors)
    for key, tensor in whole.tensors.items():
        torch.testing.assert_close(parts.tensors[key], tensor, rtol=1e-5, atol=1e-5, msg=str(key))
