"""Collegium's own format, for shrunk models that plain transformers cannot hold: layers that differ in their number of
experts, experts of several widths, factored matrices, routers whose old ids share new experts.

A folder of it is the base model's config with ``model_type`` "collegium" and a section that says what became of each
layer, and safetensors whose names are those of the model in memory. Plain transformers refuses it; `load_own` opens it.

Legend: E experts of a layer, d model width, f width of one expert.
"""

from __future__ import annotations

import json
import os
import re
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from collegium.compress.compressed_experts import install_compressed
from collegium.compress.mask import cut_router
from collegium.compress.matrices import Expert, pack
from collegium.errors import CheckpointError, CollegiumError, ConfigError
from collegium.experts.loose import FUSED, LooseExpert, LooseExperts, LooseMatrix
from collegium.experts.weights import ExpertWeights
from collegium.files import atomic_dir
from collegium.measure.collect import weights_of
from collegium.models.checkpoint import Checkpoint, open_checkpoint, refuse_remote_code
from collegium.models.families import KEYS
from collegium.models.folder import AUTO_CLASSES, MODEL_TYPE, refuse_difference, unique_tensors
from collegium.sites import Site, register, sites
from collegium.sites.seam import NAME

__all__ = ["OwnLayer", "OwnSection", "Shrunk", "build", "load_own", "own_config", "read_section", "save_own_model"]

_STRICT = ConfigDict(extra="forbid", frozen=True)


class OwnLayer(BaseModel):
    """What a MoE layer holds where it is not as the base's config says.

    Attributes:
        layer: index of the decoder layer.
        form: "fused", in one tensor as the family has them, or "loose", each for itself.
        widths: f of each expert.
        ranks: of each expert's gate, up and down; 0 for a matrix that is dense or not there. () if all are dense.
        rows: as `ranks`, the rows that a factored matrix keeps whole; () if none does.
        expert_map: for each id of the router the expert it stands for; () if that is the one of this number.
    """

    model_config = _STRICT

    layer: int = Field(ge=0)
    form: Literal["fused", "loose"]
    widths: tuple[int, ...] = Field(min_length=1)
    ranks: tuple[tuple[int, int, int], ...] = ()
    rows: tuple[tuple[int, int, int], ...] = ()
    expert_map: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> OwnLayer:
        where, E = f"layer {self.layer}", len(self.widths)
        if {len(self.ranks), len(self.rows)} - {0, E}:
            raise ValueError(f"{where}: ranks and rows must have an entry for each of {E} experts, or none")
        if self.expert_map and not set(self.expert_map) <= set(range(E)):
            raise ValueError(f"{where}: expert_map names experts beyond the {E} there are")
        if self.form == "fused" and (len(set(self.widths)) != 1 or self.ranks or self.rows or self.expert_map):
            raise ValueError(f"{where}: fused experts are dense, of one width, and each has its own row of the router")
        return self

    @property
    def num_ids(self) -> int:
        """Ids the router chooses from."""
        return len(self.expert_map) or len(self.widths)


class Shrunk(BaseModel):
    """What differs from the base. `compressed` is the `n_ce` of `install_compressed`, or None."""

    model_config = _STRICT

    layers: tuple[OwnLayer, ...] = ()
    compressed: int | None = None


class OwnSection(BaseModel):
    """The "collegium" section of such a config; `base` is the family."""

    model_config = _STRICT

    version: Literal[1] = 1
    base: str
    shrunk: Shrunk


def own_config(config: dict[str, Any], section: OwnSection) -> dict[str, Any]:
    """The raw config of a folder of this format, from that of the base."""
    return config | {
        "model_type": MODEL_TYPE,
        "architectures": ["CollegiumForCausalLM"],
        "collegium": section.model_dump(mode="json"),
    }


