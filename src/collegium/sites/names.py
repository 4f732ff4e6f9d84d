"""Names of expert tensors on disk, asked from transformers' own weight conversion rather than written down again.

``save_pretrained`` turns the fused parameters of an experts module back into the checkpoint's layout. We run that
conversion on small tensors whose entries say where they came from, and read the names off the result.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

__all__ = ["Names", "module_names", "parameter_names", "saved_names"]

Names = list[dict[str, str]]
"""For each expert, matrix -> tensor name."""

_MATRICES = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
_LAYER = re.compile(r"(?:.*?\.)??\d+\.")


class _Origin(NamedTuple):
    """Where an entry of a tagged tensor comes from."""

    path: str
    expert: int
    matrix: str
    half: str


def saved_names(model: nn.Module, path: str) -> Names:
    """Names for the experts module at `path` of `model`, whose parameters are transformers' fused ones.

    They are the names in the checkpoint of the transformers model that holds it, which may be a part of `model`.
    """
    for prefix, saver in model.named_modules():
        if isinstance(saver, PreTrainedModel) and (not prefix or path.startswith(f"{prefix}.")):
            return _names_in(saver, path.removeprefix(f"{prefix}."))
    return parameter_names(path, model.get_submodule(path))


def _names_in(saver: PreTrainedModel, path: str) -> Names:
    layer = _LAYER.match(path)
    origins: list[_Origin] = []
    tagged: dict[str, Tensor] = {}
    for name, experts in saver.named_modules():
        # one layer at a time: some conversions take all experts modules of a layer together
        if name.startswith(layer.group() if layer else path) and _is_fused(experts):
            for matrix in _MATRICES:
                if isinstance(getattr(experts, matrix, None), nn.Parameter):
                    tagged[f"{name}.{matrix}"] = _tag(experts, name, matrix, origins)
    saved = revert_weight_conversion(saver, tagged)
    names: Names = [{} for _ in range(1 + max(origin.expert for origin in origins if origin.path == path))]
    for name, tensor in saved.items():
        found = [origins[tag] for tag in tensor.unique().tolist()]
        halves = {origin.half for origin in found}
        for origin in found:
            if origin.path == path:
                whole = len(halves) > 1 or not origin.half
                names[origin.expert][origin.matrix if whole else origin.matrix.replace("gate_up", origin.half)] = name
    return names


def _is_fused(module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.dim() == 3


def _tag(experts: Any, path: str, matrix: str, origins: list[_Origin]) -> Tensor:
    """``[E, 2, 2]`` (a bias ``[E, 2]``) of indices into `origins`, which grows by what they mean.

    Every expert has its own index, and so has each half of a gate-and-up pair, along the axis the halves lie on.
    """
    E = getattr(experts, matrix).shape[0]
    halves = ("gate", "up") if matrix.startswith("gate_up") else ("",)
    first = len(origins)
    origins += [_Origin(path, e, matrix, half) for e in range(E) for half in halves]
    tags = torch.arange(first, len(origins)).view(E, -1).expand(E, 2)
    if matrix.endswith("_bias"):
        return tags.contiguous()
    tags = tags[:, :, None].expand(E, 2, 2)
    return (tags.transpose(1, 2) if getattr(experts, "is_transposed", False) else tags).contiguous()


def parameter_names(path: str, experts: Any) -> Names:
    """Names where the fused parameters are stored as they are."""
    names = {matrix: f"{path}.{matrix}" for matrix in _MATRICES if getattr(experts, matrix, None) is not None}
    return [dict(names) for _ in range(experts.num_experts)]


def module_names(path: str, experts: Any) -> Names:
    """Names where every expert is a module of its own, ``expert_0`` and so on."""
    return [
        {
            name.removesuffix(".weight").replace(".", "_"): f"{path}.expert_{e}.{name}"
            for name, _ in experts[f"expert_{e}"].named_parameters()
        }
        for e in range(experts.num_experts)
    ]
