"""Which MoE blocks and which tensors of a checkpoint are its experts, from names and shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from collegium.errors import UnsupportedFamilyError
from collegium.experts.from_module import expert_weights
from collegium.experts.weights import ExpertWeights
from collegium.layerwise import LayerwiseModel
from collegium.models.checkpoint import Checkpoint
from collegium.sites import Site, sites

__all__ = ["Block", "expert_blocks", "expert_dtype", "expert_tensors", "open_layerwise"]

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float32}


@dataclass(frozen=True, eq=False)
class Block:
    """One MoE block.

    Attributes:
        weights: of its experts, on the meta device.
        parameters: name of a field of `ExpertWeights` -> that of the parameter in the model.
        d, f: widths.
    """

    site: Site
    weights: ExpertWeights
    parameters: dict[str, str]

    @property
    def d(self) -> int:
        return self.weights.up_t.shape[1]

    @property
    def f(self) -> int:
        return self.weights.down_t.shape[1]


def expert_blocks(model: Any) -> list[Block]:
    """The MoE blocks of a model, in running order.

    Raises:
        NotMoEError: there is none.
        UnsupportedFamilyError: the experts of one are not behind transformers' common seam.
    """
    return [_block(site) for site in sites(model)]


def _block(site: Site) -> Block:
    try:
        weights = expert_weights(site.experts)
    except UnsupportedFamilyError as error:
        raise UnsupportedFamilyError(f"family {site.family!r} cannot be run from a disk: {error}") from error
    held = {id(tensor): f"{site.path}.experts.{name}".lstrip(".") for name, tensor in site.experts.named_parameters()}
    fields = {"up": weights.up, "down": weights.down, "up_bias": weights.up_bias, "down_bias": weights.down_bias}
    return Block(site, weights, {name: held[id(tensor)] for name, tensor in fields.items() if tensor is not None})


def expert_tensors(streamed: LayerwiseModel, blocks: Iterable[Block]) -> frozenset[str]:
    """Names on disk of the experts' matrices and biases."""
    parameters = {name for block in blocks for name in block.parameters.values()}
    return frozenset(name for name, target in streamed.targets.items() if target in parameters)


def expert_dtype(checkpoint: Checkpoint, names: Iterable[str]) -> torch.dtype:
    """The dtype that holds every one of these tensors: their own where it is one, else float32.

    Raises:
        UnsupportedFamilyError: some are of no floating dtype of 16 bits or more.
    """
    stored = {checkpoint.tensors[name].dtype for name in names}
    if odd := sorted(stored - _DTYPES.keys()):
        raise UnsupportedFamilyError(
            f"{checkpoint.folder} stores experts as {', '.join(odd)}; they are read from weights of a floating "
            "dtype. Save a dequantised copy"
        )
    return _DTYPES[stored.pop()] if len(stored) == 1 else torch.float32


def open_layerwise(checkpoint: Checkpoint) -> tuple[LayerwiseModel, list[Block], frozenset[str]]:
    """The model without its weights, in the dtype its experts are stored in; its blocks, and `expert_tensors`.

    Raises:
        ModelError: as for `LayerwiseModel` and `expert_blocks`.
    """
    streamed = LayerwiseModel(checkpoint)
    blocks = expert_blocks(streamed.model)
    names = expert_tensors(streamed, blocks)
    # a config may name another dtype than the weights have; no weight is to be rounded twice
    if (dtype := expert_dtype(checkpoint, names)) != streamed.dtype:
        streamed = LayerwiseModel(checkpoint, dtype)
        blocks = expert_blocks(streamed.model)
    return streamed, blocks, names
