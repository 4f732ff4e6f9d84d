"""`Router`: score -> transforms -> selection -> weigh -> capacity, as one torch module.

Legend: T tokens, E experts, K slots per token, d model width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from collegium.catalog import get
from collegium.errors import ConfigError
from collegium.named import snake
from collegium.routing.parts import Capacity, OwnTensor, Part, Score, Scores, Selection, Transform, Weigh
from collegium.routing.record import Routing, RoutingContext
from collegium.routing.scores import Softmax
from collegium.routing.selection import TopK
from collegium.routing.transforms import GroupLimit, LogitSelection, SelectionBias
from collegium.routing.weighing import Raw, Renormalised, SoftmaxSelected

__all__ = ["Router", "build_gates", "build_router"]


class Router(nn.Module):
    """Sends each token to `top_k` of `num_experts` experts.

    Logits, probabilities and weights are float32 whatever the dtype of the module and under autocast.
    ``e_score_correction_bias`` stays float32 through ``.half()``, ``.to(torch.bfloat16)`` and the like.

    Attributes:
        weight: ``[E, d]`` parameter.
        bias: ``[E]`` parameter, or None.
        e_score_correction_bias: ``[E]`` float32 buffer, or None where no transform uses one; touches selection only.
        score, transforms, selection, weigh, capacity: the parts, the last of which may be None; `parts` lists them in
            order.
        num_true: experts from this id on are zero-computation ones; None where all compute.
        own: the tensors that parts declared, by the part's name and theirs.
        routed_scaling_factor: multiplies every combine weight.
        float32_logits: multiply ``x`` and ``weight`` in float32. False multiplies in the weight's own dtype, as some
            families do; it makes a difference for half-precision weights only.
        keep_logits: whether the `Routing` holds logits and selection scores; set it where something needs them.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score: Score | None = None,
        transforms: Sequence[Transform] = (),
        selection: Selection | None = None,
        weigh: Weigh | None = None,
        capacity: Capacity | None = None,
        num_true: int | None = None,
        routed_scaling_factor: float = 1.0,
        bias: bool = False,
        float32_logits: bool = True,
    ) -> None:
        """Parts default to softmax, no transforms, top-k, raw weights, no limit.

        Raises:
            ConfigError: a part's settings do not fit `num_experts`, `top_k` or the other parts.
        """
        super().__init__()
        if num_true is not None and not 0 < num_true <= num_experts:
            raise ConfigError(f"{num_true} of {num_experts} experts cannot compute something; it is 1 to all of them")
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.score = score or Softmax()
        self.transforms = tuple(transforms)
        self.selection = selection or TopK()
        self.weigh = weigh or Raw()
        self.capacity = capacity
        self.num_true = num_true
        self.routed_scaling_factor = routed_scaling_factor
        self.float32_logits = float32_logits
        self.keep_logits = False
        for part in self.parts:
            part.check(num_experts, top_k, self.parts)
        _check_order(self.transforms)

        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(num_experts)) if bias else None)
        biased = any(part.needs_correction_bias for part in self.parts)
        self.register_buffer(
            "e_score_correction_bias", torch.empty(num_experts, dtype=torch.float32) if biased else None
        )
        self.own = nn.ModuleDict()
        for part in self.parts:
            if declared := part.tensors(hidden_size, num_experts, top_k):
                name = snake(part)
                if name in self.own:
                    raise ConfigError(f"{name} has tensors of its own, so a router can have it only once")
                self.own[name] = _Own(declared)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal weight of deviation `std`; both biases zero; the parts' own tensors as they declared."""
        nn.init.normal_(self.weight, std=std)
        for one in self.own.values():
            one.reset_parameters()  # type: ignore[operator]
        for zero in (self.bias, self.e_score_correction_bias):
            if zero is not None:
                nn.init.zeros_(zero)

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts, in the order they act."""
        last = () if self.capacity is None else (self.capacity,)
        return (self.score, *self.transforms, self.selection, self.weigh, *last)

    def logits(self, x: Tensor) -> Tensor:
        """``[T, d]`` hidden states -> ``[T, E]`` float32 logits."""
        dtype = torch.float32 if self.float32_logits else self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        device = x.device.type
        mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if mixed else nullcontext():
            return F.linear(x.to(dtype), self.weight.to(dtype), bias).float()

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        """Route ``x [T, d]``.

        Without a context nothing random happens: every random choice needs the context's key to be replayable.

        Returns:
            A `Routing` with `probs`, and with `logits` and `selection` if `keep_logits`.

        Raises:
            ConfigError: `x` is not ``[T, hidden_size]``, or the context lacks what a part needs.
        """
        if x.dim() != 2 or x.shape[1] != self.hidden_size:
            raise ConfigError(f"a router takes x [tokens, {self.hidden_size}], got {tuple(x.shape)}; flatten it first")
        return self.route(self.logits(x), context, x)

    def route(self, logits: Tensor, context: RoutingContext | None = None, x: Tensor | None = None) -> Routing:
        """`forward` from ``logits [T, E]`` that were computed, and kept, elsewhere; `x` for parts that look at it.

        Raises:
            ConfigError: `logits` are not ``[T, num_experts]``, or the context lacks what a part needs.
        """
        if logits.dim() != 2 or logits.shape[1] != self.num_experts:
            raise ConfigError(f"logits must be [tokens, {self.num_experts}], not {tuple(logits.shape)}")
        context = context or RoutingContext()
        for part in self.parts:
            part.check_context(context)

        logits = logits.float()
        probs = self.score(logits)
        scores = Scores(
            logits, probs, probs.detach(), self.e_score_correction_bias, x, num_true=self.num_true, score=self.score
        )
        for transform in self.transforms:
            scores = transform(self._owning(transform, scores), context)
        with torch.no_grad():
            index = self.selection(self._owning(self.selection, scores), self.top_k, context)
        return self._limit(self._record(scores, index, context), context)

    def _owning(self, part: Part, scores: Scores) -> Scores:
        """The scores with the tensors that a part declared."""
        name = snake(part) if self.own else ""
        return replace(scores, own=self.own[name].tensors() if name in self.own else {})  # type: ignore[operator]

    def _limit(self, routing: Routing, context: RoutingContext) -> Routing:
        if self.capacity is None:
            return routing
        with torch.no_grad():
            kept = self.capacity(routing, context)
        return routing if kept is None else replace(routing, kept=kept)

    def _record(self, scores: Scores, index: Tensor, context: RoutingContext) -> Routing:
        """Weigh the chosen experts and write everything down."""
        full = self.selection.fixed
        weighed = self._owning(self.weigh, scores)
        if not full:
            logits = F.pad(scores.logits, (0, 1), value=-torch.inf)
            weighed = replace(weighed, logits=logits, probs=F.pad(scores.probs, (0, 1)))
        return Routing.from_topk(
            index,
            self.weigh(weighed, index, context) * self.routed_scaling_factor,
            self.num_experts,
            full=full,
            logits=scores.logits if self.keep_logits else None,
            probs=scores.probs,
            selection=scores.selection if self.keep_logits else None,
            valid=context.valid,
            num_true=self.num_true,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Let every conversion of the module pass (device moves, meta), but keep the correction bias float32."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if before is not None and after is not None and after.dtype != before.dtype:
            self.e_score_correction_bias = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        settings = [f"hidden_size={self.hidden_size}", f"num_experts={self.num_experts}", f"top_k={self.top_k}"]
        settings += [str(part) for part in self.parts]
        if self.routed_scaling_factor != 1.0:
            settings.append(f"routed_scaling_factor={self.routed_scaling_factor}")
        if self.bias is not None:
            settings.append("bias=True")
        return ", ".join(settings)


class _Own(nn.Module):
    """The tensors of one part."""

    def __init__(self, declared: Mapping[str, OwnTensor]) -> None:
        super().__init__()
        self._declared = dict(declared)
        for name, one in declared.items():
            if one.learnt:
                self.register_parameter(name, nn.Parameter(torch.empty(one.shape)))
            else:
                self.register_buffer(name, torch.empty(one.shape, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for name, one in self._declared.items():
            tensor = getattr(self, name)
            tensor.zero_()
            if one.std:
                tensor.normal_(std=one.std)
            if one.identity:
                tensor += torch.eye(one.shape[-1], device=tensor.device, dtype=tensor.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """All of them in float32, as routers compute."""
        return {name: getattr(self, name).float() for name in self._declared}


_ORDER = ("logits", "probs", "selection")


def _check_order(transforms: Sequence[Transform]) -> None:
    places = [_ORDER.index(one.touches) for one in transforms]
    for one, other, at, following in zip(transforms, transforms[1:], places, places[1:], strict=False):
        if following < at:
            raise ConfigError(
                f"{type(other).__name__} changes {other.touches} and must come before {type(one).__name__}, which "
                f"changes {one.touches}: its change would be undone"
            )


def build_router(
    hidden_size: int,
    num_experts: int,
    top_k: int,
    *,
    score: str = "softmax",
    norm_topk_prob: bool = True,
    softmax_selected: bool = False,
    routed_scaling_factor: float = 1.0,
    n_group: int | None = None,
    topk_group: int | None = None,
    group_score: Literal["max", "top2_sum"] = "top2_sum",
    selection_bias: bool = False,
    bias: bool = False,
    num_true: int | None = None,
) -> Router:
    """A top-k router from plain settings, named as in transformers' configs.

    Args:
        score: a catalogued score, such as "softmax" or "sigmoid".
        norm_topk_prob: divide the K weights by their sum (plus 1e-20, as DeepSeek-V3 does).
        softmax_selected: choose on logits and weigh by a softmax over the chosen logits (gpt-oss, GraniteMoE);
            `norm_topk_prob` has no meaning then.
        routed_scaling_factor: multiplies every weight.
        n_group, topk_group: limit a token to the experts of its `topk_group` best of `n_group` groups; None for no
            limit.
        group_score: how a group is scored, see `GroupLimit`.
        selection_bias: give the router an ``e_score_correction_bias``.
        bias: give the logits a trained bias.
        num_true: how many of the experts compute something; None is all.

    Raises:
        ConfigError: settings that do not fit one another.
    """
    if (n_group is None) != (topk_group is None):
        raise ConfigError(f"n_group is {n_group} and topk_group is {topk_group}; set both or neither")
    transforms: list[Transform] = []
    if softmax_selected:
        transforms.append(LogitSelection())
    if selection_bias:
        transforms.append(SelectionBias())
    if n_group is not None and topk_group is not None and (n_group, topk_group) != (1, 1):
        transforms.append(GroupLimit(n_group, topk_group, group_score))
    weigh: Weigh = Renormalised(epsilon=1e-20) if norm_topk_prob else Raw()
    if softmax_selected:
        weigh = SoftmaxSelected()
    if top_k == 1 and not isinstance(weigh, Raw):
        warnings.warn(
            "with top_k=1 a weight normalised over the chosen experts is always 1, so the task loss gives the router "
            "no gradient; use norm_topk_prob=False",
            stacklevel=2,
        )
    return Router(
        hidden_size,
        num_experts,
        top_k,
        score=get("score", score)(),
        transforms=transforms,
        weigh=weigh,
        routed_scaling_factor=routed_scaling_factor,
        bias=bias,
        num_true=num_true,
    )


def build_gates(
    said: Router | Sequence[Router] | Mapping[str, Any] | None,
    iterations: int,
    hidden_size: int,
    num_experts: int,
    top_k: int,
    *,
    num_true: int | None = None,
) -> list[Router]:
    """The routers of a layer that routes `iterations` times, one for each.

    Args:
        said: the routers themselves, or the settings of `build_router` for all of them.
        iterations: of the layer.
        hidden_size, num_experts, top_k, num_true: of the layer, zero-computation experts included in `num_experts`.

    Raises:
        ConfigError: there are more or fewer routers than iterations, one does not fit the layer, or one has a part that
            acts once a forward (keeps something of the past, averages as the attention does).
    """
    if iterations < 1:
        raise ConfigError(f"iterations is {iterations}; a layer routes at least once")
    if said is None or isinstance(said, Mapping):
        settings = {"num_true": num_true, **(said or {})}
        return [build_router(hidden_size, num_experts, top_k, **settings) for _ in range(iterations)]
    gates = [said] if isinstance(said, Router) else list(said)
    if len(gates) != iterations:
        raise ConfigError(f"iterations is {iterations}, but there are {len(gates)} routers; give one for each")
    for gate in gates:
        if (gate.hidden_size, gate.num_experts, gate.top_k) != (hidden_size, num_experts, top_k):
            raise ConfigError(
                f"the router is for width {gate.hidden_size} and {gate.top_k} of {gate.num_experts} experts, "
                f"the layer for width {hidden_size} and {top_k} of {num_experts}"
            )
        once = [snake(part) for part in gate.parts if part.remembers or part.needs_attention]
        if once and iterations > 1:
            raise ConfigError(f"{once[0]} acts once a forward, but the layer routes {iterations} times")
    return gates
