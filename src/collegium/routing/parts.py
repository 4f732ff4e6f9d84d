"""The small parts a router is a chain of: score -> transforms -> selection -> weigh -> capacity.

Legend: T tokens, E experts, K slots per token, d model width.

A part is a frozen dataclass whose fields are its settings. It draws no global random numbers and changes nothing in
place, so that recomputation replays it. Tensors that it learns or keeps are declared by `Part.tensors`, owned by the
router and handed back in `Scores.own`. Three tensors travel apart in `Scores`; a part changes only the one that its
paper changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from collegium.errors import ConfigError
from collegium.routing.record import Routing, RoutingContext

__all__ = ["Capacity", "OwnTensor", "Part", "Score", "Scores", "Selection", "Transform", "Weigh", "check_parts"]


@dataclass(frozen=True, eq=False)
class Scores:
    """What travels along the chain; float32 throughout.

    Attributes:
        logits: ``[T, E]`` router logits, differentiable.
        probs: ``[T, E]`` probabilities for losses, metrics and combine weights, differentiable, non-negative.
        selection: ``[T, E]`` what the selection looks at; no gradient. -inf forbids an expert.
        correction_bias: ``[E]`` the router's ``e_score_correction_bias``, or None if it has none.
        x: ``[T, d]`` what the router was given, where it was given that.
        num_true: experts with ids below it compute something, the others are zero-computation ones; None means all do.
        own: the tensors that the part which is called declared, by name.
        score: logits -> probabilities, for a transform that changes logits.
    """

    logits: Tensor
    probs: Tensor
    selection: Tensor
    correction_bias: Tensor | None = None
    x: Tensor | None = None
    num_true: int | None = None
    own: Mapping[str, Tensor] = field(default_factory=dict)
    score: Callable[[Tensor], Tensor] | None = None

    def with_logits(self, logits: Tensor) -> Scores:
        """These with other logits ``[T, E]``: probabilities and selection scores follow them."""
        assert self.score is not None
        probs = self.score(logits)
        return replace(self, logits=logits, probs=probs, selection=probs.detach())

    def with_probs(self, probs: Tensor) -> Scores:
        """These with other probabilities ``[T, E]``: selection scores follow them."""
        return replace(self, probs=probs, selection=probs.detach())


@dataclass(frozen=True)
class OwnTensor:
    """A tensor that a part declares.

    Attributes:
        shape: of it.
        std: of the normal distribution it is drawn from; 0 is zeros.
        learnt: a parameter in the router's dtype, or a float32 buffer.
        identity: it begins as a unit matrix, plus what `std` says.
    """

    shape: tuple[int, ...]
    std: float = 0.02
    learnt: bool = True
    identity: bool = False


@dataclass(frozen=True)
class Part:
    """Base of all parts. What a part needs and allows is declared on its class.

    Attributes:
        causal: a token's routing does not depend on later tokens.
        batch_invariant: a token's routing does not depend on the other tokens of the batch (at inference).
        train_only: has no meaning at inference.
        needs_attention, needs_documents, needs_previous_layer: which part of `RoutingContext` it cannot do without.
        uses_position: at inference it looks at ``RoutingContext.position`` where there is one.
        remembers: it keeps something of the past in ``RoutingContext.memory`` when a model decodes with a cache.
        needs_correction_bias: the router must own an ``e_score_correction_bias``.
        symmetric: experts that change places take their tokens with them. False where an expert's id means something.
        draws: it makes random choices in training, with the context's key.
        learns: the task loss reaches the router through it. False where its weights carry no gradient.
    """

    causal: ClassVar[bool] = True
    batch_invariant: ClassVar[bool] = True
    train_only: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False
    needs_documents: ClassVar[bool] = False
    needs_previous_layer: ClassVar[bool] = False
    uses_position: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    needs_correction_bias: ClassVar[bool] = False
    symmetric: ClassVar[bool] = True
    draws: ClassVar[bool] = False
    learns: ClassVar[bool] = True

    def tensors(self, hidden_size: int, num_experts: int, top_k: int) -> dict[str, OwnTensor]:
        """The tensors that the router is to own for this part, by name."""
        return {}

    def check(self, num_experts: int, top_k: int, parts: tuple[Part, ...]) -> None:
        """Refuse settings that cannot work for this many experts and slots, or beside these other parts.

        Raises:
            ConfigError: the settings and the numbers that do not fit.
        """

    def check_context(self, context: RoutingContext) -> None:
        """Refuse a context that lacks what this part declared it needs.

        Raises:
            ConfigError: names the part and the field of `RoutingContext`.
        """
        needs = (
            ("mix", self.needs_attention, "install the layer in a model, whose attention gives it"),
            ("document", self.needs_documents, "call the model inside collegium.layer.use_context, with document ids"),
            ("previous", self.needs_previous_layer, "call collegium.layer.link_layers on the model"),
        )
        for name, needed, hint in needs:
            if needed and getattr(context, name) is None:
                raise ConfigError(
                    f"{type(self).__name__} needs RoutingContext.{name}, which is None in layer {context.layer}; {hint}"
                )


class Score(Part, ABC):
    """Logits -> probabilities."""

    @abstractmethod
    def __call__(self, logits: Tensor) -> Tensor:
        """``[T, E]`` float32 logits -> ``[T, E]`` non-negative probabilities, differentiable."""


class Transform(Part, ABC):
    """Changes one or more of logits, probabilities and selection scores.

    Attributes:
        touches: the first of them that it changes. Those that change logits come before those that change
            probabilities, and these before those that change selection scores only: each makes what follows anew.
    """

    touches: ClassVar[Literal["logits", "probs", "selection"]] = "selection"

    @abstractmethod
    def __call__(self, scores: Scores, context: RoutingContext) -> Scores:
        """A new `Scores`, made with ``dataclasses.replace``."""


class Selection(Part, ABC):
    """Selection scores -> the experts of each token.

    Attributes:
        fixed: every token gets exactly `top_k` experts. Otherwise the index may hold the sentinel E for unused slots
            and may be of any width.
    """

    fixed: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, scores: Scores, top_k: int, context: RoutingContext) -> Tensor:
        """``[T, K]`` int64 expert ids, none twice for a token, first choice first. Called without gradient."""

    def check(self, num_experts: int, top_k: int, parts: tuple[Part, ...]) -> None:
        if not 1 <= top_k <= num_experts:
            raise ConfigError(
                f"top_k is {top_k} but the layer has {num_experts} experts; it must be 1 to {num_experts}"
            )


class Weigh(Part, ABC):
    """The combine weight of each chosen expert."""

    @abstractmethod
    def __call__(self, scores: Scores, index: Tensor, context: RoutingContext) -> Tensor:
        """``[T, K]`` expert ids -> ``[T, K]`` float32 weights, differentiable with respect to the logits.

        For a selection that is not `fixed`, `scores` has one more column, that of the sentinel: probability 0,
        logit -inf.
        """


class Capacity(Part, ABC):
    """Which assignments an expert has room for."""

    @abstractmethod
    def __call__(self, routing: Routing, context: RoutingContext) -> Tensor | None:
        """``[A]`` bool of each assignment, False for those that are dropped; None keeps all. Called without gradient,
        on a routing with `probs`."""


def check_parts(parts: Iterable[Part], *, inference: bool = False, causal_decoding: bool = False) -> None:
    """Refuse parts that cannot serve the purpose a router is about to be used for.

    Args:
        parts: for example ``router.parts``.
        inference: the router will run outside training.
        causal_decoding: the model generates left to right, one token at a time.

    Raises:
        ConfigError: names every part in the way and says why.
    """
    wrong = []
    for part in parts:
        name = type(part).__name__
        if inference and part.train_only:
            wrong.append(f"{name} acts in training only and has no meaning at inference")
        # what a prompt has decided, and is remembered, needs no later tokens any more
        if causal_decoding and not part.causal and not part.remembers:
            wrong.append(f"{name} lets a token's routing depend on later tokens, which causal decoding has not seen")
    if wrong:
        raise ConfigError("; ".join(dict.fromkeys(wrong)) + "; configure the router without")
