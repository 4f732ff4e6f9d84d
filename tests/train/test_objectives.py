"""What a step minimises: values and gradients beside the plain formulas, replay, resumption, processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from collegium.catalog import methods
from collegium.errors import ConfigError
from collegium.layer import balance_losses, moe_layers, use_context
from collegium.models import MoEConfig, install
from collegium.routing.record import RoutingContext
from collegium.train import Recipe, loop, objective, read_metrics, train
from collegium.train.objective import Objective
from collegium.train.objectives import MicroBatch, as_said, find_objective
from collegium.train.objectives.consistency import Consistency, pair_loss

Make = Callable[..., Recipe]
V, B, S = 97, 3, 12
SCRIPT = """
import sys
from collegium.train import Recipe, train
train(Recipe.load(sys.argv[1]), sys.argv[2])
"""


def tiny(family: str = "qwen3", router: Any = "thor", **settings: object) -> Any:
    """A model of two layers with experts by chance."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": V, "initializer_range": 0.3}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **shape, **settings))
    moe = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router": router}
    return install(model, MoEConfig.model_validate(moe)).train()


def batch_of(model: Any, **more: Any) -> MicroBatch:
    ids = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))
    context = RoutingContext(step=3, seed=5, micro_batch=1, position=torch.arange(S).repeat(B))
    return MicroBatch(Objective(model), {"input_ids": ids}, context, predicted=B * (S - 1), **more)


def naive(first: Tensor, second: Tensor, target: Tensor, alpha: float) -> Tensor:
    """Half of the paper's loss, from its formula."""
    p, q = first.float().softmax(-1), second.float().softmax(-1)
    kl = [(a * (a.log() - b.log())).sum(-1) for a, b in ((p, q), (q, p))]
    text = [-one.gather(1, target[:, None])[:, 0].log() for one in (p, q)]
    return ((text[0] + text[1] + alpha * (kl[0] + kl[1]) / 2) / 2).mean()


@pytest.mark.parametrize(
    ("family", "settings", "plain"),
    [("qwen3", {"tie_word_embeddings": True}, True), ("qwen3", {}, True), ("granite", {"logits_scaling": 8.0}, False)],
)
@pytest.mark.parametrize("alpha", [0.0, 2.5])
def test_a_step_has_the_value_and_gradients_of_the_formula(
    family: str, settings: dict[str, Any], plain: bool, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "CHUNK_BYTES", 2 * 4 * V * 7)  # 7 rows a chunk, the last one shorter
    model = tiny(family, **settings)
    batch = batch_of(model)
    assert (batch.predictor.weight is not None) == plain
    logits = []
    for draw in range(2):
        with batch.routed(draw):
            logits.append(model(**batch.inputs).logits[:, :-1].reshape(-1, V))
    expected = naive(*logits, batch.inputs["input_ids"][:, 1:].reshape(-1), alpha)
    expected.backward()
    right = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    parts = Consistency(alpha).step(batch)
    assert set(parts) == {"loss", "consistency"}
    torch.testing.assert_close(parts["loss"] + parts["consistency"], expected.detach())
    assert (parts["consistency"] > 0) == (alpha > 0)
    for name, p in model.named_parameters():
        one, other = (torch.zeros_like(p) if grad is None else grad for grad in (p.grad, right[name]))
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_the_loss_alone_is_differentiable_like_any_other() -> None:
    model = tiny()
    predictor = Objective(model)
    made = torch.Generator().manual_seed(2)
    first, second = (torch.randn(20, 32, generator=made, requires_grad=True) for _ in range(2))
    target = torch.randint(0, V, (20,), generator=made)
    wrt = [first, second, predictor.weight]
    expected = naive(first @ predictor.weight.T, second @ predictor.weight.T, target, 1.5)
    loss, parts = pair_loss(predictor, first, second, target, 1.5, 20)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts.sum(), expected.detach())
    ours, theirs = torch.autograd.grad(3 * loss, wrt), torch.autograd.grad(3 * expected, wrt)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    alike, [text, apart] = pair_loss(predictor, first, first, target, 1.5, 20)
    assert apart == 0
    assert alike == text


