"""The part of a rewritten checkpoint that no byte of the source holds: merged or slimmer experts, and router rows that
follow them.

Experts go through transformers' own conversion both ways, so every layout on disk is read and written as the family
has it. One layer's experts are in memory at a time, old and new.

Legend: E experts of a layer, E' new ones, f expert width, d model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from collegium.compress.factor.registry import find_factor
from collegium.compress.matrices import Expert, LayerExperts, pack
from collegium.compress.merge.registry import Merge, find_merge
from collegium.compress.plan import Plan
from collegium.compress.plan_layer import LayerPlan
from collegium.compress.rewrite_layout import Block, router_axis
from collegium.compress.router_edits import RouterRows, edit_router, edit_vector, mixing, router_edit_needs
from collegium.errors import CheckpointError, ConfigError, PlanError, UnsupportedFamilyError
from collegium.experts.weights import ExpertWeights
from collegium.layerwise import LayerwiseModel
from collegium.measure.collect import weights_of
from collegium.measure.statistics import Statistics
from collegium.models.checkpoint import Checkpoint, TensorInfo
from collegium.models.shards import Piece
from collegium.models.summary import layer_of, part_of
from collegium.sites import Site, sites

__all__ = ["Computed", "is_computed", "statistics_needed"]

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _FLOATS.items()}


def is_computed(plan: Plan) -> bool:
    """Whether some tensor of the result is not in the source."""
    return plan.router.mode != "rows" or any(_is_computed(one) for one in plan.layers)


def _is_computed(layer: LayerPlan) -> bool:
    return layer.op == "merge" or bool(layer.neurons)


def statistics_needed(plan: Plan) -> tuple[str, ...]:
    """The statistics that applying the plan reads. Raises ConfigError for an unknown operator or router edit."""
    needs = router_edit_needs(plan.router.mode)
    if plan.operator is not None and any(one.op == "merge" for one in plan.layers):
        needs += find_merge(plan.operator.name, plan.operator.settings).needs
    if plan.operator is not None and any(one.op == "factor" for one in plan.layers):
        needs += find_factor(plan.operator.name, plan.operator.settings).needs
    return tuple(dict.fromkeys(needs))


class Computed:
    """What applying `plan` computes, tensor by tensor.

    Raises:
        ConfigError: the operator or the router edit is not known, or needs statistics that are not given.
        UnsupportedFamilyError: the weights are quantised, or the family cannot be read layer by layer.
    """

    def __init__(self, plan: Plan, checkpoint: Checkpoint, statistics: Statistics | None) -> None:
        self.plan, self.checkpoint, self.statistics = plan, checkpoint, statistics
        self.layers = {one.layer: one for one in plan.layers}
        _check_statistics(plan, statistics)
        self.merge = self._find_merge()
        self.streamed = LayerwiseModel(checkpoint, _dtype(checkpoint))
        self.sites = {site.layer: site for site in sites(self.streamed.model)}
        self._layer: int | None = None
        self._tensors: dict[str, Tensor] = {}

    def _find_merge(self) -> Merge | None:
        operator, merged = self.plan.operator, any(one.op == "merge" for one in self.plan.layers)
        return find_merge(operator.name, operator.settings) if operator is not None and merged else None

    def pieces(self) -> dict[str, tuple[int, Piece]]:
        """Name -> (layer, header) of every expert tensor that is computed, layer by layer."""
        found: dict[str, tuple[int, Piece]] = {}
        for number, layer in self.layers.items():
            if not _is_computed(layer):
                continue
            site = self.sites[number]
            for name, tensor in self._on_disk(site, _empty(weights_of(site), layer)).items():
                found[name] = number, Piece(name, _NAMES[tensor.dtype], tuple(tensor.shape), "", (), tensor.nbytes)
        return found

    def tensor(self, name: str, layer: int) -> Tensor:
        """One tensor of `pieces`. Those of a layer are made together, and kept until another layer is asked for."""
        if self._layer != layer:
            self._tensors, self._layer = {}, layer
            site = self.sites[layer]
            with self.streamed.layer_loaded(layer):
                weights = weights_of(site)
                experts = LayerExperts(weights)
                packed = pack(list(self.new_experts(self.layers[layer], experts)), weights)
            self._tensors = self._on_disk(site, packed)
        return self._tensors[name]

    def new_experts(self, layer: LayerPlan, experts: LayerExperts) -> Iterator[Expert]:
        """The experts of a layer that is not factored, one for each of ``layer.keep``."""
        made = (
            (experts.read(e) for e in layer.keep)
            if self.merge is None or layer.op != "merge"
            else self.merge.merge(layer, experts, self.statistics)
        )
        for new, expert in enumerate(made):
            yield expert.neurons(layer.neurons[new]) if layer.neurons else expert

    def _on_disk(self, site: Site, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The fused tensors of a site as the family stores them."""
        named: dict[str, Any] = {f"{site.path}.{_suffix(site)}{name}": tensor for name, tensor in tensors.items()}
        return revert_weight_conversion(self.streamed.model, named)

    def router(self, tensors: Mapping[str, TensorInfo], block: Block) -> dict[str, Tensor]:
        """The router tensors of one layer that a mode other than "rows" changes: name -> tensor in the source's dtype.

        Raises:
            UnsupportedFamilyError: the router is not one matrix of floats with a row for each expert.
        """
        layer = self.layers[block[1]]
        names = [name for name in tensors if layer_of(name) == block and part_of(name) == "router"]
        values = {name: self._read(tensors[name], name) for name in names}
        matrices = [
            name
            for name, value in values.items()
            if value.dim() == 2 and router_axis(name, tuple(value.shape), layer.num_experts) == 0
        ]
        if len(matrices) != 1 or any(value.dtype not in _NAMES for value in values.values()):
            raise UnsupportedFamilyError(
                f"layer {layer.layer}: the router is not one matrix of floats with a row for each expert "
                f"({', '.join(names)}); use the router mode 'rows'"
            )
        weight = matrices[0]
        bias = f"{weight.removesuffix('weight')}bias"
        edit = self._router_rows(layer, values[weight], values.get(bias))
        rows, new_bias = edit_router(edit, self.plan.router.mode, dict(self.plan.router.settings))
        found = {weight: rows.to(values[weight].dtype)}
        for name, value in values.items():
            axis = router_axis(name, tuple(value.shape), layer.num_experts)
            if name == bias and new_bias is not None:
                found[name] = new_bias.to(value.dtype)
            elif name != weight and axis is not None:
                new = edit_vector(value.double().reshape(-1), edit.mixing, edit.dominant, self.plan.router.mode)
                found[name] = new.to(value.dtype).view(*value.shape[:axis], -1)
        return found

    def _router_rows(self, layer: LayerPlan, weight: Tensor, bias: Tensor | None) -> RouterRows:
        mixed = mixing(layer)
        if self.plan.router.mode == "dern":
            if self.merge is None or not hasattr(self.merge, "mixing"):
                raise PlanError("router mode 'dern' goes with the merge 'dern', which says what moved where")
            with self.streamed.layer_loaded(layer.layer):
                mixed = self.merge.mixing(layer, LayerExperts(weights_of(self.sites[layer.layer])))
        inputs = None
        if router_edit_needs(self.plan.router.mode) and self.statistics is not None:
            inputs = self.statistics.get(layer.layer, "x_sample").double()
            inputs = inputs[inputs.abs().sum(1) > 0]
        return RouterRows(
            weight.double(),
            None if bias is None else bias.double().reshape(-1),
            mixed,
            torch.tensor(layer.keep),
            inputs,
        )

    def _read(self, info: TensorInfo, name: str) -> Tensor:
        try:
            with safe_open(self.checkpoint.folder / info.file, framework="pt") as file:
                return file.get_tensor(name)
        except Exception as error:  # foreign bytes; what their parser raises is not ours to list
            raise CheckpointError(f"could not read {name!r} of {self.checkpoint.folder}: {error}") from error


