"""`save_own`: what a plan leaves of a checkpoint, in collegium's own format (see `collegium.compress.own`).

One decoder layer is in memory at a time, with what is made of it; tensors outside the layers are copied as bytes. The
result is written beside its place, compared with the model it describes, and renamed at the end.

Legend: E experts of a layer, E' new experts, f width of one expert.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from collegium import __version__
from collegium.compress.factor.parts import dense_expert
from collegium.compress.factor.registry import find_factor
from collegium.compress.mask import cut_router
from collegium.compress.matrices import LayerExperts, pack
from collegium.compress.own import OwnLayer, OwnSection, Shrunk, build, own_config, read_section
from collegium.compress.plan import Plan
from collegium.compress.plan_layer import LayerPlan
from collegium.compress.rewrite import Progress
from collegium.compress.rewrite_compute import Computed
from collegium.compress.rewrite_config import CARD, EDIT, copy_rest, write_edit, write_json
from collegium.compress.target import Target
from collegium.errors import CheckpointError, ConfigError, PlanError, UnsupportedFamilyError
from collegium.experts.loose import FUSED, LooseExpert
from collegium.files import atomic_dir
from collegium.measure.collect import weights_of
from collegium.measure.statistics import Statistics
from collegium.models.checkpoint import BITS, Checkpoint, TensorInfo, open_checkpoint
from collegium.models.families import lookup
from collegium.models.folder import unique_tensors
from collegium.models.shards import Piece, check_space, shards, source_state, write_shards
from collegium.models.summary import layer_of, part_of, split_extra, summarize
from collegium.sites import Site
from collegium.sites.families import UNSUPPORTED

__all__ = ["save_own"]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
"""What safetensors calls the dtypes that a decoder layer may hold."""


def save_own(
    plan: Plan,
    source: Checkpoint | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    statistics: Statistics | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the model that `plan` makes of `source` to `out`, for `collegium.compress.load_own`. Any plan can be
    written so; portable ones are better applied with `apply_plan`.

    Args:
        source: a model folder, or one that is open (it is opened anew); not quantised.
        out: a folder that does not exist, or is empty.
        statistics: those the plan was made from, where its operator or router edit reads them.
        progress: called with the bytes written so far, and with what all will be at most.

    Returns:
        `out`.

    Raises:
        PlanError: the plan is for another model, or wants layers for multi-token prediction, for which there is no
            place; or the statistics are others than those it was made from.
        UnsupportedFamilyError: the weights are quantised, the family cannot be read layer by layer, or its routers or
            experts cannot be taken apart.
        NonFiniteError: something that was computed is NaN or infinite.
        CheckpointError: the source is incomplete or damaged, or it changed while it was read.
        ConfigError: `out` holds something, or statistics are needed.
        StorageError: the result could not be written; then there is none.
    """
    folder, out = source.folder if isinstance(source, Checkpoint) else Path(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists; choose a folder that does not, or remove it first")
    state = source_state(folder)
    checkpoint = open_checkpoint(folder)
    checkpoint.verify()
    family = summarize(checkpoint).family
    if family in UNSUPPORTED:
        raise UnsupportedFamilyError(f"{folder}: family {family!r} cannot be shrunk: {UNSUPPORTED[family]}")
    plan.check(Target.of(checkpoint))
    main = _main(plan, checkpoint)
    fingerprint = checkpoint.fingerprint
    writing = _Writing(plan, Computed(plan, checkpoint, statistics), main, statistics)
    total = plan.reached.nbytes
    check_space(out, total)
    keep = {layer.layer: layer.keep for layer in plan.layers}
    with atomic_dir(out) as partial:
        planned = writing.write(folder, partial, progress, total)
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))  # as it is written, infinities encoded
        section = OwnSection(base=str(checkpoint.config["model_type"]), shrunk=Shrunk(layers=tuple(writing.entries)))
        if not any(raw.get(key) for key in ("dtype", "torch_dtype")):
            raw["dtype"] = str(writing.streamed.dtype).removeprefix("torch.")
        write_json(partial / "config.json", own_config(raw, section))
        copy_rest(folder, partial, keep)
        result = _verify(partial, planned)
        write_edit(partial, folder, plan, keep, fingerprint, result.fingerprint)
        sizes = (summarize(checkpoint).parameters, summarize(result).parameters)
        _write_card(partial, folder, plan, sizes)
        if source_state(folder) != state or open_checkpoint(folder).fingerprint != fingerprint:
            raise CheckpointError(
                f"{folder} was changed while it was read, so the result was thrown away; run it again"
            )
    return out