def test_the_divergence_of_sure_predictions_is_finite() -> None:
    sure = torch.eye(4) * 400
    text, apart = pair_loss(_Head(None), sure, sure.roll(1, 0), torch.arange(4), 1.0, 4)[1]
    assert torch.isfinite(text)
    assert apart == pytest.approx(400 / 2)


class _Head:
    """What of a predictor `pair_loss` looks at."""

    def __init__(self, weight: Tensor | None) -> None:
        self.weight = weight


def test_the_passes_choose_other_experts_and_a_step_replays_them() -> None:
    model = tiny()
    chosen: list[tuple[int, ...]] = []
    for moe in moe_layers(model):
        moe.experts.register_forward_pre_hook(lambda _, args: chosen.append(tuple(args[1].expert.tolist())))
    batch = batch_of(model)
    chosen.clear()
    Consistency().step(batch)
    first = list(chosen)
    assert len(first) == 4
    assert all(len(set(one)) == 1 for one in first), "one draw serves the micro-batch"
    assert first[:2] != first[2:]
    Consistency().step(batch)
    assert chosen[4:] == first
    # the first pass is the one that any other objective makes
    chosen.clear()
    with use_context(model, batch.context):
        model(**batch.inputs)
    assert chosen == first[:2]


@pytest.mark.parametrize("router", ["thor", {"switch": {"load_balancing": 0.5}}])
def test_recomputed_activations_give_the_same_gradients(router: Any) -> None:
    grads, counts = [], []
    for recompute in (False, True):
        model = tiny(router=router, attention_dropout=0.2)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = batch_of(model)
        calls: list[None] = []
        moe_layers(model)[0].experts.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        torch.manual_seed(4)
        parts = Consistency(2.0).step(batch)
        assert len(calls) == (4 if recompute else 2)
        grads.append({name: p.grad for name, p in model.named_parameters()} | parts)
        counts.append(torch.stack([moe.balance.stats.sync() for moe in moe_layers(model)]))
    assert counts[0].sum() == 2 * 2 * B * S
    assert torch.equal(*counts)
    for name, grad in grads[0].items():
        assert (grad is None) == (grads[1][name] is None), name
        if grad is not None:
            torch.testing.assert_close(grads[1][name], grad, msg=lambda m, name=name: f"{name}: {m}")


def test_balance_losses_are_means_over_the_passes() -> None:
    model = tiny(router=None)
    batch = batch_of(model, micro_batches=2)
    parts = Consistency().step(batch)
    gates = [moe.gate.weight.grad.clone() for moe in moe_layers(model)]
    model.zero_grad()
    for moe in moe_layers(model):
        moe.balance.stats.reset()
    plain = find_objective("next_token").step(batch)
    # nothing is drawn here, so both passes are this one
    for name in ("loss", "load_balancing"):
        torch.testing.assert_close(parts[name], plain[name])
    assert parts["consistency"] == pytest.approx(0, abs=1e-6)
    for one, moe in zip(gates, moe_layers(model), strict=True):
        torch.testing.assert_close(one, moe.gate.weight.grad, rtol=1e-3, atol=1e-6)


def test_the_next_token_is_the_step_as_it_was() -> None:
    model = tiny(router=None)
    batch = batch_of(model, micro_batches=3)
    with use_context(model, batch.context):
        loss = batch.predictor.mean_loss(batch.inputs, batch.predicted)
        balance = {name: value / 3 for name, value in balance_losses(model).items()}
        torch.stack([loss, *balance.values()]).sum().backward()
    right = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for moe in moe_layers(model):
        moe.balance.stats.reset()
    parts = find_objective("next_token").step(batch)
    assert list(parts) == ["loss", *balance]
    assert torch.equal(parts["loss"], loss.detach())
    assert all(torch.equal(p.grad, one) for p, one in zip(model.parameters(), right, strict=True))


def test_autocast_stays_near_float32() -> None:
    found = []
    for precision in (torch.float32, torch.bfloat16):
        model = tiny()
        found.append(Consistency().step(batch_of(model, precision=precision)))
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    assert found[0]["loss"].item() == pytest.approx(found[1]["loss"].item(), rel=0.03)
    assert found[0]["loss"].item() != found[1]["loss"].item()


