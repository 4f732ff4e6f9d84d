"""EMO: emergent modularity by pools of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from collegium.catalog import method
from collegium.systems.base import Layer, System

__all__ = ["EMO"]


@method("emo", kind="system", paper="EMO (2026)", arxiv="2605.06663")
@dataclass(frozen=True)
class EMO(System):
    """Tokens of a document share a pool of experts in training, so that a few experts are enough for a domain later.
    The balance loss counts over the whole batch: a narrower one would work against the pools.

    Formula:
        pool of a document = the m experts of the largest mean softmax(W x) over it,
          m ~ U{smallest ... largest}
        p = softmax(W x) over the pool, 0 outside of it, top-K of p;  w_e = p_e
        loss = c E sum_e f_e P_e over the whole batch + b mean_t(logsumexp_e(z_te)^2)

    Cost:
        a mean and a ranking of the experts for each document and layer in training; nothing at inference, where there
        is no pool unless `eval_size` says so.

    Use it:
        where the model is to be cut down to the experts of a domain, or experts are to stand for domains.

    Not:
        where documents cannot be told apart (training needs their ids), or where routing in training may not look at
        later tokens: the pool is that of the whole document.

    Attributes:
        smallest, largest: bounds of the pool's size, both included; None is K and E.
        eval_size: size of the pool at inference, which the prompt chooses; None is no pool.
        load_balancing: c, coefficient of the loss between experts.
        z_loss: b, coefficient of the loss on large logits.
    """

    smallest: int | None = None
    largest: int | None = None
    eval_size: int | None = None
    load_balancing: float = 0.1
    z_loss: float = 1e-3

    def settings(self, layer: Layer) -> dict[str, Any]:
        low = layer.num_experts_per_tok if self.smallest is None else self.smallest
        high = layer.num_experts if self.largest is None else self.largest
        pool = {"smallest": low, "largest": high, "eval_size": self.eval_size}
        return {
            "router": {"transforms": [{"document_pool": pool}], "weigh": {"normalise": False}},
            "balance": {"load_balancing": self.load_balancing, "scope": "global", "z_loss": self.z_loss},
        }