def read_section(checkpoint: Checkpoint) -> OwnSection:
    """What the config of a folder says was done to the base.

    Raises:
        CheckpointError: the folder is not of this format, or contradicts itself.
    """
    path, raw = checkpoint.folder / "config.json", checkpoint.config.get("collegium")
    if not isinstance(raw, dict) or "shrunk" not in raw:
        raise CheckpointError(f"{path} has no shrunk layers of collegium's own; open it with collegium.models.load")
    try:
        return OwnSection.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{path}: the collegium section does not fit this version: {problems}") from error


def load_own(
    folder: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> PreTrainedModel:
    """Open a folder that `save_own` or `save_own_model` wrote, in eval mode, its experts on our compute.

    Args:
        dtype: of the parameters; None means as in the config. What its family keeps in float32 stays so.
        device: where to put the model; None means the CPU.

    Raises:
        CheckpointError: files are missing or damaged, or tensors are missing, unexpected or of another shape; or the
            folder is not of this format.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    checkpoint = open_checkpoint(folder)
    refuse_remote_code(checkpoint.config)
    checkpoint.verify()
    checkpoint.verify_finite()
    model = build(checkpoint, read_section(checkpoint), dtype)
    _fill(model, checkpoint)
    if (checkpoint.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model.to(device).eval() if device is not None else model.eval()


def save_own_model(
    model: PreTrainedModel, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write a model in memory, as `load_own` or `install_compressed` left it and training changed it, to `folder`.

    Raises:
        ConfigError: the model is not of this format, or `folder` holds something that is not a model folder.
        StorageError: a file could not be written; what was in `folder` is untouched.
    """
    folder = Path(folder)
    raw = getattr(model.config, "collegium", None)
    if not isinstance(raw, dict) or "shrunk" not in raw:
        raise ConfigError("this model has no shrunk layers of collegium's own; save it with collegium.models.save")
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / "config.json").exists())):
        raise ConfigError(f"{folder} exists and is no model folder; writing there would replace it. Choose another")
    section = OwnSection.model_validate(raw)
    config = own_config(json.loads(model.config.to_json_string()), section)
    config["dtype"] = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    tensors = {name: tensor.detach().contiguous() for name, tensor in unique_tensors(model).items()}
    with atomic_dir(folder) as partial:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        if model.generation_config is not None:
            model.generation_config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def build(checkpoint: Checkpoint, section: OwnSection, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model that `section` describes, with whatever its memory held; on the default device.

    Raises:
        CheckpointError: the config describes no model, or not the one of the section.
    """
    path = checkpoint.folder / "config.json"
    skip = ("model_type", "architectures", "auto_map", "collegium")
    settings = {key: value for key, value in checkpoint.config.items() if key not in skip}
    register()
    try:
        config = AutoConfig.for_model(section.base, **settings)
        auto = next((auto for auto in AUTO_CLASSES if type(config) in auto._model_mapping), None)
        if auto is None:
            raise CheckpointError(f"{path}: transformers has no language-model class for {section.base!r}")
        with no_init_weights():
            model: PreTrainedModel = auto.from_config(
                config, dtype=dtype or config.dtype or torch.float32, experts_implementation=NAME
            )
        by_layer = {site.layer: site for site in sites(model)}
        for layer in section.shrunk.layers:
            _reshape(by_layer[layer.layer], layer)
        if section.shrunk.compressed is not None:
            install_compressed(model, section.shrunk.compressed)
        model.tie_weights()
    except (CollegiumError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} describes no model: {error}") from error
    model.config.collegium = section.model_dump(mode="json")
    return model


def _reshape(site: Site, layer: OwnLayer) -> None:
    """Give a block of the base the sizes that `layer` says; contents are not defined."""
    experts, weights = site.experts, weights_of(site)
    if layer.num_ids != site.num_experts:
        cut_router(site, range(layer.num_ids), trainable=True)
    if layer.form == "fused":
        packed = pack([_hollow(weights, layer.widths[0])] * len(layer.widths), weights)
        for name, tensor in packed.items():
            experts._parameters[name] = nn.Parameter(torch.empty(tensor.shape, dtype=weights.up.dtype))
        for name in KEYS["num_experts"]:
            if isinstance(vars(experts).get(name), int):
                setattr(experts, name, len(layer.widths))
        return
    loose = [
        _hollow_loose(_hollow(weights, f), ranks or (0, 0, 0), rows or (0, 0, 0), weights.up.dtype)
        for f, ranks, rows in zip_longest(layer.widths, layer.ranks, layer.rows)
    ]
    ids = torch.tensor(layer.expert_map, dtype=torch.long, device="cpu") if layer.expert_map else None
    site.block.experts = LooseExperts.like(experts, loose, ids)
    for name in FUSED:  # the activation is still a method of that module
        experts._parameters.pop(name, None)


def _hollow(weights: ExpertWeights, f: int) -> Expert:
    """An expert of this width without contents."""
    d = weights.down_t.shape[2]

    def shaped(there: bool, *shape: int) -> Tensor | None:
        return torch.empty(*shape, device="meta") if there else None

    bias = weights.up_bias is not None
    return Expert(
        gate=shaped(weights.gated, f, d),
        up=torch.empty(f, d, device="meta"),
        down=torch.empty(d, f, device="meta"),
        gate_bias=shaped(weights.gated and bias, f),
        up_bias=shaped(bias, f),
        down_bias=shaped(weights.down_bias is not None, d),
    )


def _hollow_loose(
    like: Expert, ranks: tuple[int, int, int], rows: tuple[int, int, int], dtype: torch.dtype
) -> LooseExpert:
    def matrix(weight: Tensor, bias: Tensor | None, r: int, s: int) -> LooseMatrix:
        m, n = weight.shape
        offset = None if bias is None else torch.empty(bias.shape, dtype=dtype)
        if r == 0:
            return LooseMatrix(torch.empty(m, n, dtype=dtype), bias=offset)
        sparse = {} if s == 0 else {"S": torch.empty(s, n, dtype=dtype), "rows": torch.empty(s, dtype=torch.long)}
        return LooseMatrix(A=torch.empty(m, r, dtype=dtype), B=torch.empty(r, n, dtype=dtype), bias=offset, **sparse)

    gate = None if like.gate is None else matrix(like.gate, like.gate_bias, ranks[0], rows[0])
    up, down = matrix(like.up, like.up_bias, ranks[1], rows[1]), matrix(like.down, like.down_bias, ranks[2], rows[2])
    return LooseExpert(gate, up, down)


@torch.no_grad()
def _fill(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Put every tensor of the checkpoint into the model; both must hold the same ones."""
    wanted, folder = unique_tensors(model), checkpoint.folder
    refuse_difference(folder, wanted.keys() - checkpoint.tensors, checkpoint.tensors.keys() - wanted)
    exact = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(model.dtype)]
    by_file: dict[str, list[str]] = {}
    for name, info in checkpoint.tensors.items():
        if tuple(wanted[name].shape) != info.shape:
            raise CheckpointError(
                f"{folder / info.file}: {name!r} is {list(info.shape)}, the config says {list(wanted[name].shape)}"
            )
        by_file.setdefault(info.file, []).append(name)
    try:
        for file, names in by_file.items():
            with safe_open(folder / file, framework="pt") as tensors:
                for name in names:
                    keep = any(re.search(pattern, name) for pattern in exact)
                    dtype = torch.float32 if keep else wanted[name].dtype
                    # a copy, as what is read may be a view of the file
                    wanted[name].data = tensors.get_tensor(name).to(dtype, copy=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not read {folder}: {error}") from error
    _check_rows(model, folder)


def _check_rows(model: nn.Module, folder: Path) -> None:
    """Ids that come from a file are used as an index, so none may be beyond its matrix."""
    for path, module in model.named_modules():
        if isinstance(module, LooseMatrix) and module.rows is not None:
            rows = module.rows.tolist()
            if len(set(rows)) != len(rows) or not all(0 <= row < module.shape[0] for row in rows):
                raise CheckpointError(f"{folder}: {path}.rows {rows[:8]} are not rows of a matrix of {module.shape[0]}")