def _empty(weights: ExpertWeights, layer: LayerPlan) -> dict[str, Tensor]:
    """The new fused tensors on the meta device."""
    E, f, d = len(layer.keep), weights.down_t.shape[1], weights.down_t.shape[2]
    widths = {len(ids) for ids in layer.neurons} or {f}
    if len(widths) != 1:
        raise PlanError(
            f"layer {layer.layer} keeps {min(widths)} to {max(widths)} neurons an expert, and one tensor holds them all"
        )
    f = widths.pop()
    expert = Expert(
        *(
            None if missing else torch.empty(*shape, device="meta")
            for missing, shape in (
                (not weights.gated, (f, d)),
                (False, (f, d)),
                (False, (d, f)),
                (weights.up_bias is None or not weights.gated, (f,)),
                (weights.up_bias is None, (f,)),
                (weights.down_bias is None, (d,)),
            )
        )  # type: ignore[arg-type]
    )
    return pack([expert] * E, weights)


def _suffix(site: Site) -> str:
    """Path of the experts module below the block."""
    found = next(path for path, module in site.block.named_modules() if module is site.experts)
    return f"{found}." if found else ""


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """That of the stored experts, so that what is written is what was read."""
    found = {info.dtype for name, info in checkpoint.tensors.items() if part_of(name) == "experts"}
    odd = sorted(found - _FLOATS.keys())
    if odd:
        raise UnsupportedFamilyError(
            f"{checkpoint.folder} stores experts as {', '.join(odd)}: quantised experts can be pruned, which moves "
            "their bytes, but not merged or made slimmer; save a dequantised copy first"
        )
    return _FLOATS[next(iter(found))] if len(found) == 1 else torch.float32


def _check_statistics(plan: Plan, statistics: Statistics | None) -> None:
    from collegium.compress.planners.make import statistics_checksum

    needs = statistics_needed(plan)
    if not needs:
        return
    if statistics is None:
        raise ConfigError(
            f"the plan's {plan.operator.name if plan.operator else plan.router.mode!r} reads {', '.join(needs)}; name "
            "the statistics the plan was made from (--statistics)"
        )
    if plan.statistics is not None and statistics_checksum(statistics) != plan.statistics:
        raise PlanError("these are not the statistics the plan was made from; name those, or plan again from these")
    lacking = [need for need in needs if need not in {entry.name for entry in statistics.meta.statistics}]
    if lacking:
        raise ConfigError(f"the statistics lack {', '.join(lacking)}, which applying the plan reads; calibrate for it")
