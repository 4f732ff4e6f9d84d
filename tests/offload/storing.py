"""What the tests of the store share: model folders, records, and the oracle of what is in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from collegium.experts.from_module import expert_weights
from collegium.experts.stored import ExpertLayout
from collegium.layerwise import LayerwiseModel
from collegium.models.checkpoint import open_checkpoint
from collegium.offload.store import ExpertSource, aligned
from collegium.sites import sites
from tiny import tiny_model

WIDE = {"moe_intermediate_size": 32, "intermediate_size": 32}
"""Widths that groups of 32 divide."""


def model_of(
    family: str, root: Path, dtype: torch.dtype = torch.bfloat16, *, fused: bool = False, **overrides: Any
) -> Path:
    """A tiny random model in a folder; `fused` stores experts as they are in memory."""
    folder = root / f"{family}-model"
    tiny_model(family, **overrides).to(dtype).save_pretrained(folder, save_original_format=not fused)
    return folder


def record(source: ExpertSource, layer: int, expert: int, bits: int) -> Tensor:
    """One record, read into a buffer full of other numbers."""
    into = aligned(source.layers[layer].layouts[bits].nbytes)
    into[:] = 0xA5
    source.read(layer, expert, bits, into)
    return torch.from_numpy(into)


def experts(source: ExpertSource) -> Iterator[tuple[int, int]]:
    """(MoE layer, expert) of all experts."""
    return ((layer, e) for layer, one in enumerate(source.layers) for e in range(one.num_experts))


def oracle(folder: Path, dtype: torch.dtype) -> dict[str, list[dict[str, Tensor]]]:
    """Module path -> for each expert, its float32 matrices ``[out, in]`` and biases, as transformers loads them."""
    streamed = LayerwiseModel(open_checkpoint(folder), dtype)
    found = {}
    for number in sorted({site.layer for site in sites(streamed.model)}):
        with streamed.layer_loaded(number):
            for site in sites(streamed.model):
                if site.layer == number:
                    weights: Any = expert_weights(site.experts)
                    found[site.path] = [
                        {"up": weights.up_t[e].T.float().clone(), "down": weights.down_t[e].T.float().clone()}
                        | (
                            {"up_bias": weights.up_bias[e].float(), "down_bias": weights.down_bias[e].float()}
                            if weights.up_bias is not None
                            else {}
                        )
                        for e in range(weights.num_experts)
                    ]
    return found


def written(layout: ExpertLayout, matrices: dict[str, Tensor]) -> Tensor:
    """The record of an expert."""
    made = torch.empty(layout.nbytes, dtype=torch.uint8)
    layout.write(made, **matrices)
    return made
