"""What the tests of this folder share: every published system inside a tiny whole model.

Names are those of the catalogue, so a new system is tested without an edit here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from collegium.catalog import methods
from collegium.layer import MoE, moe_layers
from collegium.models import MoEConfig, install
from collegium.routing import RoutingContext
from collegium.routing.parts import Part
from tiny import tiny_model

__all__ = ["LENGTH", "PLAIN", "ROWS", "STRAINED", "SYSTEMS", "context", "counted", "forget", "fresh", "parts", "shaken"]

SYSTEMS = [one.name for one in methods("system")]
STRAINED = {
    "ssr": {"ssr": {"probability": 0.5, "noise": 0.1}},  # as it is, few steps have a plan
    "loss_free": {"loss_free": {"rate": 0.05}},  # as it is, a few steps move the bias by too little to matter
    "emo": {"emo": {"smallest": 2, "largest": 3}},
    "gshard": {"gshard": {"capacity_factor": 0.8}},
    "random_token_selection": {"random_token_selection": {"capacity_factor": 0.8}},
}
"""Settings with which a few steps show what a system does."""
ROWS, LENGTH = 2, 12
PLAIN: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "hidden_act": "silu"}
"""Of the layer that a system takes the place of; some families do not say their activation."""


def fresh(family: str, router: Any, **more: Any) -> Any:
    """A model of `family` with a system in all of its layers that can have one; every tensor of a router matters."""
    model = install(tiny_model(family), MoEConfig.model_validate({**PLAIN, **more, "router": router}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.experts.reset_parameters(0.3)
            for gate in layer.gates:
                for tensor in gate.state_dict().values():
                    tensor.normal_(std=0.3, generator=generator)
    return model


@cache
def shaken(family: str, system: str, strained: bool = False) -> Any:
    """`fresh`, one model for all tests of a process: who uses it leaves no gradients, and weights as they are."""
    torch.manual_seed(0)
    return fresh(family, STRAINED.get(system, system) if strained else system).eval()


def parts(model: Any) -> list[Part]:
    """The parts of all routers."""
    return [part for layer in moe_layers(model) for gate in layer.gates for part in gate.parts]


def context(step: int = 3) -> RoutingContext:
    """For `ROWS` sequences of `LENGTH` tokens; documents end inside of them, and none goes on in the next one."""
    document = torch.tensor([0] * 5 + [1] * 7 + [2] * 9 + [3] * 3)
    return RoutingContext(document=document, position=torch.arange(ROWS * LENGTH) % LENGTH, step=step, seed=1)


def counted(layer: MoE) -> Tensor:
    """``[E]`` what a layer has counted since its last step."""
    assert layer.balance is not None
    return layer.balance.stats.sync()


def forget(model: Any) -> None:
    """Leave nothing of a training step, as it ends, in a model that tests share."""
    for layer in moe_layers(model):
        assert layer.balance is not None
        layer.balance.stats.reset()
    model.zero_grad(set_to_none=True)
    model.eval()
