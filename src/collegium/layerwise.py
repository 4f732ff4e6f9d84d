"""A transformers model on the meta device whose weights come from its checkpoint, one decoder layer at a time.

The model is built from its config, so every module, name and shape is there and takes no memory. Weights go through
transformers' own renaming and conversion (per-expert tensors become fused ones, and so on), restricted to the tensors
of the part that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from collegium.errors import CheckpointError, ConfigError, UnsupportedFamilyError
from collegium.models.checkpoint import Checkpoint, refuse_remote_code
from collegium.models.folder import AUTO_CLASSES
from collegium.sites import register, sites
from collegium.sites.seam import NAME

__all__ = ["LayerwiseModel"]

# an argument without a default before transformers 5.16, gone since
_TP_PLAN = {"tp_plan": None} if "tp_plan" in signature(convert_and_load_state_dict_in_model).parameters else {}
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


class LayerwiseModel:
    """The model of a checkpoint without its weights, and what brings them in.

    On entry everything around the decoder layers that a forward up to the last of them needs is real (norms, rotary
    tables), except for the token embeddings.

    Attributes:
        model: in eval mode; its experts run on our compute where transformers lets them.
        layers: the decoder layers.
        embedding: the token embeddings.
        family: model_type.
        dtype: of the weights once they are there.
        stack: path of the list of decoder layers.
        targets: name on disk -> name in the model, or the first of them where a tensor becomes several.

    Args:
        dtype: "auto" means the config's, else that of the weights.

    Raises:
        UnsupportedFamilyError: the weights are quantised, or transformers has no language-model class for the config,
            or the MoE blocks are in several stacks of layers.
        NotMoEError, RemoteCodeError, CheckpointError: as for `collegium.models.load`.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str | torch.dtype = "auto") -> None:
        refuse_remote_code(checkpoint.config)
        checkpoint.verify()
        _refuse(checkpoint)
        register()
        self.checkpoint = checkpoint
        self.model, self.dtype = _build(checkpoint, dtype)
        self.family = str(checkpoint.config.get("model_type"))
        self.stack = self._find_stack()
        self._backbone = self.stack.rpartition(".")[0]
        self.layers: Any = self.model.get_submodule(self.stack)
        self.embedding: Any = self.model.get_input_embeddings()
        self._embedding = next(path for path, module in self.model.named_modules() if module is self.embedding)
        self._loading = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=get_model_conversion_mapping(self.model),
        )
        self.targets = self._find_targets()
        self._fill(self._backbone, self.stack, self._embedding)
        self.model.requires_grad_(False)

    @property
    def vocabulary(self) -> int:
        """Token ids there are."""
        return self.embedding.weight.shape[0]

    def fill(self, *without: str) -> None:
        """Make everything real and leave it so, one decoder layer after the other, except for parameters and modules at
        the paths `without`.

        Raises:
            CheckpointError: a tensor is missing, unexpected, damaged or of another shape.
        """
        for number in range(len(self.layers)):
            self._fill(f"{self.stack}.{number}", *without)
            _own(self.layers[number].modules())
        there = set(self.targets.values())
        tied = [name for name in self.model.all_tied_weights_keys if name not in there]
        self._fill("", self.stack, *tied, *without)
        inside = set(self.layers.modules())
        _own(module for module in self.model.modules() if module not in inside)
        self.model.tie_weights()
        self.model.requires_grad_(False)

    @contextmanager
    def embedding_loaded(self) -> Iterator[None]:
        """Within the context the token embeddings are real."""
        with self._loaded(self._embedding):
            yield

    @contextmanager
    def layer_loaded(self, number: int) -> Iterator[nn.Module]:
        """Within the context one decoder layer is real.

        Raises:
            CheckpointError: a tensor of it is missing, unexpected, damaged or of another shape.
        """
        with self._loaded(f"{self.stack}.{number}"):
            yield self.layers[number]

    @contextmanager
    def head_loaded(self) -> Iterator[None]:
        """Within the context what makes logits of the last hidden states is real.

        Raises:
            CheckpointError: as for `layer_loaded`.
        """
        head: Any = self.model.get_output_embeddings()
        path = next(path for path, module in self.model.named_modules() if module is head)
        name = f"{path}.weight"
        if name in self.targets.values() or name not in self.model.all_tied_weights_keys:
            with self._loaded(path):
                yield
            return
        before = head._parameters["weight"]  # tied to the embeddings
        with self.embedding_loaded():
            head._parameters["weight"] = self.embedding.weight
            try:
                yield
            finally:
                head._parameters["weight"] = before

    @contextmanager
    def _loaded(self, path: str) -> Iterator[None]:
        before = [(m, dict(m._parameters), dict(m._buffers)) for m in self.model.get_submodule(path).modules()]
        try:
            self._fill(path)
            self.model.get_submodule(path).requires_grad_(False)
            yield
        finally:
            for module, parameters, buffers in before:
                module._parameters.update(parameters)
                module._buffers.update(buffers)

    def _fill(self, path: str, *without: str) -> None:
        """Make the module at `path` real, except for what is under the paths `without`."""

        def inside(name: str) -> bool:
            return _under(name, path) and not any(_under(name, other) for other in without)

        names = [name for name, target in self.targets.items() if inside(target)]
        report = self._convert(names, path)
        self.model._adjust_missing_and_unexpected_keys(report)
        missing = [name for name in report.missing_keys if inside(name)]
        problems = {
            "missing tensors": missing,
            "unexpected tensors": report.unexpected_keys,
            "tensors of another shape": [name for name, *_ in report.mismatched_keys],
            "tensors that do not convert": [*report.conversion_errors],
        }
        found = "; ".join(f"{what}: {', '.join(sorted(some)[:4])}" for what, some in problems.items() if some)
        if found:
            raise CheckpointError(f"{self.checkpoint.folder} does not fit its config in {path!r}: {found}")
        for name, module in self.model.get_submodule(path).named_modules(prefix=path):
            if inside(name):
                self._fill_tables(module)

    def _convert(self, names: Sequence[str], path: str) -> Any:
        """Read tensors and put them into the model the way ``from_pretrained`` does; what it says of that."""
        infos = self.checkpoint.tensors
        try:
            with ExitStack() as stack, _no_bar():
                files = {
                    file: stack.enter_context(safe_open(self.checkpoint.folder / file, framework="pt"))
                    for file in sorted({infos[name].file for name in names})
                }
                slices = {name: files[infos[name].file].get_slice(name) for name in names}
                return convert_and_load_state_dict_in_model(self.model, slices, self._loading, **_TP_PLAN)[0]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"could not read {path!r} of {self.checkpoint.folder}: {error}") from error

    @torch.no_grad()
    def _fill_tables(self, module: nn.Module) -> None:
        """Compute the buffers of one module that no checkpoint holds, such as rotary frequencies."""
        buffers = ((name, module._buffers.get(name)) for name in module._non_persistent_buffers_set)
        tables = {name: table for name, table in buffers if table is not None and table.is_meta}
        for name, table in tables.items():
            # so that a table which its family forgets to compute is noticed
            value = float("nan") if table.is_floating_point() else 0
            setattr(module, name, torch.full_like(table, value, device="cpu"))
        if tables:
            backbone: Any = self.model.get_submodule(self._backbone)
            owner = backbone if isinstance(backbone, PreTrainedModel) else self.model
            owner._init_weights(module)

    def _find_stack(self) -> str:
        """Path of the list of decoder layers."""
        stacks = {_NUMBER.split(site.path, maxsplit=1)[0] for site in sites(self.model)}
        if len(stacks) != 1:
            raise UnsupportedFamilyError(
                f"family {self.family!r} has MoE blocks in several stacks of layers ({', '.join(sorted(stacks))}), "
                "which cannot be streamed; load the whole model and use collegium.measure.collect"
            )
        return stacks.pop()

    def _find_targets(self) -> dict[str, str]:
        """Name on disk -> name in the model, or the first of them where a tensor becomes several."""
        mapping = self._loading.weight_mapping or []
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        targets = {}
        for name in self.checkpoint.tensors:
            target, _ = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target, _ = rename_source_key(name, [], [], prefix, state)
            targets[name] = target
        return targets


