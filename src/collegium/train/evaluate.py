"""Bits per byte of held-out text, by domain: comparable between tokenizers and model sizes.

Legend: B sequences, S positions, D domains.

    bits per byte = (nats of the predicted tokens) / ln 2 / (UTF-8 bytes the predicted tokens stand for)

The first token of a sequence is not predicted, so neither its nats nor its bytes count. An end-of-document token is
predicted and stands for no bytes: its cost is the cost of saying where documents end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collegium.data import Packed
from collegium.errors import DataError
from collegium.layer import use_context
from collegium.train.batches import model_inputs, routing_context
from collegium.train.objective import Objective
from collegium.train.ranks import Ranks

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Totals by domain. Attributes: `nats`, `bytes`, `tokens`, each by domain name; domains without text are absent."""

    nats: dict[str, float]
    bytes: dict[str, int]
    tokens: dict[str, int]

    @property
    def bits_per_byte(self) -> dict[str, float]:
        """By domain."""
        return {name: self.nats[name] / math.log(2) / self.bytes[name] for name in self.nats}

    @property
    def overall(self) -> float:
        """Bits per byte of all domains taken together."""
        return sum(self.nats.values()) / math.log(2) / sum(self.bytes.values())

    @property
    def loss(self) -> float:
        """Nats per token of all domains taken together."""
        return sum(self.nats.values()) / sum(self.tokens.values())


def evaluate(
    model: Any,
    packed: Packed,
    token_bytes: np.ndarray,
    batch_size: int,
    *,
    sequences_per_domain: int | None = None,
    mask_documents: bool = True,
    ranks: Ranks | None = None,
    precision: torch.dtype = torch.float32,
    objective: Objective | None = None,
) -> Evaluation:
    """Score `packed` with `model`, the sequences shared among processes.

    Args:
        model: a transformers causal LM; its training mode is restored afterwards.
        packed: sequences packed by domain (`collegium.data.pack` with ``by_domain=True``).
        token_bytes: ``[vocab]`` bytes each token stands for.
        batch_size: sequences at a time.
        sequences_per_domain: only this many of each domain, evenly spaced; None takes all.
        mask_documents: as in training, see `model_inputs`.
        ranks: the processes that share the work; a collective call then.
        precision: bfloat16 runs under autocast.
        objective: the model's, if there is one already.

    Raises:
        DataError: there is nothing to score.
    """
    ranks = ranks or Ranks(device=next(model.parameters()).device)
    objective = objective or Objective(model)
    chosen = _choose(packed, sequences_per_domain)
    D = len(packed.domains)
    sums = torch.zeros(3, D, dtype=torch.float64, device=ranks.device)
    bytes_V = torch.as_tensor(np.asarray(token_bytes, dtype=np.int64), device=ranks.device)
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=precision == torch.bfloat16)
    eager = torch.compiler.set_stance("force_eager")
    training = model.training
    model.eval()
    try:
        for at in range(ranks.rank * batch_size, len(chosen), ranks.world * batch_size):
            batch = {k: v.to(ranks.device) for k, v in packed.batch(chosen[at : at + batch_size]).items()}
            # compiling again for batches without gradients, and for the last, smaller one, would not pay
            with eager, autocast, use_context(model, routing_context(batch)):
                nats = objective.nats(model_inputs(batch, model, mask_documents))
            sums += _by_domain(nats, batch, bytes_V, D)
    finally:
        model.train(training)
    nats_D, bytes_D, tokens_D = ranks.sum_(sums).tolist()
    found = [(name, i) for i, name in enumerate(packed.domains) if bytes_D[i] > 0]
    if not found:
        raise DataError("nothing to evaluate: the held-out split holds less than one sequence of any domain")
    return Evaluation(
        {name: nats_D[i] for name, i in found},
        {name: int(bytes_D[i]) for name, i in found},
        {name: int(tokens_D[i]) for name, i in found},
    )


def _by_domain(nats: Tensor, batch: dict[str, Tensor], bytes_V: Tensor, D: int) -> Tensor:
    """``[3, D]`` float64: nats, bytes and tokens of each domain; a token belongs to its own document's domain."""
    domain = batch["domain"][:, 1:].reshape(-1)
    counted = (nats.reshape(-1).double(), bytes_V[batch["input_ids"][:, 1:].reshape(-1)].double())
    rows = [torch.bincount(domain, weights=w, minlength=D) for w in counted]
    return torch.stack([*rows, torch.bincount(domain, minlength=D).double()])


def _choose(packed: Packed, per_domain: int | None) -> Sequence[int]:
    """Sequence numbers to score, the same on every process."""
    if per_domain is None:
        return range(len(packed))
    domain = np.asarray(packed.domain_of_document)[np.asarray(packed.document[:, 0])]
    chosen: list[int] = []
    for d in range(len(packed.domains)):
        of_domain = np.flatnonzero(domain == d)
        take = min(per_domain, len(of_domain))
        chosen += of_domain[np.arange(take) * len(of_domain) // max(take, 1)].tolist()
    return chosen
