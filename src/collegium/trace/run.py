"""One recording: the writer, the tap, and what the model is fed.

Legend: B sequences, S tokens of a sequence, T = B * S, N rows that are stored, d model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from collegium._version import __version__
from collegium.errors import ConfigError, ModelError, TraceError, UnsupportedFamilyError
from collegium.rng import generator
from collegium.routing import Routing
from collegium.sites import Order, Site, sites, tap
from collegium.trace.reader import Trace
from collegium.trace.rows import in_sequence, layer_rows, spread
from collegium.trace.schema import META, LayerMeta, TraceMeta, column_names
from collegium.trace.store import TraceWriter, remove_trace

__all__ = ["Batch", "Progress", "Run", "batch_ids", "batch_inputs", "check_target"]

Array = np.ndarray[Any, np.dtype[Any]]
Batch = Mapping[str, Any]
"""``input_ids`` and what `collegium.trace.recorder.record` says of it."""
Progress = Callable[[int], None]


class Run:
    """What one recording shares: the writer, the tap, and the numbering of steps and sequences."""

    order = Order.OBSERVE

    def __init__(
        self,
        model: nn.Module,
        out: Path,
        logits: bool,
        gate_inputs: float,
        dropped: bool,
        progress: Progress | None,
        describe: Mapping[str, Any],
        part_seconds: float | None = None,
    ) -> None:
        if not 0 <= gate_inputs <= 1:
            raise ConfigError(f"gate_inputs is a share of the tokens, between 0 and 1, not {gate_inputs}")
        self.model, self.out, self.progress, self.part_seconds = model, out, progress, part_seconds
        self.logits, self.gate_inputs, self.dropped = logits, gate_inputs, dropped
        self.view = "gate" if gate_inputs else "experts"
        self.meta = _meta(model, logits, gate_inputs > 0, dropped, **describe)
        self.device = next(model.parameters()).device
        self.writer: TraceWriter
        self.step = self.seen = self.sequences = 0
        self._routing: dict[int, list[Routing]] = {}
        self._inputs: dict[int, Tensor] = {}
        self._chosen: Tensor | None = None
        self._sampled: Array | None = None

    @contextlib.contextmanager
    def open(self, *, resume: bool, overwrite: bool) -> Iterator[Trace | None]:
        """Open the folder, tap the model, and set it to eval mode; all of it undone at the end."""
        there = check_target(self.out, resume=resume, overwrite=overwrite)
        stored = Trace.open(self.out) if there and resume else None
        if there and overwrite:
            remove_trace(self.out)
        training = self.model.training
        self.model.eval()
        try:
            with (
                TraceWriter(self.out, self.meta, resume=stored, part_seconds=self.part_seconds) as self.writer,
                tap(self.model, self, logits=self.logits, iterated=True),
                torch.no_grad(),
            ):
                yield stored
        finally:
            self.model.train(training)

    def expect(self, chosen: Array) -> None:
        """Say which rows ``[N]`` of the next forward's T are stored."""
        self._routing.clear()
        self._inputs.clear()
        self._chosen = torch.from_numpy(chosen).to(self.device)
        if self.gate_inputs:
            draw = torch.rand(len(chosen), generator=generator(self.step, "gate inputs"))
            self._sampled = (draw < self.gate_inputs).numpy()

    def __call__(self, site: Site, x: Tensor, routing: Routing) -> None:
        if self._chosen is None:
            return
        routings = self._routing.setdefault(site.layer, [])
        if len(routings) == site.iterations:
            raise ModelError(f"{site.path} ran twice in one forward; a trace has one entry a token and layer")
        routings.append(routing)
        if self._sampled is not None:
            rows = self._chosen.to(x.device)[torch.from_numpy(self._sampled).to(x.device)]
            self._inputs[site.layer] = x[rows].float()

    def write(self, tokens: Mapping[str, Array], num_tokens: int, phase: str) -> None:
        """Store the rows of the forward that just ran."""
        chosen, self._chosen = self._chosen, None
        assert chosen is not None
        layers = []
        for entry in self.meta.layers:
            routings = self._routing.pop(entry.layer, [])
            if len(routings) != entry.iterations:
                raise ModelError(f"{entry.path} did not run; a trace needs every MoE layer in every forward")
            routing = in_sequence(routings)
            if routing.num_tokens != num_tokens or routing.num_experts != entry.num_experts:
                raise ModelError(
                    f"{entry.path} routed {routing.num_tokens} tokens over {routing.num_experts} experts; the batch "
                    f"has {num_tokens} tokens and the layer {entry.num_experts} experts"
                )
            gate_input = self._inputs.pop(entry.layer, None)
            layers.append(layer_rows(entry, routing, chosen, gate_input, self.logits, self.dropped))
        self.writer.add(tokens, layers, phase=phase, step=self.step, sampled=self._sampled)

    def describe_tokens(self, batch: Batch, ids: Tensor, mask: Tensor) -> dict[str, Array]:
        """``[T]`` columns of a batch: token, position, sequence, document, domain."""
        B, S = ids.shape
        fallback = torch.arange(self.sequences, self.sequences + B)
        self.sequences += B
        sequence = spread(batch.get("sequence", fallback), B, S)
        place = mask.cumsum(1).sub(1).clamp(min=0)
        domain = spread(batch.get("domain", torch.zeros(B, dtype=torch.long)), B, S)
        if domain.size and not 0 <= domain.min() <= domain.max() < len(self.meta.domains):
            raise ConfigError(f"domain {domain.max()} is no index into the domains {list(self.meta.domains)}")
        return {
            "token": ids.reshape(-1).cpu().numpy(),
            "position": spread(batch.get("position", place), B, S),
            "sequence": sequence,
            "document": spread(batch["document"], B, S) if "document" in batch else sequence,
            "domain": domain,
        }


