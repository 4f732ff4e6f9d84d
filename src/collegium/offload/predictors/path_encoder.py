"""The network of `routing_path`: token ids -> the chance of every expert of every layer, and its training.

Legend: T tokens, N tokens trained on, B windows of W tokens, V known ids, d width, A experts of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from collegium.offload.geometry import Array
from collegium.offload.predictors.rows import Rows
from collegium.offload.predictors.tables import shares
from collegium.rng import generator, seed_of

__all__ = ["PathEncoder", "train_encoder"]

_BATCH = 32  # windows of a training step
_UNKNOWN = 0.03  # tokens whose id is hidden in training, so that an id never met means something
_RARE = 1e-4  # least share that the heads start from


class PathEncoder(nn.Module):
    """Embeddings, causal attention blocks, and one linear head for all layers side by side.

    Args:
        ids: ``[V]`` ascending int64 ids it knows; all others are read as one unknown id.
        experts: E of each layer.
        width: d, a multiple of 4.
        blocks: attention blocks.
        window: W, most tokens it sees.
        seed: of the weights.
    """

    ids: Tensor

    def __init__(self, ids: Array, experts: Sequence[int], width: int, blocks: int, window: int, seed: int) -> None:
        super().__init__()
        self.window, self.experts = window, tuple(experts)
        self.register_buffer("ids", torch.from_numpy(np.asarray(ids, np.int64)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "routing path"))
            self.embed = nn.Embedding(len(ids) + 1, width)
            self.position = nn.Embedding(window, width)
            block = [
                nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
                for _ in range(blocks)
            ]
            self.blocks = nn.ModuleList(block)
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, sum(experts))

    def codes(self, tokens: Array) -> Tensor:
        """Token ids -> rows of the embedding, 0 for unknown ones."""
        found = torch.from_numpy(np.asarray(tokens, np.int64))
        if not len(self.ids):
            return torch.zeros_like(found)
        place = torch.searchsorted(self.ids, found).clamp(max=len(self.ids) - 1)
        return torch.where(self.ids[place] == found, place + 1, 0)

    def forward(self, codes: Tensor) -> Tensor:
        """``[B, W']`` rows of the embedding -> ``[B, W', A]`` logits; W' is at most W."""
        W = codes.shape[1]
        x = self.embed(codes) + self.position.weight[:W]
        mask = nn.Transformer.generate_square_subsequent_mask(W)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))

    @torch.no_grad()
    def rates(self, before: Array, tokens: Array) -> Array:
        """``[T, A]`` float32 chances for ``tokens [T]`` that follow the tokens `before`.

        What fits into one window is seen as a whole; more is cut into windows that do not see one another.
        """
        T, W = len(tokens), self.window
        if T <= W:
            context = before[len(before) - min(len(before), W - T) :]
            logits = self(self.codes(np.concatenate([context, tokens]))[None])[0, len(context) :]
        else:
            codes = F.pad(self.codes(tokens), (0, -T % W)).view(-1, W)
            logits = self(codes).flatten(0, 1)[:T]
        return logits.sigmoid().numpy()


def train_encoder(encoder: PathEncoder, rows: Rows, *, steps: int, lr: float, seed: int) -> None:
    """Fit an encoder by binary cross-entropy, summed over experts and layers.

    Args:
        rows: with none the encoder stays as it is.
        steps: of 32 windows each.
        lr: peak; warmed up over a twentieth of the steps and let down by a cosine.
        seed: of the batches.
    """
    encoder.eval()  # there is no dropout to switch on
    if not len(rows):
        return
    share = np.concatenate([shares(used, E) for used, E in zip(rows.experts, encoder.experts, strict=True)])
    with torch.no_grad():
        encoder.head.bias.copy_(torch.from_numpy(share).clamp(_RARE, 1 - _RARE).logit())
    codes, chosen = encoder.codes(rows.tokens), _chosen(rows, encoder.experts)
    first, end = _windows(rows, encoder.window)
    draw = generator(seed, "routing path", "batches")
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=lr)
    warm = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * float(np.cos(np.pi * step / steps)))
    )
    for _ in range(steps):
        picked = torch.randint(len(rows), (_BATCH,), generator=draw)
        at = first[picked][:, None] + torch.arange(encoder.window)
        inside = at < end[picked][:, None]
        at = at.clamp(max=len(rows) - 1)
        hidden = torch.rand(at.shape, generator=draw) < _UNKNOWN
        logits = encoder(torch.where(hidden, 0, codes[at]))[inside]
        target = torch.zeros(len(logits), logits.shape[1] + 1).scatter_(1, chosen[at[inside]], 1.0)[:, :-1]
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(logits)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()


def _chosen(rows: Rows, experts: Sequence[int]) -> Tensor:
    """``[N, slots of all layers]`` int64 positions among the A experts; A for unused slots."""
    offsets, A = np.concatenate([[0], np.cumsum(experts)]), sum(experts)
    layers = [
        np.where(used < E, used.astype(np.int64) + offset, A)
        for used, E, offset in zip(rows.experts, experts, offsets, strict=False)
    ]
    return torch.from_numpy(np.concatenate(layers, 1))


def _windows(rows: Rows, W: int) -> tuple[Tensor, Tensor]:
    """``[N]`` where the window of each token begins, and where its run ends: windows reach no further than their run,
    and are full where that is long enough."""
    token = np.arange(len(rows))
    run = np.searchsorted(rows.starts, token, side="right") - 1
    begin, end = rows.starts[run], rows.starts[run + 1]
    return torch.from_numpy(np.maximum(np.minimum(token, end - W), begin)), torch.from_numpy(end)