def _main(plan: Plan, checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The tensors of the model without its layers for multi-token prediction."""
    main, extra = split_extra(checkpoint.tensors, lookup(checkpoint.config, "layers"))
    if extra and plan.mtp != "drop" and any(part_of(name) == "experts" for name in extra):
        raise PlanError(
            f"{checkpoint.folder} has layers for multi-token prediction ({min(extra)!r}), and collegium's own format "
            'has no place for them; set the plan\'s field mtp to "drop" to leave those layers out'
        )
    return main


class _Writing:
    """Writes the shards: one or more with what is outside the decoder layers, and one for each layer.

    Attributes:
        streamed: the source.
        entries: what became of each layer, once it is written.
    """

    def __init__(
        self, plan: Plan, computed: Computed, main: Mapping[str, TensorInfo], statistics: Statistics | None
    ) -> None:
        self.plan, self.computed, self.statistics, self.main = plan, computed, statistics, main
        self.streamed = computed.streamed
        self.layers = {one.layer: one for one in plan.layers}
        self.entries: list[OwnLayer] = []
        operator, factored = plan.operator, any(one.op == "factor" for one in plan.layers)
        self.factor = find_factor(operator.name, operator.settings) if operator is not None and factored else None
        self.many = plan.router.mode == "many_to_one"

    def write(self, source: Path, out: Path, progress: Progress | None, total: int) -> dict[str, tuple[int, ...]]:
        """Write all shards and their index; the name and shape of every tensor."""
        rest = list(shards(self._rest()).values())
        count = len(rest) + len(self.streamed.layers)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        done = 0
        weight_map: dict[str, str] = {}
        planned: dict[str, tuple[int, ...]] = {}

        def step(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, max(done, total))

        files = dict(zip(names, rest, strict=False))
        write_shards(files, source, out, step)
        for name, pieces in files.items():
            weight_map |= {piece.name: name for piece in pieces}
            planned |= {piece.name: piece.shape for piece in pieces}
        for number, name in enumerate(names[len(rest) :]):
            tensors = self._layer(number)
            # not by safetensors' own function, which copies them once more
            write_shards({name: _pieces(tensors)}, source, out, step, tensors.__getitem__)
            weight_map |= dict.fromkeys(tensors, name)
            planned |= {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            del tensors  # before the next layer is read
        index = {"metadata": {"total_size": done}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(out / "model.safetensors.index.json", index)
        return planned

    def _rest(self) -> list[Piece]:
        """What is outside the decoder layers, under the names of the live model."""
        model, stack = self.streamed.model, f"{self.streamed.stack}."
        state = model.state_dict(keep_vars=True)
        first = {id(tensor): name for name, tensor in reversed(state.items())}
        ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
        pieces: dict[str, Piece] = {}
        seen: set[str] = set()
        for name, info in self.main.items():
            target = self.streamed.targets[name]
            if target.startswith(stack) or any(pattern.search(target) for pattern in ignored):
                continue
            if target not in state or target in seen or tuple(state[target].shape) != info.shape:
                raise UnsupportedFamilyError(
                    f"{self.computed.checkpoint.folder}: {name!r} {list(info.shape)} is not stored as the model has it "
                    "in memory, so it cannot be copied"
                )
            seen.add(target)
            live = first[id(state[target])]  # of tied tensors one is kept
            pieces.setdefault(live, Piece(live, info.dtype, info.shape, info.file, ((info.offset, info.nbytes),)))
        return list(pieces.values())

    def _layer(self, number: int) -> dict[str, Tensor]:
        """The tensors of one decoder layer, under the names of the live model."""
        with self.streamed.layer_loaded(number) as layer:
            plan, prefix = self.layers.get(number), f"{self.streamed.stack}.{number}."
            if plan is None or plan.op == "identity":
                return layer.state_dict(prefix=prefix)
            site = self.computed.sites[number]
            experts = self._experts(site, plan)
            routers = self._routers(plan)
            undo = cut_router(site, plan.keep) if len(plan.keep) < plan.num_experts and not self.many else None
            state = layer.state_dict(prefix=prefix)
            if undo is not None:
                undo()
        fused = {f"{site.path}.experts.{name}" for name in FUSED}
        state = {name: tensor for name, tensor in state.items() if name not in fused}
        for name, tensor in routers.items():
            state[name] = tensor.to(state[name].dtype)
        return state | experts

    def _experts(self, site: Site, plan: LayerPlan) -> dict[str, Tensor]:
        """The tensors of the new experts; adds to `entries`."""
        weights, path = weights_of(site), f"{site.path}.experts"
        source = LayerExperts(weights)
        widths = {len(ids) for ids in plan.neurons}
        if plan.op == "prune" and not widths and not self.many:  # as they are, without a float32 copy of the layer
            f, fused = source.intermediate_size, site.experts.named_parameters(recurse=False)
            self.entries.append(OwnLayer(layer=plan.layer, form="fused", widths=(f,) * len(plan.keep)))
            return {f"{path}.{name}": tensor.detach()[list(plan.keep)] for name, tensor in fused if name in FUSED}
        if plan.op != "factor" and not self.many and len(widths) < 2:
            packed = pack(list(self.computed.new_experts(plan, source)), weights)
            f = next(iter(widths), source.intermediate_size)
            self.entries.append(OwnLayer(layer=plan.layer, form="fused", widths=(f,) * len(plan.keep)))
            return {f"{path}.{name}": tensor for name, tensor in packed.items()}
        made: Iterable[LooseExpert]
        if plan.op == "factor":
            assert self.factor is not None
            made = self.factor.factor(plan, source, self.statistics)
        else:
            made = (dense_expert(one) for one in self.computed.new_experts(plan, source))
        tensors: dict[str, Tensor] = {}
        facts = []
        for new, expert in enumerate(made):
            stored = expert.to(weights.up.dtype)
            tensors |= {f"{path}.{new}.{name}": tensor for name, tensor in stored.state_dict().items()}
            facts.append((stored.width, *zip(*(_sizes(one) for one in stored.matrices), strict=True)))
        found, ranks, rows = zip(*facts, strict=True)
        self.entries.append(
            OwnLayer(
                layer=plan.layer,
                form="loose",
                widths=found,
                ranks=ranks if any(map(any, ranks)) else (),
                rows=rows if any(map(any, rows)) else (),
                expert_map=tuple(plan.new_of[e] for e in range(plan.num_experts)) if self.many else (),
            )
        )
        return tensors

    def _routers(self, plan: LayerPlan) -> dict[str, Tensor]:
        """Router tensors that are more than rows of the old ones, under the names of the live model."""
        if self.plan.router.mode in ("rows", "many_to_one"):
            return {}
        block = next(
            found
            for name in self.main
            if part_of(name) == "router" and (found := layer_of(name)) is not None and found[1] == plan.layer
        )
        return {self.streamed.targets[name]: tensor for name, tensor in self.computed.router(self.main, block).items()}


def _sizes(matrix: Any) -> tuple[int, int]:
    """Rank and kept rows; zeros for a gate that is not there."""
    return (0, 0) if matrix is None else (matrix.rank, matrix.kept_rows)


def _pieces(tensors: Mapping[str, Tensor]) -> list[Piece]:
    """What to write of tensors in memory, wider dtypes first."""
    found = [
        Piece(name, _NAMES[tensor.dtype], tuple(tensor.shape), "", (), tensor.nbytes)
        for name, tensor in tensors.items()
    ]
    return sorted(found, key=lambda piece: -BITS[piece.dtype])


def _verify(folder: Path, planned: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """Read the headers back: they hold what was to be written, and that is what the model of the config has."""
    result = open_checkpoint(folder)
    written = {name: info.shape for name, info in result.tensors.items()}
    with torch.device("meta"):
        model = build(result, read_section(result))
    wanted = {name: tuple(tensor.shape) for name, tensor in unique_tensors(model).items()}
    for other, what in ((dict(planned), "planned"), (wanted, "what its config describes")):
        if written != other:
            odd = sorted(name for name in written.keys() | other.keys() if written.get(name) != other.get(name))
            raise CheckpointError(
                f"the model that was written is not {what} ({len(odd)} tensors differ, first {odd[:1]}); it was "
                "thrown away"
            )
    return result


def _write_card(out: Path, folder: Path, plan: Plan, parameters: tuple[int, int]) -> None:
    """The model card: the source's, if it has one, and what was done. `parameters` are before and after."""
    before, after = parameters
    counts = sorted({len(layer.keep) for layer in plan.layers})
    experts = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    made = "" if plan.operator is None else f" They were computed by `{plan.operator.name}`."
    section = (
        "## Shrunk, in collegium's own format\n\n"
        f"Made of `{PurePath(plan.model).name}`: its {len(plan.layers)} MoE layers hold {experts} experts each, by the "
        f"planner `{plan.planner}`.{made} {after:,} of {before:,} parameters are left, and nothing was trained "
        f"afterwards. Plain transformers cannot hold such a model: open it with `collegium.compress.load_own`, or any "
        f"verb of collegium. `{EDIT}` holds the plan.\n\n"
        f"Made with Collegium {__version__}.\n"
    )
    card = (
        (folder / CARD).read_bytes().rstrip() if (folder / CARD).exists() else f"# {PurePath(plan.model).name}".encode()
    )
    (out / CARD).write_bytes(card + b"\n\n" + section.encode("utf-8"))
