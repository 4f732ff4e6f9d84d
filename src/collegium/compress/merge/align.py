"""Neuron alignment by weight matching: two experts that compute the same may hold their neurons in another order.

Legend: f expert width, d model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from collegium.compress.matrices import Expert, LayerExperts
from collegium.compress.merge.segments import flips, segments

__all__ = ["Alignment", "aligned", "alignment"]


def _assign(profit: Tensor) -> Tensor:
    """``[f]`` int64: a column for each row of ``profit [f, f]``, all different, with the largest sum."""
    from scipy.optimize import linear_sum_assignment  # here: it takes longer to import than most plans to make

    return torch.from_numpy(linear_sum_assignment(profit.numpy(), maximize=True)[1])


@dataclass(frozen=True, eq=False)
class Alignment:
    """The place of an expert's neurons in another.

    Attributes:
        order: ``[f]`` int64; neuron ``order[k]`` takes place k.
        sign: ``[f]`` what its row of up and its column of down are multiplied with.
    """

    order: Tensor
    sign: Tensor

    def __call__(self, expert: Expert) -> Expert:
        """The expert with its neurons in their new places; it computes what it did."""
        moved = expert.neurons(self.order)
        return replace(
            moved,
            up=moved.up * self.sign[:, None],
            down=moved.down * self.sign,
            up_bias=None if moved.up_bias is None else moved.up_bias * self.sign,
        )


def alignment(reference: Expert, expert: Expert, *, flips: bool) -> Alignment:
    """Match the neurons of `expert` to those of `reference`.

    The profit of a pair is the sum of the inner products of its rows of gate and up and its columns of down, each
    matrix over the mean lengths of both experts' vectors in it. The assignment with the largest sum is taken: weight
    matching (Git Re-Basin, 2022, arXiv 2209.04836), of experts in MC-SMoE (2023, arXiv 2310.01334).

    Args:
        flips: the sign of up and down is free, so each pair is compared at its better sign.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
    """
    mine, theirs = (segments(one, flips=flips, scaled=True) for one in (expert, reference))
    order = _assign(theirs.similarity(mine))
    return Alignment(order, theirs.paired(mine[order])[1])


def aligned(members: Sequence[int], experts: LayerExperts) -> Iterator[tuple[Expert, Tensor | None]]:
    """``(expert, order)`` of each member of a group, aligned to the first, whose order is None: it is as it was."""
    reference = experts.read(members[0])
    yield reference, None
    for e in members[1:]:
        expert = experts.read(e)
        found = alignment(reference, expert, flips=flips(experts.weights))
        yield found(expert), found.order
