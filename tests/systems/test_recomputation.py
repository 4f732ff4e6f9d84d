"""Activations that are computed anew in the backward pass change nothing in a training step of any system."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import LENGTH, ROWS, SYSTEMS, context, counted, forget, shaken
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from collegium.layer import balance_losses, moe_layers, use_context
from tiny import tiny_inputs


def a_step(model: Any) -> tuple[dict[str, Tensor | None], dict[str, Tensor], list[Tensor], list[Tensor], int]:
    """Gradients, losses, counts, the experts of each routing, and how often layers ran."""
    calls: list[int] = []
    handles = [layer.gate.register_forward_pre_hook(lambda *_: calls.append(1)) for layer in moe_layers(model)]
    ids = tiny_inputs(model, ROWS, LENGTH)["input_ids"]
    with use_context(model, context()):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        losses = {"loss": loss, **balance_losses(model)}
        torch.stack(list(losses.values())).sum().backward()
    for handle in handles:
        handle.remove()
    layers = moe_layers(model)
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    counts = [counted(layer).clone() for layer in layers]
    routings = [routing.expert for layer in layers for routing in layer.routings]
    forget(model)
    return grads, {name: value.detach() for name, value in losses.items()}, counts, routings, len(calls)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*:FutureWarning")
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_a_step_is_the_same(family: str, system: str) -> None:
    model = shaken(family, system, strained=True)
    plain = a_step(model.train())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        # else it ends with the last tensor that is missing, and what a layer notes at its end would not run
        with set_checkpoint_early_stop(False):
            again = a_step(model.train())
    finally:
        model.gradient_checkpointing_disable()
    assert again[4] == 2 * plain[4], "nothing was computed anew"
    for name, grad in plain[0].items():
        other = again[0][name]
        assert (grad is None) == (other is None), name
        if grad is not None and other is not None:
            torch.testing.assert_close(other, grad, msg=lambda m, name=name: f"{name}: {m}")
    assert plain[1].keys() == again[1].keys()
    for name, value in plain[1].items():
        assert torch.equal(again[1][name], value), name
    for one, other in zip(plain[2] + plain[3], again[2] + again[3], strict=True):
        assert torch.equal(one, other)
