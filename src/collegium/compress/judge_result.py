"""`Judgement`: how a model does on held-out text, and how far it is from the model it was made of."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collegium.errors import DataError
from collegium.files import atomic_file
from collegium.measure.estimate import Estimate
from collegium.measure.metric import plain

__all__ = ["Continuation", "DomainScore", "Judgement", "LayerScore"]


@dataclass(frozen=True)
class DomainScore:
    """One domain, or all of them together. Intervals are bootstrapped over documents.

    Attributes:
        domain: its name; "all" for all together.
        documents, tokens: seen, and predicted.
        bytes: of UTF-8 that the predicted tokens stand for; None where the tokenizer leaves that open.
        loss: nats per predicted token.
        whole_loss: of the whole model, the one it is compared with; None without one, as are the following.
        difference: `loss` minus `whole_loss`, resampled in pairs.
        kl: nats per token of KL(whole || this), over the full vocabulary.
        top1: share of the tokens for which both think the same token the likeliest.
    """

    domain: str
    documents: int
    tokens: int
    bytes: int | None
    loss: Estimate
    whole_loss: float | None = None
    difference: Estimate | None = None
    kl: Estimate | None = None
    top1: Estimate | None = None

    @property
    def perplexity(self) -> float:
        return _exp(self.loss.value)

    @property
    def whole_perplexity(self) -> float | None:
        return None if self.whole_loss is None else _exp(self.whole_loss)

    @property
    def bits_per_byte(self) -> float | None:
        return self._bits(self.loss.value)

    @property
    def whole_bits_per_byte(self) -> float | None:
        return None if self.whole_loss is None else self._bits(self.whole_loss)

    def _bits(self, loss: float) -> float | None:
        return loss * self.tokens / math.log(2) / self.bytes if self.bytes else None

    def record(self) -> dict[str, Any]:
        derived = ("perplexity", "bits_per_byte", "whole_perplexity", "whole_bits_per_byte")
        return plain(self) | {name: plain(getattr(self, name)) for name in derived}


@dataclass(frozen=True)
class LayerScore:
    """One MoE layer against the same layer of the whole model, on the same text.

    Both models run from the first layer on: what differs here includes all that differed before. None: not to be known
    (no map between the experts, or outputs of different shape).

    Attributes:
        layer: index of the decoder layer.
        num_experts, whole_experts: E of both.
        present: share of the whole model's choices whose expert is still there, or in one that was merged.
        agreement: share of those that this model chooses, too.
        output_error: mean over tokens of ``||y' - y|| / ||y||`` for the outputs y of the MoE block.
    """

    layer: int
    num_experts: int
    whole_experts: int
    present: Estimate | None
    agreement: Estimate | None
    output_error: Estimate | None


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt, the likeliest token at every step, in both models."""

    domain: str
    prompt: str
    text: str
    whole_text: str | None = None


@dataclass(frozen=True)
class Judgement:
    """Attributes:
    model, whole: names of the model, and of the one it is compared with, if there is one.
    masked: it is the whole model with experts masked.
    data: what it was judged on.
    overall, domains: scores; domains without text are absent.
    layers: every MoE layer that both have, ascending; empty without a second model.
    continuations: one a domain.
    proxies, whole_proxies: see `collegium.compress.judge_proxies`.
    notes: what could not be measured, and why.
    """

    model: str
    whole: str | None
    masked: bool
    data: str
    overall: DomainScore
    domains: tuple[DomainScore, ...]
    layers: tuple[LayerScore, ...] = ()
    continuations: tuple[Continuation, ...] = ()
    proxies: Mapping[str, float] = field(default_factory=dict)
    whole_proxies: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Plain data for JSON: numbers that are not finite as null."""
        return plain(self) | {"overall": self.overall.record(), "domains": [one.record() for one in self.domains]}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `record` as JSON. Raises StorageError if that cannot be done."""
        with atomic_file(path) as partial:
            text = json.dumps(self.record(), indent=1, ensure_ascii=False, allow_nan=False)
            partial.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Judgement:
        """Read what `save` wrote. Raises DataError if it is something else."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(
                **{name: record[name] for name in ("model", "whole", "masked", "data")},
                overall=_domain(record["overall"]),
                domains=tuple(_domain(one) for one in record["domains"]),
                layers=tuple(_layer(one) for one in record["layers"]),
                continuations=tuple(Continuation(**one) for one in record["continuations"]),
                proxies={name: _number(value) for name, value in record["proxies"].items()},
                whole_proxies={name: _number(value) for name, value in record["whole_proxies"].items()},
                notes=tuple(record["notes"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no judgement of a model: {error!r}; remove it to judge again") from error


def _domain(record: Mapping[str, Any]) -> DomainScore:
    counts = {name: record[name] for name in ("domain", "documents", "tokens", "bytes", "whole_loss")}
    loss = _estimate(record["loss"])
    if loss is None:
        raise ValueError("a domain without a loss")
    difference, kl, top1 = (_estimate(record[name]) for name in ("difference", "kl", "top1"))
    return DomainScore(**counts, loss=loss, difference=difference, kl=kl, top1=top1)


def _layer(record: Mapping[str, Any]) -> LayerScore:
    counts = {name: record[name] for name in ("layer", "num_experts", "whole_experts")}
    present, agreement, error = (_estimate(record[name]) for name in ("present", "agreement", "output_error"))
    return LayerScore(**counts, present=present, agreement=agreement, output_error=error)


def _estimate(record: Mapping[str, Any] | None) -> Estimate | None:
    return None if record is None else Estimate(*(_number(record[end]) for end in ("value", "low", "high")))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
