"""The "collegium" experts implementation against transformers' own eager path, for every family that can select it.

Families are found by scanning transformers' modelling files for the experts decorator, so a new one is tested the day
it is installed. Whole tiny models are compared: outputs, and the gradient of every parameter, in float32.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel

from collegium.sites import register, seam
from tiny import SEAM, SINCE, seam_model_type, tiny_inputs, tiny_model


def run(model: PreTrainedModel, implementation: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's first output and the gradient of every parameter to a fixed random projection of it."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    output = model(**tiny_inputs(model), use_cache=False)[0]
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "experts_class"), SEAM, ids=[f"{f}-{c}" for f, c in SEAM])
def test_same_outputs_and_gradients_as_eager(family: str, experts_class: str, monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    model = tiny_model(seam_model_type(family, experts_class))
    ours: list[int] = []
    monkeypatch.setattr(seam, "compute", lambda *args, real=seam.compute: ours.append(1) or real(*args))
    forwards: list[int] = []
    for module in model.modules():
        if type(module).__name__ == experts_class:
            module.register_forward_hook(lambda *_: forwards.append(1))
    expected, expected_grads = run(model, "eager")
    assert (len(ours), len(forwards) > 0) == (0, True)
    forwards.clear()
    output, grads = run(model, "collegium")
    assert len(ours) == len(forwards), "the registered function did not run at every block"
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert grads.keys() == expected_grads.keys()
    assert any(".experts." in name and grad.abs().sum() > 0 for name, grad in grads.items())
    for name, grad in grads.items():
        scale = expected_grads[name].abs().max().clamp(min=1e-3)
        torch.testing.assert_close(grad / scale, expected_grads[name] / scale, rtol=1e-4, atol=1e-4, msg=name)


def test_all_families_are_there() -> None:
    """A family that cannot be built fails above, by name; here, that the scan has not gone blind."""
    found = {family for family, _ in SEAM}
    installed = Version(transformers.__version__)
    assert {"mixtral", "olmoe", "deepseek_v3", "gpt_oss", "qwen3_moe", "nemotron_h"} <= found
    assert len(found - SINCE.keys()) >= 38
    assert found & SINCE.keys() == {family for family, since in SINCE.items() if Version(since) <= installed}
