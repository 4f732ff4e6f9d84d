"""Sums over blocks of documents, from which scores and their intervals are made.

Legend: N rows (predicted tokens), T tokens, E experts, K slots, C domains, M blocks of documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from collegium.compress.judge_result import DomainScore, LayerScore
from collegium.compress.judge_sides import Seen
from collegium.measure.estimate import MAX_BLOCKS, Estimate, bootstrap
from collegium.routing import Routing

__all__ = ["LayerSums", "TokenSums"]


class TokenSums:
    """``[C, M, 6]``: tokens, bytes, nats, nats of the whole model, KL, and agreements about the likeliest token."""

    def __init__(self, domains: Sequence[str], has_bytes: bool, has_whole: bool) -> None:
        self.domains, self.has_bytes, self.has_whole = tuple(domains), has_bytes, has_whole
        self.sums = torch.zeros(len(domains) * MAX_BLOCKS, 6, dtype=torch.float64)
        self.documents: list[set[int]] = [set() for _ in domains]

    def add(self, domain: Tensor, document: Tensor, values: Tensor) -> None:
        """Add rows: ``domain [N]``, ``document [N]`` and the six ``values [N, 6]``."""
        self.sums.index_add_(0, domain * MAX_BLOCKS + document % MAX_BLOCKS, values.double())
        for code in domain.unique().tolist():
            self.documents[code].update(document[domain == code].unique().tolist())

    def scores(self) -> list[DomainScore]:
        """Of all domains together, and then of each that has tokens."""
        by_domain = self.sums.view(len(self.domains), MAX_BLOCKS, 6).numpy()
        found = [self._score("all", by_domain.sum(0), sum(map(len, self.documents)))]
        for name, blocks, documents in zip(self.domains, by_domain, self.documents, strict=True):
            if blocks[:, 0].any():
                found.append(self._score(name, blocks, len(documents)))
        return found

    def _score(self, name: str, blocks: np.ndarray, documents: int) -> DomainScore:
        blocks = blocks[blocks[:, 0] > 0]
        tokens, nbytes, _, whole, _, _ = blocks.sum(0)

        def numbers(s: np.ndarray) -> np.ndarray:
            return np.array([s[2], s[2] - s[3], s[4], s[5]]) / s[0]

        bounds = ([0, -np.inf, 0, 0], [np.inf, np.inf, np.inf, 1])
        loss, difference, kl, top1 = bootstrap(blocks, numbers, bounds=bounds)
        counts = int(tokens), int(nbytes) if self.has_bytes else None
        if not self.has_whole:
            return DomainScore(name, documents, *counts, loss)
        return DomainScore(name, documents, *counts, loss, float(whole / tokens), difference, kl, top1)


class LayerSums:
    """For one layer ``[M, 5]``: the whole model's choices, those still there, those that both make, the sum of relative
    output errors, and the tokens in it.

    Args:
        new_of: ``[E]`` for each expert of the whole model its number in the other, -1 where it is gone; None if that is
            not known.
    """

    def __init__(self, layer: int, num_experts: int, whole_experts: int, new_of: Sequence[int] | None) -> None:
        self.layer, self.num_experts, self.whole_experts = layer, num_experts, whole_experts
        # an unused slot has the number E
        self.new_of = None if new_of is None else torch.tensor([*new_of, -1])
        self.sums = torch.zeros(MAX_BLOCKS, 5, dtype=torch.float64)

    def add(self, seen: Seen, whole: Seen, valid: Tensor, document: Tensor) -> None:
        """Add the tokens where ``valid [T]``, of ``document [T]``."""
        block = (document[valid] % MAX_BLOCKS).cpu()
        if self.new_of is not None:
            chosen, theirs = seen.routing[self.layer], whole.routing[self.layer]
            self.sums[:, :3].index_add_(0, block, self._choices(chosen, theirs)[valid].cpu())
        y, before = seen.output[self.layer], whole.output[self.layer]
        if y.shape == before.shape and len(y) == len(valid):
            y, before = y[valid].float(), before[valid].float()
            norm = before.norm(dim=1).cpu()
            there = norm > 0
            error = (y - before).norm(dim=1).cpu()[there] / norm[there]
            self.sums[:, 3:].index_add_(0, block[there], torch.stack([error, torch.ones_like(error)], 1).double())

    def _choices(self, routing: Routing, whole: Routing) -> Tensor:
        """``[T, 3]`` how many of a token's choices in the whole model there are, are still there, and are made here."""
        assert self.new_of is not None
        theirs, mine = whole.to_topk()[0], routing.to_topk()[0]
        # under a mask routers choose in the numbers of the whole model
        width = routing.num_experts + 1
        chosen = torch.zeros(len(mine), width, dtype=torch.bool, device=mine.device).scatter_(1, mine, True)
        chosen[:, -1] = False
        new = self.new_of.to(theirs.device)[theirs]
        there = new >= 0
        both = there & chosen.gather(1, new.clamp(min=0))
        return torch.stack([(theirs < whole.num_experts).sum(1), there.sum(1), both.sum(1)], 1).double()

    def score(self) -> LayerScore:
        """Of all tokens that were added."""
        blocks = self.sums.numpy()
        share = {"bounds": (0.0, 1.0)}
        return LayerScore(
            self.layer,
            self.num_experts,
            self.whole_experts,
            _ratio(blocks, 1, 0, **share),
            _ratio(blocks, 2, 1, **share),
            _ratio(blocks, 3, 4, bounds=(0.0, np.inf)),
        )


def _ratio(blocks: np.ndarray, above: int, below: int, bounds: tuple[float, float]) -> Estimate | None:
    """Sum of one column over that of another; None where the latter is 0."""
    blocks = blocks[blocks[:, below] > 0]
    if not len(blocks):
        return None
    return bootstrap(blocks, lambda sums: sums[above] / sums[below], bounds=bounds)[0]
