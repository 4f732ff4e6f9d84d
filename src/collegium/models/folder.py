"""Model folders: write one, open one.

A model with fresh MoE blocks is written as ``config.json``, one ``model.safetensors`` with our tensor names, and its
generation config. The config is the base model's with ``model_type`` "collegium" and a section of that name, which
says what the base was and what was installed; so plain transformers refuses the folder instead of filling dense
layers with random weights (`export` makes a plain model). A model whose own MoE blocks were wrapped is written as the
plain transformers folder it came from, with a section that only our `load` looks at.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from collegium.balance import BalanceConfig
from collegium.errors import CheckpointError, ConfigError, UnsupportedFamilyError
from collegium.files import atomic_dir
from collegium.layer import moe_layers
from collegium.models.blocks import BlockMoE, wrapped_blocks
from collegium.models.checkpoint import Checkpoint, open_checkpoint, refuse_remote_code
from collegium.models.config import MoEConfig
from collegium.models.installing import install
from collegium.models.wrapping import unwrap_block

__all__ = ["AUTO_CLASSES", "MODEL_TYPE", "load", "refuse_difference", "save", "unique_tensors", "unwrapped"]

MODEL_TYPE = "collegium"
"""``model_type`` on disk of a model with fresh MoE blocks."""


class CollegiumConfig(PretrainedConfig):
    """Lets transformers read the config of such a folder (its tokenizer classes do); it builds no model."""

    model_type = MODEL_TYPE


AutoConfig.register(MODEL_TYPE, CollegiumConfig, exist_ok=True)

AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForImageTextToText)


class _Section(BaseModel):
    """The "collegium" section of a config: which `layers` hold fresh blocks (`moe`) or wrapped ones (`wrapped`)."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1]
    layers: list[int]
    base: str | None = None
    moe: MoEConfig | None = None
    wrapped: BalanceConfig | None = None


