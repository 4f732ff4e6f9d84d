"""Which sequences a step trains on, and what the model is given for them.

Legend: B sequences, S positions, N sequences in the training set.

The order is a fresh permutation per epoch, keyed by (seed, epoch): the sequences of a step follow from its number
alone, so resuming needs no data state and every process can compute its own share.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from collegium.data import Packed
from collegium.errors import ConfigError
from collegium.routing.record import RoutingContext

__all__ = ["Order", "model_inputs", "routing_context"]


class Order:
    """The endless sequence of training sequences.

    Args:
        packed: the training set.
        seed: of the run.
    """

    def __init__(self, packed: Packed, seed: int) -> None:
        self.packed, self.seed = packed, seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __call__(self, start: int, count: int) -> np.ndarray:
        """``[count]`` int64 sequence numbers from place `start` of the endless order on."""
        places = np.arange(start, start + count)
        epochs, within = np.divmod(places, len(self.packed))
        return np.concatenate([self._of(int(e))[within[epochs == e]] for e in np.unique(epochs)])

    def _of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, self.packed.order(self.seed, epoch)
        return self._permutation


def model_inputs(batch: dict[str, Tensor], model: Any, mask_documents: bool) -> dict[str, Tensor]:
    """Keyword arguments of the model for one packed batch.

    Args:
        batch: ``input_ids``, ``document``, ``position``, each ``[B, S]`` int64, as `Packed.batch` gives them.
        model: a transformers causal LM.
        mask_documents: confine attention to the document with an explicit mask and restart positions with it.
            transformers would also guess document borders from restarting positions, but only with some attention
            implementations; a mask ``[B, 1, S, S]`` leaves nothing to guess. Without it positions run on.

    Raises:
        ConfigError: documents are to be masked in a model that has other than full attention, whose own masks an
            explicit one would replace.
    """
    if not mask_documents:
        return {"input_ids": batch["input_ids"]}
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ConfigError(f"data.mask_documents needs full attention in all layers, this model has {sorted(kinds)}")
    document = batch["document"]
    S = document.shape[1]
    causal = torch.ones(S, S, dtype=torch.bool, device=document.device).tril()
    mask = (causal & (document[:, :, None] == document[:, None, :]))[:, None]
    if model.config._attn_implementation != "sdpa":
        lowest = torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, lowest)
    return {"input_ids": batch["input_ids"], "position_ids": batch["position"], "attention_mask": mask}


def routing_context(batch: dict[str, Tensor], *, seed: int = 0, step: int = 0, micro_batch: int = 0) -> RoutingContext:
    """What routers may look at besides the token. `micro_batch` counts over all processes."""
    return RoutingContext(
        step=step,
        micro_batch=micro_batch,
        seed=seed,
        document=batch["document"].reshape(-1),
        position=batch["position"].reshape(-1),
    )
