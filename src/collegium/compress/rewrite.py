"""`apply_plan`: a checkpoint with fewer or slimmer experts, written by moving bytes.

Only experts that are merged or made slimmer are computed, a layer at a time; all else is never loaded. Source and
result are Hugging Face folders. The result is written beside its place, compared with what its config describes, and
renamed at the end: an interrupted run leaves nothing where the result would be.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from collegium.compress.plan import Plan
from collegium.compress.rewrite_compute import Computed, is_computed
from collegium.compress.rewrite_config import copy_rest, edit_config, write_card, write_edit, write_json
from collegium.compress.rewrite_layout import Block, lay_out
from collegium.compress.target import Target
from collegium.errors import (
    CheckpointError,
    ConfigError,
    PlanError,
    RemoteCodeError,
    UnsupportedFamilyError,
)
from collegium.files import atomic_dir
from collegium.measure.statistics import Statistics
from collegium.models.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from collegium.models.families import lookup
from collegium.models.shards import Piece, check_space, shards, source_state, write_shards
from collegium.models.summary import Summary, part_of, predict_tensors, split_extra, summarize
from collegium.sites.families import UNSUPPORTED

__all__ = ["Progress", "apply_plan", "check_space", "source_state"]

Progress = Callable[[int, int], None]
"""Called with the bytes written so far, and with all that will be."""


def apply_plan(
    plan: Plan,
    source: Checkpoint | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    statistics: Statistics | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint that `plan` makes of `source` to `out`, which plain transformers loads.

    Tensors of experts that go are left out and the others renumbered, or the rows of a tensor that holds all experts
    are taken; router rows and biases follow; every other tensor is copied as it is. Quantised weights are moved as they
    are. Experts of layers that are merged or made slimmer are computed, with one layer's in memory. Tokenizer,
    generation config and chat templates are copied, config and model card are updated, and ``collegium_edit.json``
    says which expert of the source each one was.

    Args:
        source: a model folder, or one that is open (it is opened anew).
        out: a folder that does not exist, or is empty.
        statistics: those the plan was made from, where its operator or router edit reads them.

    Returns:
        `out`.

    Raises:
        PlanError: the plan is for another model, is not portable, or does not say what to do with the model's
            multi-token-prediction layers; or the statistics are others than those it was made from.
        UnsupportedFamilyError: the experts or routers of this family cannot be taken apart, or experts that would be
            merged or made slimmer are quantised.
        NonFiniteError: something that was computed is NaN or infinite.
        CheckpointError: the source is incomplete or damaged, or it changed while it was read.
        ConfigError: `out` holds something, or statistics are needed.
        StorageError: the result could not be written; then there is none.
    """
    folder = source.folder if isinstance(source, Checkpoint) else Path(source)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists; choose a folder that does not, or remove it first")
    state = source_state(folder)
    checkpoint = open_checkpoint(folder)
    checkpoint.verify()
    summary = summarize(checkpoint)
    num_experts, keep = _decisions(plan, checkpoint, summary)
    layers = {layer: ids for (_, layer), ids in keep.items()}
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))  # as it is written, infinities encoded
    config, decoded = (
        edit_config(one, folder, num_experts, layers, width=_width(plan), drop_mtp=plan.mtp == "drop")
        for one in (raw, checkpoint.config)
    )
    computed = Computed(plan, checkpoint, statistics) if is_computed(plan) else None
    pieces, made = _pieces(plan, checkpoint, num_experts, keep, computed)
    _compare_with_class(checkpoint, summary, pieces, decoded)
    total = sum(piece.nbytes for piece in pieces)
    check_space(out, total)
    files = shards(pieces)
    fingerprint = checkpoint.fingerprint
    with atomic_dir(out) as partial:
        write_shards(files, folder, partial, _counter(progress, total), made)
        write_json(partial / "config.json", config)
        copy_rest(folder, partial, layers)
        result = open_checkpoint(partial)
        left = _verify(result, files, len(next(iter(keep.values()))))
        write_edit(partial, folder, plan, layers, fingerprint, result.fingerprint)
        write_card(partial, folder, plan, layers, (summary.parameters, left.parameters))
        if source_state(folder) != state or open_checkpoint(folder).fingerprint != fingerprint:
            raise CheckpointError(
                f"{folder} was changed while it was read, so the result was thrown away; run it again"
            )
    return out


def _decisions(plan: Plan, checkpoint: Checkpoint, summary: Summary) -> tuple[int, dict[Block, tuple[int, ...]]]:
    """E of the source, and the ids to keep by block; raises where the plan cannot become a checkpoint."""
    if summary.family in UNSUPPORTED:
        raise UnsupportedFamilyError(
            f"{checkpoint.folder}: family {summary.family!r} cannot be pruned: {UNSUPPORTED[summary.family]}"
        )
    plan.check(Target.of(checkpoint))
    counts = sorted({len(layer.keep) for layer in plan.layers})
    if len(counts) == 1 and not plan.portable:
        raise PlanError(
            "the plan leaves experts of several widths, factors of matrices, or routers with a row for every old "
            "expert, and no engine loads such a checkpoint; save it for collegium's own loader (--own)"
        )
    sizes = {layer.num_experts for layer in plan.layers}
    if len(counts) > 1:
        raise PlanError(
            f"the plan keeps {counts[0]} to {counts[-1]} experts, not as many in every layer, and no engine loads such "
            "a checkpoint; apply it as a mask, save it for collegium's own loader (--own), or plan again with one "
            "number for all layers"
        )
    if len(sizes) > 1:
        raise UnsupportedFamilyError(
            f"{checkpoint.folder}: layers have {min(sizes)} to {max(sizes)} experts; only a model with one number for "
            "all layers can be rewritten. Apply the plan as a mask"
        )
    chosen = {layer.layer: layer.keep for layer in plan.layers}
    return sizes.pop(), {(one.stack, one.layer): chosen[one.layer] for one in summary.moe_layers}


