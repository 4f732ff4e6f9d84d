"""The loss of a recovery is its formula, whatever is done to hold few logits, and so is its gradient."""

from __future__ import annotations

import pytest
import torch

from collegium.compress.recover.losses import Distiller, Targets, token_losses
from collegium.train import objective
from tiny import families, tiny_inputs, tiny_model


def logits(rows: int = 7, vocabulary: int = 20, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 5, 18, 19, 64])
def test_what_is_not_kept_is_one_outcome(count: int) -> None:
    teacher, student, text = logits(seed=1), logits(), torch.arange(7)
    q, p = teacher.softmax(1), student.softmax(1)
    targets = Targets.of(teacher, count)
    assert targets.ids.shape == (7, min(count, 19))
    torch.testing.assert_close(targets.probability.sum(1) + targets.rest, torch.ones(7))
    lm, kd = token_losses(student, text, targets)
    torch.testing.assert_close(lm, -p[torch.arange(7), text].log())
    expected = []
    for t in range(7):
        kept = q[t].topk(min(count, 19)).indices
        others = torch.ones(20, dtype=torch.bool).index_fill(0, kept, False)
        expected.append(-(q[t, kept] * p[t, kept].log()).sum() - q[t, others].sum() * p[t, others].sum().log())
    torch.testing.assert_close(kd, torch.stack(expected))


def test_one_token_short_of_the_vocabulary_is_the_whole_cross_entropy() -> None:
    teacher, student = logits(seed=1), logits()
    _, kd = token_losses(student, torch.zeros(7, dtype=torch.long), Targets.of(teacher, 64))
    torch.testing.assert_close(kd, -(teacher.softmax(1) * student.log_softmax(1)).sum(1))


def test_a_student_that_predicts_what_the_teacher_does_is_left_alone() -> None:
    z = logits().requires_grad_()
    token_losses(z, torch.zeros(7, dtype=torch.long), Targets.of(logits(), 4))[1].sum().backward()
    assert float(z.grad.abs().max()) < 1e-6
    far = logits(seed=2).requires_grad_()
    token_losses(far, torch.zeros(7, dtype=torch.long), Targets.of(logits(), 4))[1].sum().backward()
    assert float(far.grad.abs().max()) > 1e-2


def test_far_apart_distributions_give_finite_losses_and_gradients() -> None:
    z = torch.full((1, 20), -300.0)
    z[0, 3] = 300.0
    z.requires_grad_()
    _, kd = token_losses(z, torch.tensor([3]), Targets.of(logits(1), 4))
    kd.sum().backward()
    assert bool(kd.isfinite().all())
    assert bool(z.grad.isfinite().all())


@pytest.mark.parametrize("family", families("qwen3_moe", "granitemoe"))  # the latter divides its logits
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_loss_and_gradients_are_those_of_the_formula(
    family: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled: dict[str, float] = {"logits_scaling": 2.0} if family == "granitemoe" else {}
    model, teacher = tiny_model(family, **scaled), tiny_model(family, seed=1, **scaled)
    inputs = tiny_inputs(model)
    target = inputs["input_ids"][:, 1:].reshape(-1)
    monkeypatch.setattr(objective, "CHUNK_BYTES", 5 * 4 * 64)  # five rows at a time
    targets = Distiller(teacher).targets(inputs, 8)
    with torch.no_grad():
        whole = Targets.of(teacher(**inputs).logits[:, :-1].reshape(target.numel(), -1), 8)
    assert targets.ids.equal(whole.ids)
    torch.testing.assert_close(targets.probability, whole.probability)
    torch.testing.assert_close(targets.rest, whole.rest)
    z = model(**inputs).logits[:, :-1].reshape(target.numel(), -1)
    lm, kd = token_losses(z, target, whole)
    expected = ((1 - share) * lm + share * kd).mean()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    distiller = Distiller(model)
    assert (distiller.weight is None) == (family == "granitemoe")
    loss, parts = distiller.loss(inputs, targets if share else None, share)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts, torch.stack([lm.mean(), kd.mean() if share else torch.zeros(())]))
    loss.backward()
    for name, p in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_frozen_head_gets_no_gradient_and_the_rest_the_same() -> None:
    model = tiny_model("qwen3_moe")
    inputs = tiny_inputs(model)
    targets = Distiller(tiny_model("qwen3_moe", seed=1)).targets(inputs, 8)
    gate = next(p for name, p in model.named_parameters() if name.endswith("gate.weight"))
    Distiller(model).loss(inputs, targets, 0.5)[0].backward()
    before = gate.grad.clone()
    model.zero_grad()
    for p in model.parameters():
        p.requires_grad_(p is gate)
    Distiller(model).loss(inputs, targets, 0.5)[0].backward()
    torch.testing.assert_close(gate.grad, before)
    assert all(p.grad is None for p in model.parameters() if p is not gate)
