"""An `MoE` over the modules of a transformers MoE block: same parameters, same outputs.

Wrapping is structural: gate, experts and shared experts are found by name, everything else on the block refuses it,
and the result must agree with the original on random input. So a family whose block does more than these parts do
(scales the output, adds norms or projections) is refused by name instead of being computed wrongly.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from collegium.errors import UnsupportedFamilyError
from collegium.experts.compute import compute
from collegium.experts.from_module import expert_weights
from collegium.experts.weights import ExpertWeights
from collegium.models.blocks import Block, BlockMoE, family_of, probe
from collegium.routing.from_gate import router_from_gate
from collegium.routing.record import Routing

__all__ = ["AdoptedExperts", "unwrap_block", "wrap_block"]

GATES = ("gate", "router")
SHARED = ("shared_experts", "shared_expert", "shared_mlp")
SHARED_GATE = "shared_expert_gate"
_STORES = ("_parameters", "_buffers", "_modules")


class AdoptedExperts(nn.Module):
    """The experts of a transformers model, called as ours are: ``experts(x [T, d], routing) -> [T, d]``.

    Parameters, buffers and submodules are registered under their original names, so the state dict keeps its names;
    everything else about the original (layout flags, activation, numbers) is read from it.

    Attributes:
        native: the original module in a one-element tuple, which hides it from torch.
        compute: name of the back end, "auto" for the fastest.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.compute = "auto"
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, child in module.named_children():
            self.add_module(name, child)
        self.native = (module,)

    def __getattr__(self, name: str) -> Any:
        # copying and unpickling ask for attributes before there are any
        if "native" not in self.__dict__ or any(name in self.__dict__[kind] for kind in _STORES):
            return super().__getattr__(name)
        return getattr(self.native[0], name)

    @property
    def weights(self) -> ExpertWeights:
        """The experts' parameters and layout."""
        return expert_weights(self)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """``x [T, d] -> [T, d]``."""
        return compute(x, routing, self.weights, self.compute)


def wrap_block(model: PreTrainedModel, block: Block) -> BlockMoE:
    """An `MoE` that can take the place of `block`; nothing is changed yet.

    Raises:
        UnsupportedFamilyError: the block is not gate, experts and shared experts put together as ours are.
    """
    native, family = block.module, family_of(model)
    config = model.config.get_text_config()
    x, expected, pair = probe(model, block)
    parts: dict[str, Any] = dict(native.named_children())
    gate = next((parts[name] for name in GATES if name in parts), None)
    if gate is None:
        raise UnsupportedFamilyError(
            f"{block.path} of model type {family!r} has no gate; looked for {', '.join(GATES)}"
        )
    router = router_from_gate(gate, block=native, config=config)
    if router.routed_scaling_factor == 1.0:
        # some blocks scale the routed sum themselves, which is the same as scaling every weight
        router.routed_scaling_factor = getattr(native, "routed_scaling_factor", 1.0)
    moe = BlockMoE.from_parts(
        router,
        AdoptedExperts(parts["experts"]),
        next((parts[name] for name in SHARED if name in parts), None),
        parts.get(SHARED_GATE),
        layer_index=block.layer,
    )
    moe.pair = pair
    moe.origin = (native, _account(native, moe, block, family))
    if x.device.type != "meta":
        _compare(moe, x, expected, block, family)
    return moe


def _account(native: nn.Module, moe: BlockMoE, block: Block, family: str) -> dict[str, str]:
    """Name of each tensor of the original block -> its name in `moe`.

    Raises:
        UnsupportedFamilyError: the block has a tensor that no part of `moe` took over.
    """
    ours = {id(t): name for name, t in [*moe.named_parameters(), *moe.named_buffers()]}
    bias = moe.gate.e_score_correction_bias
    names, lost = {}, []
    for name, tensor in [*native.named_parameters(), *native.named_buffers()]:
        if id(tensor) in ours:
            names[name] = ours[id(tensor)]
        elif bias is not None and tensor.numel() == bias.numel() and name.endswith("bias"):
            # kept in another shape or type by this family, so the router has a copy
            names[name] = "gate.e_score_correction_bias"
        else:
            lost.append(name)
    if lost:
        raise UnsupportedFamilyError(
            f"{block.path} of model type {family!r} is more than gate, experts and shared experts: it also has "
            f"{', '.join(lost)}"
        )
    return names


@torch.no_grad()
def _compare(moe: BlockMoE, x: Tensor, expected: Tensor, block: Block, family: str) -> None:
    training = moe.training
    output = moe.eval()(x)
    moe.train(training)
    y = output[0] if isinstance(output, tuple) else output
    # half precision: the routed sum is rounded once by us, once per expert by some families
    tolerance = 1e-5 if x.dtype in (torch.float32, torch.float64) else 3e-2
    error = float((y.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-9))
    if not error <= tolerance:
        raise UnsupportedFamilyError(
            f"{block.path} of model type {family!r} does more with its parts than an MoE block of ours: on random "
            f"input the outputs differ by {error:.1e} of the largest value"
        )


def unwrap_block(moe: BlockMoE) -> nn.Module:
    """The original block, holding the present tensors of `moe`; `moe` stays usable."""
    assert moe.origin is not None
    native, names = moe.origin
    for old, new in names.items():
        parent, _, leaf = old.rpartition(".")
        owner = native.get_submodule(parent)
        store = owner._parameters if leaf in owner._parameters else owner._buffers
        before = store[leaf]
        tensor: Tensor = attrgetter(new)(moe)
        assert before is not None
        if tensor.shape != before.shape or isinstance(before, nn.Parameter) != isinstance(tensor, nn.Parameter):
            tensor = tensor.detach().reshape(before.shape).to(before.dtype)
            tensor = nn.Parameter(tensor, before.requires_grad) if isinstance(before, nn.Parameter) else tensor
        store[leaf] = tensor  # type: ignore[assignment]  # a Parameter where the store holds these
    return native.train(moe.training)
