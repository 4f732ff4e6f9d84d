"""What tests of decoding share: the demo model, and what transformers' own generate says."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoTokenizer

import collegium
from collegium.assets import SHIPPED


class Bytes:
    """A tokenizer of 256 bytes, for tiny models."""

    all_special_ids = (0,)
    eos_token_id = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(token % 256 for token in ids).decode("utf-8", "replace")


@cache
def demo() -> tuple[Any, Any]:
    """The demo model in float32, and its tokenizer."""
    model = collegium.load(SHIPPED["demo"], dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(SHIPPED["demo"])


def alone(model: Any, prompt: tuple[int, ...], count: int) -> list[int]:
    """The likeliest tokens after `prompt`, by running the whole text again for every token, without a cache."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()