def _meta(
    model: Any,
    logits: bool,
    gate_inputs: bool,
    dropped: bool,
    *,
    name: str | None,
    fingerprint: str | None,
    tokenizer: str | None,
    data: str,
    domains: Sequence[str],
) -> TraceMeta:
    found = sites(model, iterated=True)
    layers = [site.layer for site in found]
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or len(set(layers)) != len(layers):
        raise UnsupportedFamilyError(
            f"a trace has one stream of tokens and one MoE block a layer; {type(model).__name__} (family "
            f"{found[0].family!r}) has several: {', '.join(site.path for site in found[:4])}"
        )
    several = [site for site in found if site.iterations > 1]
    if several and (logits or gate_inputs):
        raise UnsupportedFamilyError(
            f"the MoE block {several[0].path!r} routes {several[0].iterations} times in a forward, and a trace holds "
            "router logits and gate inputs of one routing only; record without them"
        )
    entries = [
        LayerMeta(
            layer=site.layer,
            path=site.path,
            num_experts=site.num_experts,
            top_k=site.top_k * site.iterations,
            score=site.score,
            iterations=site.iterations,
        )
        for site in sorted(found, key=lambda site: site.layer)
    ]
    if not domains or len(set(domains)) != len(domains):
        raise ConfigError(f"domains must be names without repeats, at least one, not {list(domains)}")
    return TraceMeta(
        model=name or getattr(model, "name_or_path", "") or type(model).__name__,
        fingerprint=fingerprint,
        family=found[0].family,
        layers=tuple(entries),
        tokenizer=tokenizer,
        data=data,
        domains=tuple(domains),
        columns=column_names(sorted(layers), logits=logits, gate_inputs=gate_inputs, dropped=dropped),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        collegium=__version__,
    )


def check_target(out: Path, *, resume: bool, overwrite: bool) -> bool:
    """Whether `out` holds a trace, after making sure that a recording may go there. Touches nothing.

    Raises:
        TraceError: there is a trace and it is neither to be resumed nor overwritten.
        ConfigError: it is to be both, or `out` is a file.
    """
    if resume and overwrite:
        raise ConfigError("resume and overwrite exclude each other")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; a trace is a folder")
    there = (out / META).exists()
    if there and not (resume or overwrite):
        raise TraceError(
            f"{out} holds a trace already; resume it (--resume), replace it (--overwrite), or choose another"
        )
    return there


def batch_ids(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(input_ids [B, S], mask [B, S] bool)`` on `device`."""
    ids = torch.as_tensor(batch["input_ids"]).to(device)
    mask = batch.get("attention_mask")
    if ids.dim() != 2 or (mask is not None and torch.as_tensor(mask).shape != ids.shape):
        raise ConfigError(f"input_ids must be [B, S] and attention_mask alike; input_ids are {list(ids.shape)}")
    return ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.as_tensor(mask).to(device).bool()


def batch_inputs(ids: Tensor, mask: Tensor, batch: Batch, accepts: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is called with; `accepts` are the parameters of its forward."""
    inputs: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in batch:
        inputs["attention_mask"] = mask.long()
    if "position" in batch and "position_ids" in accepts:
        inputs["position_ids"] = torch.as_tensor(batch["position"]).to(ids.device)
    # neither a cache nor the logits of every token over the vocabulary are needed
    inputs |= {key: value for key, value in (("use_cache", False), ("logits_to_keep", 1)) if key in accepts}
    return inputs