@pytest.mark.parametrize("name", [one.name for one in methods("objective")])
def test_every_objective_gives_its_loss_first_and_trains_all_that_is_used(name: str) -> None:
    model = tiny(router=None)
    parts = find_objective(name).step(batch_of(model))
    assert next(iter(parts)) == "loss"
    assert all(value.dim() == 0 and not value.requires_grad and value.isfinite() for value in parts.values())
    used = {pname for pname, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("embed" in one for one in used)
    assert any("experts" in one for one in used)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("next_tokn", "no objective is named 'next_tokn'; did you mean 'next_token'"),
        ({"consistency": {"alfa": 1}}, "no setting 'alfa'; did you mean 'alpha'"),
        ({"consistency": -1}, "at least 0, not -1"),
        ({"consistency": {"alpha": float("nan")}}, "at least 0, not nan"),
        ({"next_token": 1}, "no settings"),
        ({"next_token": {}, "consistency": {}}, "write a name"),
        (None, "write a name"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_words(settings: Callable[..., dict[str, Any]], said: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find_objective(said)
    with pytest.raises(ConfigError, match=f"objective: .*{words}"):
        Recipe.parse(settings(objective=said))


def test_a_recipe_says_an_objective_in_one_way(recipe: Make) -> None:
    whole = {"consistency": {"alpha": 1.0}}
    for said in ("consistency", {"consistency": {}}, {"consistency": 1}, whole):
        assert as_said(said) == whole
        assert recipe(objective=said).objective == whole
    assert recipe().objective == recipe(objective={"next_token": {}}).objective == "next_token"
    assert recipe().differences(recipe(objective="consistency")) != []
    plan = recipe(objective={"consistency": 3})
    assert Recipe.parse(plan.plain()) == plan


THOR: dict[str, Any] = {"moe__router": "thor", "objective": {"consistency": {"alpha": 2.0}}}


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model" / "model.safetensors")


def test_a_resumed_run_ends_with_the_same_bits(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = recipe(**THOR, run__steps=6, run__checkpoint_every=3)
    real = loop.after_step

    def stopped(model: nn.Module, step: int) -> None:
        real(model, step)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "after_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(plan, tmp_path / "killed")
    monkeypatch.setattr(loop, "after_step", real)
    train(plan, tmp_path / "killed")
    train(plan, tmp_path / "whole")
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    table = read_metrics(tmp_path / "whole" / "metrics.jsonl").filter(event="step")
    assert table["consistency"].null_count() == 0
    assert "load_balancing" not in table.columns


def test_two_processes_give_the_step_of_one(recipe: Make, tmp_path: Path) -> None:
    # random choices are those of a micro-batch, so there are as many of them on one side as on the other
    one = recipe(**THOR, run__steps=4, run__accumulate=2, optim__eps=1e-6)
    two = recipe(**THOR, run__steps=4, optim__eps=1e-6)
    (tmp_path / "two.yaml").write_text(two.dump())
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "script.py"), str(tmp_path / "two.yaml"), str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    train(one, tmp_path / "one")
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(
            weights(tmp_path / "two")[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    tables = [read_metrics(tmp_path / name / "metrics.jsonl").filter(event="step") for name in ("one", "two")]
    for column in ("loss", "consistency", "grad_norm", "max_violation"):
        assert tables[0][column].to_list() == pytest.approx(tables[1][column].to_list(), rel=1e-4), column


def test_agreement_grows_where_it_is_asked_for(recipe: Make, tmp_path: Path) -> None:
    apart = {}
    for alpha in (0.0, 5.0):
        plan = recipe(**{**THOR, "objective": {"consistency": alpha}}, moe__num_experts=8, run__steps=30)
        train(plan, tmp_path / str(alpha))
        model = loop.models.load(tmp_path / str(alpha) / "model").train()
        ids = torch.randint(5, 290, (8, 32), generator=torch.Generator().manual_seed(1))
        contexts = [RoutingContext(seed=3, step=step) for step in range(8)]
        batches = [MicroBatch(Objective(model), {"input_ids": ids}, one, predicted=8 * 31) for one in contexts]
        apart[alpha] = sum(Consistency(1.0).step(one)["consistency"].item() for one in batches)
    assert apart[5.0] < apart[0.0]
