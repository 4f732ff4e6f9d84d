"""Choosing the next token of one request, with transformers' logits processors and a generator of its own.

Legend: V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from collegium.decode.request import Request, TokenLogprob
from collegium.errors import NonFiniteError

__all__ = ["Sampler", "Sampling", "end_tokens"]


@dataclass(frozen=True)
class Sampling:
    """What a request leaves open, from the generation config of the model; temperature 0 where it does not sample."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float

    @classmethod
    def of(cls, generation_config: Any, request: Request) -> Sampling:
        """The settings of `request`; of `generation_config` where it says nothing; neutral where neither does."""

        def first(name: str, neutral: Any) -> Any:
            for value in (getattr(request, name), getattr(generation_config, name, None)):
                if value is not None:
                    return value
            return neutral

        samples = bool(getattr(generation_config, "do_sample", False))
        temperature = request.temperature
        if temperature is None:
            temperature = first("temperature", 1.0) if samples else 0.0
        return cls(temperature, first("top_p", 1.0), first("top_k", 0), first("repetition_penalty", 1.0))


class Sampler:
    """The next token of one request, and its log-probability if the request asked.

    Penalties come first, then temperature, then top-k, then top-p, as in transformers' ``generate``. Draws use a
    generator that belongs to the request, so other requests do not change them.
    """

    def __init__(self, sampling: Sampling, request: Request) -> None:
        self._request = request
        self._greedy = sampling.temperature == 0
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
            self._seen = torch.tensor([request.prompt])
        if not self._greedy:
            if sampling.temperature != 1:
                processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k > 0:
                processors.append(TopKLogitsWarper(int(sampling.top_k)))
            if sampling.top_p < 1:
                processors.append(TopPLogitsWarper(float(sampling.top_p)))
        self._processors = processors
        self._generator = torch.Generator()
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed)

    def __call__(self, logits: Tensor) -> tuple[int, TokenLogprob | None]:
        """
        Args:
            logits: ``[V]`` of the model.

        Raises:
            NonFiniteError: they hold NaN or +infinity.
        """
        raw = logits.detach().to("cpu", torch.float32, copy=True)
        if raw.isnan().any() or raw.max() == torch.inf:
            raise NonFiniteError(
                "the logits of the model hold NaN or infinity; its weights or its number format are damaged"
            )
        scores = self._penalised(raw)
        history = self._seen if self._seen is not None else torch.empty(1, 0, dtype=torch.int64)
        scores = self._processors(history, scores[None])[0]
        if self._greedy:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(scores.softmax(0), 1, generator=self._generator))
        self._remember(token)
        return token, self._logprob(raw, token)

    def _penalised(self, raw: Tensor) -> Tensor:
        """``[V]`` without what presence and frequency cost."""
        presence, frequency = self._request.presence_penalty, self._request.frequency_penalty
        if not (presence or frequency):
            return raw
        if self._counts is None:
            self._counts = torch.zeros_like(raw)
        return raw - presence * (self._counts > 0) - frequency * self._counts

    def _remember(self, token: int) -> None:
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen = torch.cat([self._seen, torch.tensor([[token]])], 1)

    def _logprob(self, raw: Tensor, token: int) -> TokenLogprob | None:
        wanted = self._request.logprobs
        if wanted is None:
            return None
        logprobs = raw.log_softmax(0)
        values, ids = logprobs.topk(min(wanted, len(raw)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprob(token, float(logprobs[token]), top)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Token ids that end a text: those of the generation config, or else the tokenizer's."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