@torch.no_grad()
def _own(modules: Iterable[nn.Module]) -> None:
    """Copy what may be a view of a mapped file: the system can drop its pages, and where it begins at an odd address
    products are slower and round otherwise than in a model that was loaded as usual."""
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), False)
        for name, table in module._buffers.items():
            if table is not None and not table.is_meta:
                module._buffers[name] = table.clone()


def _under(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


def _refuse(checkpoint: Checkpoint) -> None:
    """Refuse what cannot be streamed and shows in the config."""
    config, folder = checkpoint.config, checkpoint.folder
    text = config.get("text_config")
    for table in (config, text if isinstance(text, dict) else {}):
        if table.get("quantization_config"):
            raise UnsupportedFamilyError(
                f"{folder} is quantised; this takes weights of a floating dtype. Save a dequantised copy"
            )
    section = config.get("collegium")
    if isinstance(section, dict) and "shrunk" in section:
        raise UnsupportedFamilyError(
            f"{folder} is a shrunk model in collegium's own format, which cannot be streamed; open it with "
            "collegium.compress.load_own and use collegium.measure.collect"
        )
    if isinstance(section, dict) and section.get("moe") is not None:
        raise UnsupportedFamilyError(
            f"{folder} holds MoE blocks of collegium's own, which cannot be streamed; make it a plain transformers "
            "model with collegium.models.export, or load it and use collegium.measure.collect"
        )


def _build(checkpoint: Checkpoint, dtype: str | torch.dtype) -> tuple[Any, torch.dtype]:
    """``(model on the meta device, dtype)``."""
    try:
        config: Any = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        auto = next((auto for auto in AUTO_CLASSES if type(config) in auto._model_mapping), None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"transformers cannot read the config of {checkpoint.folder}: {error}") from error
    if auto is None:
        raise UnsupportedFamilyError(f"transformers has no language-model class for model type {config.model_type!r}")
    wanted = _dtype(checkpoint, config, dtype)
    try:
        with torch.device("meta"), no_init_weights():
            model: Any = auto.from_config(config, dtype=wanted, experts_implementation=NAME, trust_remote_code=False)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'} describes no model: {error}") from error
    return model.eval().requires_grad_(False), wanted


def _dtype(checkpoint: Checkpoint, config: Any, dtype: str | torch.dtype) -> torch.dtype:
    found: Any = dtype
    if dtype == "auto":
        found = config.dtype or next(
            (_FLOATS[info.dtype] for info in checkpoint.tensors.values() if info.dtype in _FLOATS), torch.float32
        )
    if isinstance(found, str):
        found = getattr(torch, found, None)
    if found not in _FLOATS.values():
        raise ConfigError(f"dtype {dtype!r} is none of auto, float64, float32, bfloat16, float16")
    return found


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without the progress bar that transformers shows for every load."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
