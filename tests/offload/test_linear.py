"""Matrices besides the experts: streamed as torch computes, close in 8 bits, refused where 8 bits would break them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import saved
from torch import nn

from collegium.errors import ConfigError, UnsupportedFamilyError
from collegium.offload.linear import hold_in_8_bits, stream_linears
from collegium.offload.model import load_offloaded


@pytest.mark.parametrize("rows", [0, 1, 3, 96, 97])
@pytest.mark.parametrize("bias", [True, False])
def test_streamed_maps_are_those_of_float32(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    model = nn.Sequential(nn.Linear(48, 80, bias=bias)).bfloat16()
    x = torch.randn(2, rows, 48).bfloat16()
    exact = model.float()(x.float())
    stream_linears(model.bfloat16())
    assert type(model[0]) is not nn.Linear
    with torch.inference_mode():
        torch.testing.assert_close(model(x).float(), exact, atol=2e-2, rtol=8e-3)  # one rounding to bfloat16


def test_only_plain_bfloat16_maps_are_streamed() -> None:
    class Other(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(32, 32), Other(32, 32).bfloat16(), nn.Linear(8, 32).bfloat16())
    kinds = [type(module) for module in model]
    stream_linears(model)
    assert [type(module) for module in model] == kinds


def test_8_bits_spare_what_is_named_and_keep_ties() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(40, 32), "head": nn.Linear(32, 40, bias=False), "gate": nn.Linear(32, 16)}
    )
    model["head"].weight = model["embed"].weight
    before = model["embed"].weight.detach().clone()
    hold_in_8_bits(model, "float32", but=[model["gate"]])
    assert model["head"].codes is model["embed"].codes
    assert not hasattr(model["head"], "weight")
    assert type(model["gate"]) is nn.Linear
    ids = torch.tensor([[3, 7, 39]])
    torch.testing.assert_close(model["embed"](ids), before[ids], atol=2e-2, rtol=1e-2)
    x = torch.randn(5, 32)
    torch.testing.assert_close(model["head"](x), x @ before.T, atol=0.2, rtol=0.05)


def test_a_family_that_takes_weights_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise its output would be computed from codes."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

    folder, _ = saved("qwen3_moe", tmp_path / "model", hidden_size=64)
    forward = Qwen3MoeAttention.forward

    def direct(self: Qwen3MoeAttention, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        out, *rest = forward(self, hidden_states, *args, **kwargs)
        return (
            out + torch.nn.functional.linear(hidden_states, self.q_proj.weight.float())[..., : out.shape[-1]],
            *rest,
        )

    monkeypatch.setattr(Qwen3MoeAttention, "forward", direct)
    load_offloaded(folder, context=64).close()
    with pytest.raises(UnsupportedFamilyError, match=r"no attribute 'weight'.*leave dense_bits out"):
        load_offloaded(folder, context=64, dense_bits=8)


@pytest.mark.parametrize(
    "settings",
    [{"kind": "quick"}, {"dense_bits": 4}, {"dense_bits": 8, "kind": "exact"}, {"readers": 0}, {"chunk": 0},
     {"experts": 0}, {"sequences": 0}],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        load_offloaded("demo", **settings)