def save(
    model: PreTrainedModel, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write `model` to `folder` as a whole: config, weights, generation config, and the tokenizer if given.

    A kill half-way leaves what was in `folder` before.

    Raises:
        ConfigError: `folder` holds something that is not a model folder and would be replaced.
        StorageError: a file could not be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / "config.json").exists())):
        raise ConfigError(f"{folder} exists and is no model folder; writing there would replace it. Choose another")
    fresh = any(not isinstance(moe, BlockMoE) or moe.origin is None for moe in moe_layers(model))
    with atomic_dir(folder) as partial:
        if fresh:
            _save_fresh(model, partial)
        else:
            with unwrapped(model):
                model.save_pretrained(partial, max_shard_size="1000GB")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def _save_fresh(model: PreTrainedModel, folder: Path) -> None:
    tensors = unique_tensors(model)
    config = json.loads(model.config.to_json_string())
    config["collegium"]["base"] = config["model_type"]
    config |= {"model_type": MODEL_TYPE, "architectures": ["CollegiumForCausalLM"]}
    config["dtype"] = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, each tied tensor under its first name only."""
    unique = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if unique[id(tensor)] == name}


@contextlib.contextmanager
def unwrapped(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """`model` with its original MoE blocks in place of the wrapped ones, which come back at the end."""
    wrapped = wrapped_blocks(model)
    try:
        for block, moe in wrapped:
            block.replace(unwrap_block(moe))
        yield model
    finally:
        for block, moe in wrapped:
            block.replace(moe)


def load(
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    trust_remote_code: bool = False,
    experts_implementation: str | None = None,
) -> PreTrainedModel:
    """Open a model folder, ours or any plain transformers one, in eval mode. Nothing is downloaded.

    Args:
        folder: written by `save`, or by ``save_pretrained``.
        dtype: of the parameters; None means as in the config. A selection bias stays float32.
        device: where to put the model; None means the CPU.
        trust_remote_code: let transformers execute code that came with the checkpoint.
        experts_implementation: handed to transformers for a plain folder, for example "collegium" after
            ``collegium.sites.register()``.

    Raises:
        RemoteCodeError: the config needs code of its own and `trust_remote_code` is off.
        CheckpointError: files are missing or damaged, or tensors are missing, unexpected or of another shape.
        NonFiniteError: a tensor holds NaN or infinity.
        UnsupportedFamilyError: transformers has no language-model class for the config.
    """
    checkpoint = open_checkpoint(folder)
    if (checkpoint.folder / "store.json").is_file():
        raise CheckpointError(
            f"{folder} is an expert store, whose experts are not among its tensors; use collegium run, or "
            "collegium.offload.model.load_offloaded"
        )
    if not trust_remote_code:
        refuse_remote_code(checkpoint.config)
    section = _section(checkpoint)
    checkpoint.verify()
    checkpoint.verify_finite()
    if section is not None and section.moe is not None:
        model = _load_fresh(checkpoint, section, dtype)
    else:
        model = _load_plain(checkpoint, dtype, trust_remote_code, experts_implementation)
        if section is not None:
            install(model, layers=section.layers, balance=section.wrapped)
    return model.to(device).eval() if device is not None else model.eval()


def _section(checkpoint: Checkpoint) -> _Section | None:
    raw = checkpoint.config.get("collegium")
    if raw is None:
        return None
    if isinstance(raw, dict) and "shrunk" in raw:
        raise CheckpointError(
            f"{checkpoint.folder} holds a shrunk model in collegium's own format; open it with "
            "collegium.compress.load_own"
        )
    try:
        return _Section.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: the collegium section does not fit this version: {problems}"
        ) from error


def _load_fresh(checkpoint: Checkpoint, section: _Section, dtype: torch.dtype | None) -> PreTrainedModel:
    skip = ("model_type", "architectures", "auto_map", "collegium")
    settings = {key: value for key, value in checkpoint.config.items() if key not in skip}
    try:
        # a folder that ``save_pretrained`` wrote keeps the base's own model type
        config = AutoConfig.for_model(section.base or checkpoint.config.get("model_type"), **settings)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)
            install(model, section.moe, layers=section.layers)
        model.tie_weights()
    except (ConfigError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'} describes no model: {error}") from error
    _fill(model, checkpoint)
    if (checkpoint.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model


@torch.no_grad()
def _fill(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy every tensor of the checkpoint into the model; both must hold the same ones."""
    wanted = unique_tensors(model)
    refuse_difference(checkpoint.folder, wanted.keys() - checkpoint.tensors, checkpoint.tensors.keys() - wanted)
    by_file: dict[str, list[str]] = {}
    for name, info in checkpoint.tensors.items():
        if tuple(wanted[name].shape) != info.shape:
            raise CheckpointError(
                f"{checkpoint.folder / info.file}: {name!r} is {list(info.shape)}, the config says "
                f"{list(wanted[name].shape)}"
            )
        by_file.setdefault(info.file, []).append(name)
    for file, names in by_file.items():
        with safe_open(checkpoint.folder / file, framework="pt") as tensors:
            for name in names:
                wanted[name].copy_(tensors.get_tensor(name))


def _load_plain(
    checkpoint: Checkpoint, dtype: torch.dtype | None, trust_remote_code: bool, experts_implementation: str | None
) -> PreTrainedModel:
    folder = checkpoint.folder
    extra = {} if experts_implementation is None else {"experts_implementation": experts_implementation}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        model, report = _auto_class(config, trust_remote_code).from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **extra,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(f"transformers cannot open {folder}: {error}") from error
    refuse_difference(folder, report["missing_keys"], report["unexpected_keys"])
    return model


def _auto_class(config: PretrainedConfig, trust_remote_code: bool) -> Any:
    for auto in AUTO_CLASSES:
        if type(config) in auto._model_mapping:
            return auto
    if trust_remote_code:
        return AutoModelForCausalLM
    raise UnsupportedFamilyError(f"transformers has no language-model class for model type {config.model_type!r}")


def refuse_difference(folder: Path, missing: Any, unexpected: Any) -> None:
    """Raise CheckpointError if there are any: a checkpoint and a model with other tensors are not one model."""
    if missing or unexpected:
        raise CheckpointError(
            f"{folder} does not fit its config: missing tensors {_some(missing)}, "
            f"unexpected tensors {_some(unexpected)}"
        )


def _some(names: Any) -> str:
    listed = ", ".join(sorted(names)[:8]) or "none"
    return listed if len(names) <= 8 else f"{listed} and {len(names) - 8} more"
