"""`Experts`, and `expert_weights` of transformers' experts modules: same outputs and gradients as theirs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from collegium.errors import ConfigError, UnsupportedFamilyError
from collegium.experts.compute import compute
from collegium.experts.from_module import expert_weights
from collegium.experts.modules import Experts
from collegium.routing.record import Routing
from tiny import SEAM, families

T, E, K = 19, 5, 2

CONFIG = {
    "num_experts": E, "num_local_experts": E, "n_routed_experts": E, "hidden_size": 32, "moe_hidden_size": 32,
    "intermediate_size": 24, "moe_intermediate_size": 24, "hidden_act": "silu", "mlp_hidden_act": "relu2",
    "moe_latent_size": None, "swiglu_alpha": 1.702, "swiglu_limit": 0.5, "post_norm_eps": 1e-6,
    "_experts_implementation": "eager",
}  # fmt: skip

FAMILIES: dict[str, str | None] = {
    "qwen3_moe": "silu",
    "nemotron_h": "relu2",  # no gate
    "muse_spark": "silu",  # a norm after each expert
    "gpt_oss": None,  # transposed, interleaved, biases, its own gate
    "deepseek_v4": None,  # its own gate
}
"""Family -> the activation that kernels may fuse."""


def _module(family: str) -> Any:
    torch.manual_seed(0)
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    module = getattr(modeling, dict(SEAM)[family])(SimpleNamespace(**CONFIG))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("backend", ["reference", "grouped", "cpu"])
@pytest.mark.parametrize("family", families(*FAMILIES))
def test_same_outputs_and_gradients_as_transformers(family: str, backend: str) -> None:
    module = _module(family)
    x, target = torch.randn(T, 32), torch.randn(T, 32)
    weight, index = torch.rand(T, E).topk(K)
    found: list[dict[str, Any]] = []
    for ours in (False, True):
        leaves = {"x": x.clone().requires_grad_(), "weight": weight.clone().requires_grad_()}
        leaves |= dict(module.named_parameters())
        if ours:
            routing = Routing.from_topk(index, leaves["weight"], E)
            y = compute(leaves["x"], routing, expert_weights(module), backend)
        else:
            y = module(leaves["x"], index, leaves["weight"])
        gradients = torch.autograd.grad((y * target).sum(), list(leaves.values()))
        found.append({"y": y.detach(), **dict(zip(leaves, gradients, strict=True))})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", families(*FAMILIES))
def test_layout_is_read_from_the_module_and_nothing_is_copied(family: str) -> None:
    module = _module(family)
    weights = expert_weights(module)
    assert weights.fused_activation == FAMILIES[family]
    assert weights.down is module.down_proj
    assert weights.num_experts == E
    assert weights.up_t.shape == (E, 32, 48 if weights.gated else 24)
    assert weights.down_t.shape == (E, 24, 32)


def test_other_modules_are_refused() -> None:
    with pytest.raises(UnsupportedFamilyError, match="Linear"):
        expert_weights(nn.Linear(2, 2))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_experts_are_feed_forward_layers(gated: bool, bias: bool) -> None:
    experts = Experts(32, 24, E, hidden_act="gelu", gated=gated, bias=bias)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    up = experts.gate_up_proj if gated else experts.up_proj
    x = torch.randn(T, 32)
    hidden = x @ up[1].T + (experts.get_parameter(f"{experts._up}_bias")[1] if bias else 0)
    hidden = nn.functional.gelu(hidden[:, :24]) * hidden[:, 24:] if gated else nn.functional.gelu(hidden)
    expected = hidden @ experts.down_proj[1].T + (experts.down_proj_bias[1] if bias else 0)
    routing = Routing.from_topk(torch.ones(T, 1, dtype=torch.int64), torch.full((T, 1), 0.5), E)
    torch.testing.assert_close(experts(x, routing), 0.5 * expected, rtol=1e-4, atol=1e-5)


def test_experts_start_as_asked() -> None:
    experts = Experts(64, 48, 8, bias=True)
    assert experts.down_proj.std().item() == pytest.approx(0.02, rel=0.05)
    assert not experts.down_proj_bias.any()
    experts.reset_parameters(std=0.1)
    assert experts.gate_up_proj.std().item() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("settings", [{"num_experts": 0}, {"hidden_act": "nonsense"}], ids=str)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(settings.values())))):
        Experts(**{"hidden_size": 8, "intermediate_size": 8, "num_experts": 2, **settings})


def test_a_machine_without_numba_still_runs_experts() -> None:
    program = """
import sys, warnings
sys.modules["numba"] = None
import torch
from collegium.experts.compute import backends, compute
from collegium.experts.modules import Experts
from collegium.routing.record import Routing
experts, x = Experts(16, 16, 3), torch.randn(4, 16)
routing = Routing.from_topk(torch.tensor([[0, 1]] * 4), torch.rand(4, 2), 3)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        y = experts(x, routing)
torch.testing.assert_close(y, compute(x, routing, experts.weights, "reference"))
print(sorted(backends()), sum("Numba" in str(w.message) for w in seen))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["['cpu',", "'grouped',", "'reference']", "1"]
