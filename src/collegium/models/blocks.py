"""The feed-forward blocks of a transformers model: where they are, and what their decoder layer expects of them."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from collegium.errors import UnsupportedFamilyError
from collegium.layer import MoE
from collegium.routing.record import RoutingContext

__all__ = ["Block", "BlockMoE", "decoder_blocks", "family_of", "moe_blocks", "probe", "wrapped_blocks"]

FFN_NAMES = ("mlp", "feed_forward", "block_sparse_moe")
"""Names of the feed-forward block on a decoder layer."""


@dataclass(frozen=True)
class Block:
    """A feed-forward block inside a model.

    Attributes:
        layer: index of its decoder layer.
        path: module path in the model, for messages.
        parent: the module that holds it.
        name: its attribute name there.
    """

    layer: int
    path: str
    parent: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        """The block as it is now."""
        return getattr(self.parent, self.name)

    def replace(self, module: nn.Module) -> None:
        """Put `module` in its place, in the mode of what was there."""
        setattr(self.parent, self.name, module.train(self.module.training))


class BlockMoE(MoE):
    """An `MoE` as a block of a transformers model.

    Attributes:
        pair: the decoder layer unpacks ``(output, router scores)`` and ignores the second (gpt-oss).
        origin: what `wrap_block` made it from: the original block, and the name of each of that block's tensors here;
            None for a fresh one.
    """

    pair: bool = False
    origin: tuple[nn.Module, dict[str, str]] | None = None

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Tensor | tuple[Tensor, None]:  # type: ignore[override]
        """``[..., d] -> [..., d]``, or ``([..., d], None)`` where `pair` is set."""
        y = super().forward(x, context)
        return (y, None) if self.pair else y


def family_of(model: PreTrainedModel) -> str:
    """The model type of the text part."""
    return model.config.get_text_config().model_type


def decoder_blocks(model: PreTrainedModel) -> list[Block]:
    """The feed-forward block of every decoder layer.

    Raises:
        UnsupportedFamilyError: the model has no list of decoder layers that hold one each.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not layers:
        raise UnsupportedFamilyError(f"model type {family_of(model)!r} has no list of decoder layers to put MoE into")
    prefix = next(name for name, module in model.named_modules() if module is layers)
    blocks = []
    for index, layer in enumerate(layers):
        names = [name for name in FFN_NAMES if isinstance(getattr(layer, name, None), nn.Module)]
        if len(names) != 1:
            raise UnsupportedFamilyError(
                f"decoder layer {index} of model type {family_of(model)!r} ({type(layer).__name__}) has no "
                f"feed-forward block among {', '.join(FFN_NAMES)}"
            )
        blocks.append(Block(index, f"{prefix}.{index}.{names[0]}", layer, names[0]))
    return blocks


def moe_blocks(model: nn.Module) -> list[Block]:
    """Every module that holds fused experts (`is_concatenated` is set by transformers' decorator) in ``experts``."""
    found: list[Block] = []
    for path, module in model.named_modules():
        if hasattr(getattr(module, "experts", None), "is_concatenated"):
            numbers = re.findall(r"\.(\d+)(?=\.|$)", path)
            parent, _, name = path.rpartition(".")
            found.append(Block(int(numbers[-1]) if numbers else len(found), path, model.get_submodule(parent), name))
    return found


def wrapped_blocks(model: nn.Module) -> list[tuple[Block, BlockMoE]]:
    """Every `BlockMoE` that was made from an original block, and its place."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, BlockMoE) and module.origin is not None:
            parent, _, name = path.rpartition(".")
            found.append((Block(module.layer_index, path, model.get_submodule(parent), name), module))
    return found


@torch.no_grad()
def probe(model: PreTrainedModel, block: Block) -> tuple[Tensor, Tensor, bool]:
    """Run a block on random input to learn what it gives its decoder layer.

    Returns:
        ``(x [2, 3, d], output [2, 3, d], pair)``; `pair` says that the block returned ``(output, something)``.

    Raises:
        UnsupportedFamilyError: the block takes more than the hidden states, or gives back anything else.
    """
    module, family = block.module, family_of(model)
    # a block that hooks have made generic still shows its own signature on the class
    extra = list(inspect.signature(type(module).forward).parameters)[2:]
    if extra and not isinstance(module, MoE):
        raise UnsupportedFamilyError(
            f"{block.path} of model type {family!r} ({type(module).__name__}) takes {', '.join(extra)} beside the "
            "hidden states, which an MoE block of ours does not"
        )
    x = torch.randn(2, 3, model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(0))
    # some gates are float32 in a half-precision model, so the block's own parameters do not tell
    x = x.to(next(module.parameters()).device, model.dtype)
    training = module.training
    try:
        output = module.eval()(x.clone())
    finally:
        module.train(training)
    pair = isinstance(output, tuple) and len(output) == 2
    y = output[0] if pair else output
    if not isinstance(y, Tensor) or y.shape != x.shape:
        raise UnsupportedFamilyError(
            f"{block.path} of model type {family!r} ({type(module).__name__}) does not map hidden states to "
            "hidden states of the same shape"
        )
    return x, y, pair
