"""Norms in one call: which are taken, and that they compute the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm

from collegium.experts.compute.jit import LANES, missing
from collegium.offload.norm import FusedNorm, fuse_norms

pytestmark = pytest.mark.skipif(missing is not None or LANES == 4, reason="no vectors to compute with")


def norm(width: int, eps: float = 1e-5) -> nn.Module:
    torch.manual_seed(width)
    made = OlmoeRMSNorm(width, eps)
    nn.init.normal_(made.weight)
    return made.bfloat16()


@pytest.mark.parametrize("width", [16, 48, 2048])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 2, 4)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_it_is_the_familys_own(width: int, shape: tuple[int, ...], size: float) -> None:
    own = norm(width, 1e-6)
    fused = copy.deepcopy(own)
    fuse_norms(fused)
    assert isinstance(fused, FusedNorm)
    x = (size * torch.randn(*shape, width)).bfloat16()
    found, right = fused(x), own(x)
    assert found.shape == right.shape
    torch.testing.assert_close(found, right, rtol=2**-6, atol=0.0)
    assert (found == right).float().mean() > 0.9


def test_zeros_and_what_is_not_finite() -> None:
    fused = norm(32)
    fuse_norms(fused)
    x = torch.zeros(3, 32).bfloat16()
    x[1, 4], x[2, 5] = torch.nan, torch.inf
    found = fused(x)
    assert (found[0] == 0).all()
    assert found[1].isnan().all()
    assert found[2, 5].isnan()


def test_many_rows_odd_strides_and_other_dtypes_are_left_to_the_family() -> None:
    own = norm(32)
    fused = copy.deepcopy(own)
    fuse_norms(fused)
    for x in (torch.randn(40, 32).bfloat16(), torch.randn(32, 4).bfloat16().T, torch.randn(2, 32)):
        assert torch.equal(fused(x), own(x))


@pytest.mark.parametrize(
    "other",
    [
        Gemma3RMSNorm(32).bfloat16(),  # its weight is one less than the factor
        norm(32).float(),
        norm(3 * LANES // 2),
        nn.LayerNorm(32).bfloat16(),
        nn.BatchNorm1d(32).bfloat16(),
    ],
    ids=["gemma", "float32", "odd width", "layer norm", "batch norm"],
)
def test_others_are_left_alone(other: nn.Module) -> None:
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    kind = type(other)
    fuse_norms(other)
    assert type(other) is kind
