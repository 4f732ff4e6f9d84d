"""Which bytes of a checkpoint a pruned one is made of: tensor by tensor, from names and headers alone.

Experts are found by the names of their tensors, stored one by one (``experts.7.``) or all in one tensor whose first
axis is the expert. A router's rows are found by shape. Whatever has neither form is refused by name: a tensor that was
copied though it counts experts would load into a broken model.

Legend: E experts of a layer, d model width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from itertools import groupby

from collegium.errors import UnsupportedFamilyError
from collegium.models.checkpoint import TensorInfo
from collegium.models.shards import Piece
from collegium.models.summary import layer_of, part_of

__all__ = ["Block", "Piece", "lay_out", "renumber", "router_axis"]

_EXPERT = re.compile(r"(experts\.(?:expert_)?)(\d+)(?=\.|$)")
_ROUTER_BIAS = re.compile(r"(bias|biases|per_expert_scale)$")
_ROUTER_WEIGHT = re.compile(r"(weight|weight_scale)$")
# rows of experts that cannot be taken out byte by byte
_ROUTER_PACKED = re.compile(
    r"tid2eid|weight_scale_inv|weight_packed|qweight|qzeros|\.scales|g_idx|zero_point|absmax|quant_map|quant_state|SCB"
)

Block = tuple[str, int]
"""Path of the list a decoder layer is in, and its number there."""


def lay_out(
    tensors: Mapping[str, TensorInfo],
    num_experts: int,
    keep: Mapping[Block, tuple[int, ...]],
    without: Container[int] = (),
) -> tuple[list[Piece], list[str]]:
    """What becomes of every tensor: the pieces to write, in the order of the source, and the names left out.

    Args:
        num_experts: E, the same in every layer of `keep`.
        keep: the ids of the experts that stay, ascending, by MoE layer; tensors of other layers stay as they are.
        without: layers whose experts are all left out, since new ones are computed.

    Raises:
        UnsupportedFamilyError: a tensor of experts or of a router has a form that cannot be cut, or a layer has no
            router weights ``[E, d]``.
    """
    pieces: list[Piece] = []
    dropped: list[str] = []
    routed: set[Block] = set()
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
        block = layer_of(name)
        part = part_of(name)
        if block is None or block not in keep or part not in ("experts", "router"):
            pieces.append(_whole(name, info))
        elif part == "experts":
            piece = None if block[1] in without else _cut_experts(name, info, num_experts, keep[block])
            if piece is None:
                dropped.append(name)
            else:
                pieces.append(piece)
        else:
            axis = router_axis(name, info.shape, num_experts)
            pieces.append(_whole(name, info) if axis is None else _cut(name, info, axis, keep[block]))
            if axis == 0 and len(info.shape) == 2:
                routed.add(block)
    blind = sorted(keep.keys() - routed)
    if blind:
        stack, layer = blind[0]
        raise UnsupportedFamilyError(
            f"{stack}.{layer} has {num_experts} experts and no router weight of as many rows was found, so the router "
            "cannot be pruned with them; apply the plan as a mask"
        )
    return pieces, dropped


def renumber(name: str, keep: tuple[int, ...]) -> str | None:
    """`name` with its expert's new number; None if that expert goes, and `name` itself if it names none."""
    match = _EXPERT.search(name)
    if match is None:
        return name
    old = int(match[2])
    if old not in keep:
        return None
    return f"{name[: match.start(2)]}{keep.index(old)}{name[match.end(2) :]}"


def _whole(name: str, info: TensorInfo) -> Piece:
    return Piece(name, info.dtype, info.shape, info.file, ((info.offset, info.nbytes),))


def _cut_experts(name: str, info: TensorInfo, num_experts: int, keep: tuple[int, ...]) -> Piece | None:
    match = _EXPERT.search(name)
    if match is not None:
        if int(match[2]) >= num_experts:
            raise UnsupportedFamilyError(f"tensor {name!r} is of an expert beyond the {num_experts} of its layer")
        new = renumber(name, keep)
        return None if new is None else replace(_whole(name, info), name=new)
    if info.shape and info.shape[0] == num_experts:
        return _cut(name, info, 0, keep)
    if math.prod(info.shape) == 1:  # one scale for all experts
        return _whole(name, info)
    raise UnsupportedFamilyError(
        f"tensor {name!r} {list(info.shape)} belongs to the {num_experts} experts of its layer, and neither its name "
        "nor its first axis tells them apart; apply the plan as a mask"
    )


def router_axis(name: str, shape: tuple[int, ...], num_experts: int) -> int | None:
    """The axis of a router's tensor that counts experts; None if there is none."""
    if not _ROUTER_PACKED.search(name):
        if shape == (num_experts,) and _ROUTER_BIAS.search(name):
            return 0
        if len(shape) == 2 and shape[0] == num_experts and _ROUTER_WEIGHT.search(name):
            return 0
        if shape == (1, num_experts) and _ROUTER_BIAS.search(name):
            return 1
        if num_experts not in shape:
            return None
    raise UnsupportedFamilyError(
        f"tensor {name!r} {list(shape)} of the router of {num_experts} experts cannot be cut: its form is not known, "
        "or it is packed; apply the plan as a mask"
    )


def _cut(name: str, info: TensorInfo, axis: int, keep: tuple[int, ...]) -> Piece:
    """The rows `keep` along `axis`."""
    E, outer = info.shape[axis], math.prod(info.shape[:axis])
    row, rest = divmod(info.nbytes, max(E * outer, 1))
    if rest:
        raise UnsupportedFamilyError(f"tensor {name!r}: rows of {info.dtype} {list(info.shape)} share bytes")
    ranges = tuple(
        (info.offset + (block * E + first) * row, count * row) for block in range(outer) for first, count in _runs(keep)
    )
    shape = (*info.shape[:axis], len(keep), *info.shape[axis + 1 :])
    return Piece(name, info.dtype, shape, info.file, ranges)


def _runs(ids: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first, length) of every run of consecutive ids: ``0 1 2 5 6`` -> ``(0, 3), (5, 2)``."""
    for _, run in groupby(enumerate(ids), key=lambda pair: pair[1] - pair[0]):
        members = [e for _, e in run]
        yield members[0], len(members)
