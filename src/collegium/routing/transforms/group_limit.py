"""Selection limited to the experts of a few groups (of a few devices)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.routing.parts import Part, Scores, Transform
from collegium.routing.record import RoutingContext

__all__ = ["GroupLimit"]


@method("group_limit", kind="transform", paper="DeepSeek-V2 (2024)", arxiv="2405.04434")
@dataclass(frozen=True)
class GroupLimit(Transform):
    """A token may choose only among the experts of its best `keep` of `groups` groups.

    Groups are runs of E / groups neighbouring experts, so that a token visits at most `keep` devices. DeepSeek-V2
    ("max", masked 0) limits devices this way; DeepSeek-V3 (arXiv 2412.19437; "top2_sum", masked -inf) scores a group by
    its two best experts, on biased scores.

    Formula:
        g = max, or sum of the two largest, of the selection scores of group g
        selection_e = masked_value unless the group of e is among the keep largest

    Cost:
        a maximum over each group; no parameters.

    Use it:
        where experts are spread over devices and sending a token to many of them is what takes the time.

    Not:
        on one device, or to load devices evenly, which `GroupedTopK` does.

    Attributes:
        groups: how many there are (``n_group`` in transformers); must divide E.
        keep: groups kept per token (``topk_group`` in transformers).
        group_score: "max" of a group's selection scores, or "top2_sum", the sum of its two largest.
        masked_value: selection score of the experts outside the kept groups. A finite value lets them compete again,
            which families that mask with 0 accept because a softmax is never below it.
    """

    symmetric = False
    groups: int
    keep: int
    group_score: Literal["max", "top2_sum"] = "top2_sum"
    masked_value: float = -math.inf

    def check(self, num_experts: int, top_k: int, parts: tuple[Part, ...]) -> None:
        groups, keep = self.groups, self.keep
        if groups < 1 or num_experts % groups:
            raise ConfigError(
                f"groups (n_group) is {groups}, which does not divide {num_experts} experts into equal groups; take a "
                "divisor"
            )
        if not 1 <= keep <= groups:
            raise ConfigError(f"keep (topk_group) is {keep}; with {groups} groups it must be 1 to {groups}")
        size = num_experts // groups
        if top_k > keep * size:
            raise ConfigError(
                f"top_k is {top_k}, but {keep} groups of {size} experts hold only {keep * size}; raise keep "
                "(topk_group), or lower groups (n_group) or top_k"
            )
        if self.group_score not in ("max", "top2_sum"):
            raise ConfigError(f"group_score is {self.group_score!r}; it must be 'max' or 'top2_sum'")
        if self.group_score == "top2_sum" and size < 2:
            raise ConfigError(
                f"group_score 'top2_sum' needs two experts per group, but {num_experts} experts in {groups} groups are "
                "one each; lower groups (n_group) or use 'max'"
            )

    def __call__(self, scores: Scores, context: RoutingContext) -> Scores:
        grouped = scores.selection.unflatten(-1, (self.groups, -1))
        if self.group_score == "max":
            group_score = grouped.amax(-1)
        else:
            group_score = grouped.topk(2, dim=-1).values.sum(-1)
        best = group_score.topk(self.keep, dim=-1).indices
        masked = torch.ones_like(group_score, dtype=torch.bool).scatter(-1, best, False)
        limited = grouped.masked_fill(masked.unsqueeze(-1), self.masked_value)
        return replace(scores, selection=limited.flatten(-2))
