"""The way back of a streamed calibration: the loss's gradient through one decoder layer after the other, last to first.

The forward has left the hidden states that go into every layer on disk. The gradient starts at the logits; then each
layer is loaded once more, computed again with autograd on, and fed the gradient of what comes out of it. In memory are
one layer, one batch's activations in it, and what the experts' rows of the batch take: about
``2 * (u + f + 2d)`` numbers for each (token, expert).

Legend: B sequences, S positions of a batch, T = B * S tokens, A assignments, d model width, f expert width, u = 2f for
gated experts, f for others, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from collegium.compress.gradients import GradientBatch, Gradients
from collegium.compress.stream_forward import Forward, Part, no_gradients
from collegium.compress.stream_store import PartialRun
from collegium.errors import ModelError
from collegium.layerwise import LayerwiseModel
from collegium.measure.collect import Collector, SiteCollection, weights_of
from collegium.routing import Routing
from collegium.sites import Site, sites
from collegium.sites.adapters.seam import Seam

__all__ = ["Backward", "check_gradients"]

LOGITS_BYTES = 64 << 20
"""Float32 logits held at a time; a softmax and its gradient take as much again, each."""


def check_gradients(streamed: LayerwiseModel) -> None:
    """Refuse a family that gradients cannot be taken of. Raises UnsupportedFamilyError."""
    if streamed.model.get_output_embeddings() is None:
        raise no_gradients(streamed, "it has no output embeddings")
    if "logits_to_keep" not in inspect.signature(streamed.model.forward).parameters:
        raise no_gradients(streamed, "it gives the logits of all positions or none (no logits_to_keep)")
    for site in sites(streamed.model):
        if not isinstance(site.adapter, Seam) or weights_of(site).num_experts != site.num_experts:
            raise no_gradients(streamed, f"the experts of {site.path} are not behind transformers' common seam")


@dataclass(frozen=True, eq=False)
class _Seen:
    """What the experts of a block computed, attached to the graph, a row an assignment, sorted by expert."""

    routing: Routing
    tokens: Tensor
    up: Tensor
    hidden: Tensor
    down: Tensor


class _Product(torch.autograd.Function):
    """``[A, n]``: each expert's rows ``[A, m]`` times its matrix of ``[E, m, n]``, in the dtype of the rows.

    Autograd's own product would keep a copy of each matrix in that dtype.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor, sizes: list[int]) -> Tensor:
        ctx.matrices, ctx.sizes = matrices, sizes
        parts = enumerate(rows.split(sizes))
        return torch.cat([part @ matrices[e].to(part.dtype) for e, part in parts if len(part) or not len(rows)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Product.apply(grad, ctx.matrices.transpose(1, 2), ctx.sizes), None, None


class _Tape:
    """Stands in for the experts' forward of one block: computes the same, readably, and keeps what autograd is asked
    about."""

    def __init__(self, site: Site) -> None:
        self.site, self.weights = site, weights_of(site)
        self._seen: _Seen | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the context the block's experts run here."""
        experts: Any = self.site.experts
        experts.forward = self.forward
        try:
            yield
        finally:
            del experts.forward  # the class has its own

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `collegium.sites.seam.experts_forward`, in float32 at least."""
        if self._seen is not None:
            raise ModelError(f"{self.site.path} ran twice in one forward")
        tokens, routing = self.site.adapter.read(self.site, (hidden_states, top_k_index, top_k_weights), None, None)
        dispatch, weights = routing.dispatch(), self.weights
        exact = torch.promote_types(tokens.dtype, torch.float32)
        expert = routing.expert[dispatch.order]
        sizes = dispatch.counts.tolist()
        up = _Product.apply(tokens[dispatch.token].to(exact), weights.up_t, sizes)
        if weights.up_bias is not None:
            up = up + weights.up_bias[expert]
        hidden = weights.activation(up)
        down = _Product.apply(hidden, weights.down_t, sizes)
        if weights.down_bias is not None:
            down = down + weights.down_bias[expert]
        y = down if weights.post_norm is None else weights.post_norm(down)
        y = (y * routing.weight[dispatch.order, None]).to(exact)
        self._seen = _Seen(routing, tokens, up, hidden, down)
        return torch.zeros_like(tokens, dtype=exact).index_add(0, dispatch.token, y).to(hidden_states.dtype)

    def take(self) -> _Seen:
        """What the forward that just ran saw."""
        seen, self._seen = self._seen, None
        if seen is None:
            raise ModelError(f"{self.site.path} did not run; gradients need every MoE block in every forward")
        return seen


class Backward:
    """One pass of the loss's gradient, from where the store is at to the first layer with experts.

    Args:
        collectors: those that need gradients.
        report: called with how many steps are done and the share of the present one.
    """

    def __init__(
        self,
        streamed: LayerwiseModel,
        forward: Forward,
        store: PartialRun,
        parts: Sequence[Part],
        collectors: Sequence[Collector],
        num_domains: int,
        report: Callable[[int, float], None],
    ) -> None:
        self.streamed, self.forward, self.store, self.parts = streamed, forward, store, parts
        self.collectors, self.num_domains, self.report = collectors, num_domains, report
        self.sites = {site.layer: site for site in sites(streamed.model)}
        self.first, self.top = min(self.sites), len(streamed.layers)
        self.shapes = [(*part.shape, forward.width) for part in parts]

    @property
    def steps(self) -> int:
        """The logits, and every layer down to the first with experts."""
        return 1 + self.top - self.first

    def run(self) -> None:
        at = self.store.reached
        with self.forward.installed(), torch.no_grad():
            if at is None:
                at = self.top
                self._head()
            for number in range(at - 1, self.first - 1, -1):
                self._layer(number)

    def _head(self) -> None:
        self.report(0, 0.0)
        with self.streamed.head_loaded(), self.store.write_gradient(self.top) as write:
            hidden = self.store.read_hidden(self.top, self.shapes, self.streamed.dtype)
            for count, (part, x) in enumerate(zip(self.parts, hidden, strict=True), 1):
                write(self._of_loss(part, x))
                self.report(0, count / len(self.parts))
        self.store.finish_head()

    def _of_loss(self, part: Part, hidden: Tensor) -> Tensor:
        """``[B, S, d]`` gradient of the batch's summed nats with respect to what comes out of the last layer.

        A token is predicted from the one before it in its sequence, if both count.
        """
        B, S = part.shape
        valid = part.columns["valid"].view(B, S)
        predicted, target = valid[:, :-1] & valid[:, 1:], part.inputs["input_ids"][:, 1:]
        gradient = torch.zeros_like(hidden)
        hidden.requires_grad_()
        size = max(1, LOGITS_BYTES // (4 * B * self.streamed.vocabulary))
        for positions in torch.arange(S - 1).split(size):
            live = predicted[:, positions]
            if not bool(live.any()):
                continue
            with torch.enable_grad():
                logits = self.forward.logits(hidden, part, positions)
                nats = F.cross_entropy(logits[live].float(), target[:, positions][live], reduction="sum")
            gradient += torch.autograd.grad(nats, hidden)[0]
        return gradient

    def _layer(self, number: int) -> None:
        site, step = self.sites.get(number), self.top - number
        self.report(step, 0.0)
        with self.streamed.layer_loaded(number):
            collection = None if site is None else SiteCollection(site, self.collectors, self.num_domains)
            tape = None if site is None else _Tape(site)
            hidden = self.store.read_hidden(number, self.shapes, self.streamed.dtype)
            incoming = self.store.read_gradient(number + 1, self.shapes, self.streamed.dtype)
            target = nullcontext(_drop) if number == self.first else self.store.write_gradient(number)
            # the gradient appears at the end of the block: it says that the layer is done
            with tape.installed() if tape else nullcontext(), target as write:
                for count, (part, x, gradient) in enumerate(zip(self.parts, hidden, incoming, strict=True), 1):
                    write(self._through(number, part, x, gradient, tape, collection))
                    self.report(step, count / len(self.parts))
                if collection is not None:
                    self.store.write_backward(number, collection.finish())
            self.store.finish_backward(number)

    def _through(
        self,
        number: int,
        part: Part,
        hidden: Tensor,
        gradient: Tensor,
        tape: _Tape | None,
        collection: SiteCollection | None,
    ) -> Tensor:
        """``[B, S, d]`` gradient of what goes into the layer; what the experts did goes to the collectors."""
        hidden.requires_grad_()
        with torch.enable_grad():
            output = self.forward.layer(number, hidden, part)
        if tape is None or collection is None:
            return torch.autograd.grad(output, hidden, gradient)[0]
        seen = tape.take()
        if seen.routing.num_tokens != len(part.columns["valid"]):
            raise ModelError(
                f"{tape.site.path} routed {seen.routing.num_tokens} tokens of a batch of {len(part.columns['valid'])}"
            )
        below, up, h, down = torch.autograd.grad(output, (hidden, seen.up, seen.hidden, seen.down), gradient)
        found = Gradients(up, seen.hidden.detach(), h, down)
        collection.update(GradientBatch(tape.site, seen.tokens, seen.routing, found, **part.columns))
        return below


def _drop(gradient: Tensor) -> None:
    """What goes below the first layer with experts is not needed."""
