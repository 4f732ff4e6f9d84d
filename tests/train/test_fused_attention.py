"""Attention by kernels of our own, against torch's in double precision, and where it is used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from collegium.experts.compute.jit import LANES
from collegium.train import attention_kernels, fused
from collegium.train.fused import fuse_around_experts
from tiny import tiny_model

SCALE = 0.37


def states(B: int, H: int, G: int, S: int, D: int, seed: int = 0) -> list[Tensor]:
    """Queries, keys, values, and the gradient of what comes out ``[B, S, H, D]``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, S, D), (B, G, S, D), (B, G, S, D), (B, S, H, D)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def masks(kind: str, B: int, S: int) -> Tensor | None:
    """Causal; documents of uneven length; anything, with a row that sees nothing and keys that nobody sees."""
    if kind == "causal":
        return None
    if kind == "documents":
        document = torch.arange(B * S).view(B, S) // (S // 2 - 3)
        return (torch.ones(S, S).tril().bool() & (document[:, :, None] == document[:, None, :]))[:, None]
    mask = torch.rand(1, 1, S, S, generator=torch.Generator().manual_seed(5)) < 0.3
    mask[..., 3, :], mask[..., : LANES + 2], mask[..., S - 1] = False, False, False
    return mask


def ours(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor | None) -> list[Tensor]:
    """What comes out, and the gradients of the three."""
    leaves = [one.clone().requires_grad_() for one in (q, k, v)]
    y = fused._AttendFunction.apply(*leaves, mask, SCALE)
    y.backward(grad)
    return [y.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor | None) -> list[Tensor]:
    leaves = [one.double().requires_grad_() for one in (q, k, v)]
    n = q.shape[1] // k.shape[1]
    spread = [leaves[0], *(one.repeat_interleave(n, 1) for one in leaves[1:])]
    y = scaled_dot_product_attention(*spread, attn_mask=mask, is_causal=mask is None, scale=SCALE).transpose(1, 2)
    y.backward(grad.double())
    return [one.float() for one in (y.detach(), *(leaf.grad for leaf in leaves))]  # type: ignore[union-attr]


def compare(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["causal", "documents", "anything"])
@pytest.mark.parametrize(
    ("B", "H", "G", "S", "D"),
    [(1, 1, 1, 2 * LANES, LANES), (3, 6, 2, 64, 2 * LANES), (2, 4, 4, 5 * LANES, 5 * LANES), (2, 3, 1, 256, 32)],
    ids=str,
)
def test_values_and_gradients_are_those_of_attention(B: int, H: int, G: int, S: int, D: int, kind: str) -> None:
    *inputs, mask = *states(B, H, G, S, D), masks(kind, B, S)
    compare(ours(*inputs, mask), exact(*inputs, mask))


def test_large_scores_do_not_overflow() -> None:
    q, k, v, grad = states(1, 2, 1, 64, 2 * LANES)
    found, expected = ours(60 * q, 60 * k, v, grad, None), exact(60 * q, 60 * k, v, grad, None)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-3)
    assert all(one.isfinite().all() for one in found)


def test_nan_is_seen() -> None:
    q, k, v, grad = states(1, 2, 1, 64, 2 * LANES)
    q[0, 1, 40, 3] = torch.nan
    y = ours(q, k, v, grad, None)[0]
    assert y[0, 40, 1].isnan().all()
    assert y.isnan().sum() == y.shape[-1]


def test_tensors_may_lie_in_any_order() -> None:
    inputs = states(2, 4, 2, 64, 2 * LANES)
    expected = ours(*inputs, None)
    q, k, v, grad = (one.transpose(1, 2).contiguous().transpose(1, 2) for one in inputs)
    assert not q.is_contiguous()
    for one, other in zip(ours(q, k, v, grad, None), expected, strict=True):
        assert torch.equal(one, other)
    backwards = inputs[3].transpose(2, 3).contiguous().transpose(2, 3)
    for one, other in zip(ours(*inputs[:3], backwards, None), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["causal", "documents"])
def test_bits_do_not_depend_on_the_number_of_threads(kind: str) -> None:
    inputs, mask = states(3, 4, 2, 64, 2 * LANES), masks(kind, 3, 64)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ours(*inputs, mask))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_which_heads_the_kernels_take() -> None:
    q = torch.empty(2, 4, 64, 2 * LANES)
    mask = torch.ones(2, 1, 64, 64, dtype=torch.bool)
    assert fused._fits(q, None)
    assert fused._fits(q, mask)
    assert fused._fits(q, mask[:1])
    assert not fused._fits(q[:, :, :-1], None)
    assert not fused._fits(q[..., 1:], None)
    assert not fused._fits(torch.empty(1, 1, 1024 + LANES, LANES), None)
    assert not fused._fits(q, mask.float()), "numbers are added to scores"
    assert not fused._fits(q, mask.expand(2, 4, 64, 64)), "a mask of its own for each head"
    assert not fused._fits(q, mask[..., :32])


def small_model() -> Any:
    torch.manual_seed(0)
    model = tiny_model("qwen3", head_dim=2 * LANES).train()
    model.config._attn_implementation = "sdpa"
    return model


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels of attention that ran."""
    names: list[str] = []
    real = attention_kernels.address
    monkeypatch.setattr(attention_kernels, "address", lambda name: names.append(name) or real(name))
    return names


@pytest.mark.parametrize("kind", ["causal", "documents"])
def test_a_model_attends_by_them(called: list[str], kind: str) -> None:
    model = small_model()
    other = copy.deepcopy(model)
    fuse_around_experts(other)
    ids = torch.randint(3, 64, (2, 4 * LANES), generator=torch.Generator().manual_seed(1))
    mask = masks(kind, 2, 4 * LANES)
    logits = []
    for one in (model, other):
        called.clear()
        logits.append(one(input_ids=ids, attention_mask=mask, use_cache=False).logits)
        logits[-1].pow(2).sum().backward()
    assert called == ["attend"] * 2 + ["attend_back"] * 2
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
    for (name, p), found in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.grad, p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()), msg=name)


@pytest.mark.parametrize("why", ["dropout", "length", "another implementation", "not causal"])
def test_a_model_attends_by_torch(called: list[str], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    fuse_around_experts(model)
    called.clear()
    length, more = 4 * LANES, {"is_causal": False} if why == "not causal" else {}
    if why == "dropout":
        model.model.layers[0].self_attn.attention_dropout = 0.1
        model.model.layers[1].self_attn.attention_dropout = 0.1
    elif why == "length":
        length -= 1
    elif why == "another implementation":
        known = fused.AttentionInterface._global_mapping
        monkeypatch.setitem(known, "mine", known["sdpa"])
        model.config._attn_implementation_internal = "mine"
    model(input_ids=torch.ones(1, length, dtype=torch.int64), use_cache=False, **more).logits.sum().backward()
    assert called == []
