"""Small models that run from a disk, and sources that misbehave, for the tests of the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from collegium.errors import CheckpointError
from collegium.offload.store import open_source
from tiny import tiny_model

__all__ = ["Failing", "continued", "logits", "saved"]


def saved(family: str, folder: Path, **overrides: Any) -> tuple[Path, PreTrainedModel]:
    """A tiny model on disk, and in memory with transformers' own loop over experts."""
    model = tiny_model(family, **overrides)
    model.save_pretrained(folder)
    model.set_experts_implementation("eager")
    return folder, model


@torch.inference_mode()
def logits(model: Any, ids: Tensor) -> Tensor:
    """A prompt in one pass, then two tokens one by one: ``[3, V]``."""
    found = [model(input_ids=ids[:, :-2], use_cache=True)]
    for at in (-2, -1):
        step = ids[:, at : at + 1 or None]
        found.append(model(input_ids=step, past_key_values=found[-1].past_key_values, use_cache=True))
    return torch.cat([one.logits[0, -1:] for one in found])


@torch.inference_mode()
def continued(model: Any, ids: Tensor, tokens: int = 12) -> list[int]:
    """Greedy tokens of ``generate``."""
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return output[0, ids.shape[1] :].tolist()


class Failing:
    """A source that fails where `broken` says so."""

    def __init__(self, folder: Path, broken: Callable[[int, int], bool]) -> None:
        self._source = open_source(folder)
        self.broken = broken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, layer: int, expert: int, bits: int, into: Any) -> None:
        if self.broken(layer, expert):
            raise CheckpointError(f"injected: layer {layer} expert {expert}")
        self._source.read(layer, expert, bits, into)