def _width(plan: Plan) -> tuple[int, int] | None:
    """f before and after; None where it stays."""
    first = plan.layers[0]
    if not first.neurons or first.intermediate_size is None:
        return None
    return first.intermediate_size, len(first.neurons[0])


def _pieces(
    plan: Plan,
    checkpoint: Checkpoint,
    num_experts: int,
    keep: Mapping[Block, tuple[int, ...]],
    computed: Computed | None,
) -> tuple[list[Piece], Callable[[str], Tensor] | None]:
    """What to write, and what gives the tensors that are computed. Layers for multi-token prediction stay whole, or go,
    as the plan says."""
    main, extra = split_extra(checkpoint.tensors, lookup(checkpoint.config, "layers"))
    experts = [name for name in extra if part_of(name) == "experts"]
    if experts and plan.mtp == "refuse":
        raise PlanError(
            f"{checkpoint.folder} has layers for multi-token prediction with experts of their own ({experts[0]!r}), "
            'which the plan does not cover; set its field mtp to "drop" to leave those layers out, or to "keep" to '
            "copy them whole, for engines that read their number of experts from the weights"
        )
    written = main if plan.mtp == "drop" else checkpoint.tensors
    new = {} if computed is None else computed.pieces()
    pieces, dropped = lay_out(written, num_experts, keep, {layer for layer, _ in new.values()})
    assert len(pieces) + len(dropped) == len(written), "every tensor is written, or left out on purpose"
    if computed is None:
        return pieces, None
    routers: dict[str, Tensor] = {}
    if plan.router.mode != "rows":
        for block in keep:
            routers |= computed.router(main, block)
    pieces = [
        replace(piece, file="", ranges=(), computed=routers[piece.name].nbytes) if piece.name in routers else piece
        for piece in pieces
    ]

    def make(name: str) -> Tensor:
        return routers[name] if name in routers else computed.tensor(name, new[name][0])

    return [*pieces, *(piece for _, piece in new.values())], make


def _verify(result: Checkpoint, files: Mapping[str, list[Piece]], kept: int) -> Summary:
    """Read the headers back: every tensor is there, in its shape, and experts and config agree."""
    planned = {
        piece.name: (file, piece.dtype, piece.shape, piece.nbytes) for file, pieces in files.items() for piece in pieces
    }
    written = {name: (info.file, info.dtype, info.shape, info.nbytes) for name, info in result.tensors.items()}
    summary = summarize(result)
    counts = {one.num_experts for one in summary.moe_layers}
    if written != planned or counts != {kept} or lookup(result.config, "num_experts") != kept:
        odd = sorted(name for name in written.keys() | planned.keys() if written.get(name) != planned.get(name))
        raise CheckpointError(
            f"the checkpoint that was written is not the planned one ({len(odd)} tensors differ, first "
            f"{odd[:1]}; experts by layer {sorted(map(str, counts))}, planned {kept}); it was thrown away"
        )
    return summary


def _compare_with_class(source: Checkpoint, summary: Summary, pieces: Sequence[Piece], config: dict[str, Any]) -> None:
    """Compare what is stored with the parameters of the model class: pruning must not open a gap between the two.

    Args:
        config: what the result's will be.
    """
    if summary.quantization is not None:  # stored and loaded parameters differ by the quantiser's own
        return
    try:
        expected = _numel(source.tensors, source.config) - _numel(predict_tensors(source.config), source.config)
    except (CheckpointError, RemoteCodeError):  # no class of transformers to compare with
        return
    gap = _numel({piece.name: piece for piece in pieces}, config) - _numel(predict_tensors(config), config)
    if gap != expected:
        raise UnsupportedFamilyError(
            f"{source.folder}: a model of family {summary.family!r} with this config would have "
            f"{abs(gap - expected):,} parameters {'fewer' if gap > expected else 'more'} than would be kept, so some "
            "of its tensors count experts or neurons in a way that is not known (one config key may size shared "
            "experts too); apply the plan as a mask, or save it for collegium's own loader (--own)"
        )


def _numel(tensors: Mapping[str, TensorInfo | Piece], config: dict[str, Any]) -> int:
    """Elements of the main layers. Router biases are left out: some classes have selection biases as parameters, some
    as buffers."""
    main, _ = split_extra(tensors, lookup(config, "layers"))
    return sum(
        math.prod(info.shape)
        for name, info in main.items()
        if part_of(name) != "router" or math.prod(info.shape) != max(info.shape, default=1)
    )


def _counter(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def step(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return step
