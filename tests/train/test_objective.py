from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from collegium.train import objective
from collegium.train.objective import Objective


def tiny(family: str, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=97,
        initializer_range=0.3,
        **settings,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("family", "settings", "plain"),
    [
        ("qwen3", {"tie_word_embeddings": True}, True),
        ("llama", {"tie_word_embeddings": False}, True),
        ("granite", {"logits_scaling": 8.0}, False),
        ("gemma2", {"final_logit_softcapping": 3.0, "layer_types": ["full_attention"] * 2}, False),
    ],
)
def test_value_and_gradients_are_those_of_transformers(
    family: str, settings: dict[str, object], plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "CHUNK_BYTES", 4 * 97 * 7)  # 7 rows a chunk, the last one shorter
    model = tiny(family, **settings)
    ids = torch.randint(0, 97, (3, 12), generator=torch.Generator().manual_seed(1))
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    value = model(input_ids=ids, labels=ids).loss.item()
    model.zero_grad()

    ours = Objective(model)
    assert (ours.weight is not None) == plain
    assert model.training
    loss = ours.mean_loss({"input_ids": ids}, 3 * 11)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(ours.nats({"input_ids": ids}).mean(), loss.detach())


def test_gradient_follows_what_the_loss_is_multiplied_by() -> None:
    model = tiny("qwen3")
    ids = torch.arange(10)[None]
    grads = []
    for factor in (1.0, 3.0):
        model.zero_grad()
        (factor * Objective(model).mean_loss({"input_ids": ids}, 9.0)).backward()
        grads.append(model.get_input_embeddings().weight.grad.clone())
    torch.testing.assert_close(grads[1], 3 * grads[0])


def test_autocast_stays_near_float32() -> None:
    model = tiny("qwen3")
    ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(1))
    ours = Objective(model)
    exact = ours.mean_loss({"input_ids": ids}, 30.0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = ours.mean_loss({"input_ids": ids}, 30.0)
    rounded.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
    assert rounded.item() != exact.item()


@pytest.mark.parametrize("numba", [True, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("V", [3, 16, 17, 31, 97, 4096])
def test_nats_of_logits_and_their_gradient(V: int, numba: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(V)
    z = 10 * torch.randn(13, V, generator=generator)
    target = torch.randint(V, (26,), generator=generator)[::2]
    z[2, target[2]], z[3], z[4, target[4]] = -300.0, -1e4, 1e4  # what no softmax may overflow at
    exact = z.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, target, reduction="none")
    expected.sum().backward()
    if not numba:
        monkeypatch.setattr(objective, "missing", ImportError("no numba"))
    kept = z.clone()
    nats, gradient = objective._nats(z, target)
    torch.testing.assert_close(nats, expected.detach().float(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient, exact.grad.float(), rtol=1e-5, atol=1e-6)
    assert (gradient is z) == (numba and V >= 16), "the kernel works in place"
    kept[5, V // 2] = torch.nan
    nats, gradient = objective._nats(kept, target)
    assert nats.isnan().tolist() == [row == 5 for row in range(13)]
    assert gradient[5].isnan().any()
