"""`judge`: a model on held-out text, by itself or against the model it was made of.

    judge(small, tokenizer, corpus, against=whole, maps=expert_maps("small", "whole"))
    judge(whole, tokenizer, corpus, against=whole, plan=plan)       # what a plan would leave, before it is applied

Both models read the same batches, in turn, and are both in memory.

Legend: B sequences, S positions, T = B * S, N predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from collegium.compress.judge_maps import Maps, maps_of, new_ids
from collegium.compress.judge_proxies import proxy_metrics
from collegium.compress.judge_result import Continuation, Judgement
from collegium.compress.judge_sides import Seen, Side
from collegium.compress.judge_sums import LayerSums, TokenSums
from collegium.compress.plan import Plan
from collegium.data import Corpus, document_batches
from collegium.data.document import Split
from collegium.data.tokenize import token_bytes
from collegium.errors import ConfigError, DataError, NonFiniteError
from collegium.trace.run import batch_ids

__all__ = ["NEW_TOKENS", "PROMPT_TOKENS", "judge"]

PROMPT_TOKENS = NEW_TOKENS = 32
_CHUNK_BYTES = 64 << 20
"""Logits of one model that are held at a time."""


def judge(
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    *,
    against: Any = None,
    plan: Plan | None = None,
    maps: Maps | None = None,
    split: Split | None = "test",
    tokens: int | None = None,
    sequence_length: int = 512,
    batch_size: int = 4,
    new_tokens: int = NEW_TOKENS,
    name: str = "model",
    whole_name: str = "whole model",
    progress: Callable[[int], None] | None = None,
) -> Judgement:
    """Score `model` on a corpus, and compare it with `against` token by token.

    Bits per byte are as in `collegium.train.evaluate`: the first token of a sequence is not predicted, and neither its
    nats nor its bytes count. Documents are not joined: each is a sequence, a long one several.

    Args:
        model: a causal language model; dense ones have no layers to look at.
        tokenizer: of both models.
        against: the whole model; it may be `model` itself.
        plan: applied to `model` as a mask while it is judged.
        maps: layer -> for each expert of the whole model its number in `model`, -1 where it is gone. Without it the
            plan tells, or numbers are taken to be the same where both have as many experts.
        split: documents of one split, or all.
        tokens: about how many tokens, the domains sharing equally; None means all.
        sequence_length: tokens in a sequence at most.
        batch_size: sequences in a forward.
        new_tokens: of the continuation of each domain's first `PROMPT_TOKENS`; 0 generates nothing.
        name, whole_name: of the two models, for the record.
        progress: called with the tokens of each batch.

    Raises:
        DataError: there is nothing to predict.
        ConfigError: the tokenizer does not fit, or the models have different vocabularies.
        NonFiniteError: a model predicts NaN.
        NotMoEError, PlanError, UnsupportedFamilyError: the plan cannot be a mask on this model.
    """
    side = Side(model, plan)
    whole = None if against is None else Side(against)
    maps = maps_of(plan) if maps is None and plan is not None else maps
    run = _Run(side, whole, maps, corpus.domains, tokenizer)
    batches = document_batches(
        corpus, tokenizer, split, sequence_length=sequence_length, batch_size=batch_size, max_tokens=tokens
    )
    states = [(one.model, one.model.training) for one in (side, whole) if one is not None]
    try:
        for one, _ in states:
            one.eval()
        with torch.no_grad():
            for batch in batches:
                run.add(batch)
                if progress is not None:
                    progress(int(batch["input_ids"].numel()))
            if not run.parts:
                where = "the corpus" if split is None else f"the {split} split of the corpus"
                raise DataError(f"{where} {corpus.name} has no text to judge a model on; take another split")
            continuations = run.continuations(tokenizer, new_tokens) if new_tokens else ()
    finally:
        for one, training in states:
            one.train(training)
    overall, *domains = run.tokens.scores()
    return Judgement(
        model=name,
        whole=None if whole is None else whole_name,
        masked=plan is not None,
        data=f"{corpus.name} ({corpus.fingerprint()}), split {split or 'all'}, sequences of {sequence_length}",
        overall=overall,
        domains=tuple(domains),
        layers=tuple(sums.score() for sums in run.layers.values()),
        continuations=continuations,
        proxies=run.proxies(0),
        whole_proxies=run.proxies(1) if whole is not None else {},
        notes=tuple(run.notes),
    )


class _Run:
    """What one judgement gathers."""

    def __init__(
        self, side: Side, whole: Side | None, maps: Maps | None, domains: Sequence[str], tokenizer: Any
    ) -> None:
        self.side, self.whole, self.domains = side, whole, tuple(domains)
        self.sides = [side] if whole is None else [side, whole]
        if whole is not None and whole.vocabulary != side.vocabulary:
            raise ConfigError(
                f"the models have {side.vocabulary} and {whole.vocabulary} tokens, so their predictions cannot be "
                "compared; judge each by itself"
            )
        self.notes = [f"{which}: {note}" for which, one in zip(("model", "whole model"), self.sides, strict=False)
                      for note in one.notes]  # fmt: skip
        self.bytes_V = self._token_bytes(tokenizer)
        self.layers = _layer_sums(side, whole, maps, self.notes)
        self.tokens = TokenSums(self.domains, self.bytes_V is not None, whole is not None)
        self.prompts: dict[int, Tensor] = {}
        self.parts: list[Tensor] = []
        """Of each batch ``[N, 1 + 3 * models]``: position, and loss, entropy and rank in each model."""
        self.nbytes = 0

    def _token_bytes(self, tokenizer: Any) -> Tensor | None:
        try:
            found = torch.from_numpy(token_bytes(tokenizer))
        except DataError as error:
            self.notes.append(f"no bits per byte: {error}")
            return None
        return F.pad(found, (0, max(0, self.side.vocabulary - len(found))))

    def add(self, batch: Mapping[str, Tensor]) -> None:
        """Run both models on a batch of `document_batches`."""
        ids, mask = batch_ids(batch, self.side.device)
        if int(ids.max()) >= self.side.vocabulary:
            raise ConfigError(
                f"the tokenizer gives token {int(ids.max())}, the model has {self.side.vocabulary}: they do not "
                "belong together"
            )
        inputs = {"input_ids": ids} | ({"attention_mask": mask.long()} if "attention_mask" in batch else {})
        seen = [one.run({key: value.to(one.device) for key, value in inputs.items()}) for one in self.sides]
        B, S = ids.shape
        for row, code in enumerate(batch["domain"].tolist()):
            self.prompts.setdefault(code, ids[row][mask[row]][:PROMPT_TOKENS])
        document = batch["document"][:, None].expand(B, S).to(ids.device)
        counted = mask[:, 1:]
        if bool(counted.any()):
            domain = batch["domain"][:, None].expand(B, S - 1).to(ids.device)[counted]
            position = torch.arange(1, S, device=ids.device).expand(B, S - 1)[counted]
            self._predictions(seen, ids[:, 1:][counted], counted, domain, document[:, 1:][counted], position)
        if self.whole is not None:
            for sums in self.layers.values():
                sums.add(seen[0], seen[1], mask.reshape(-1), document.reshape(-1))

    def _predictions(
        self, seen: Sequence[Seen], target: Tensor, counted: Tensor, domain: Tensor, document: Tensor, position: Tensor
    ) -> None:
        """Score the predicted tokens ``target [N]``; the other tensors are alike."""
        hidden = [one.hidden[:, :-1][counted.to(one.hidden.device)] for one in seen]
        size = max(1, _CHUNK_BYTES // (4 * self.side.vocabulary))
        rows = [slice(at, at + size) for at in range(0, len(target), size)]
        scored = torch.cat([self._chunk([h[part] for h in hidden], target[part]) for part in rows]).cpu()
        if not bool(torch.isfinite(scored[:, ::3][:, : len(self.sides)]).all()):
            raise NonFiniteError("a model predicts NaN or infinite logits on this text; try another dtype")
        target, domain, document = target.cpu(), domain.cpu(), document.cpu()
        nbytes = torch.zeros_like(target) if self.bytes_V is None else self.bytes_V[target]
        self.nbytes += int(nbytes.sum())
        nats = scored[:, 0]
        if self.whole is None:
            compared = nats.new_zeros(len(nats), 3)
        else:
            compared = torch.cat([scored[:, 3:4], scored[:, 6:8]], 1)
        ones = torch.ones_like(nats)
        values = torch.cat([torch.stack([ones, nbytes.to(nats.dtype), nats], 1), compared], 1)
        self.tokens.add(domain, document, values)
        self.parts.append(torch.cat([position.cpu()[:, None].float(), scored[:, : 3 * len(self.sides)]], 1))

    def _chunk(self, hidden: Sequence[Tensor], target: Tensor) -> Tensor:
        """``[n, 3]`` loss, entropy and rank; with a second model ``[n, 8]``: also its three, KL, and agreement."""
        logs = [
            one.logits(h).log_softmax(-1).to(target.device) for one, h in zip(self.sides, hidden, strict=True)
        ]  # fmt: skip
        columns: list[Tensor] = []
        for log in logs:
            right = log.gather(1, target[:, None])
            columns += [-right[:, 0], torch.special.entr(log.exp()).sum(1), (log > right).sum(1).float()]
        if len(logs) == 2:
            p = logs[1].exp()
            # where p is 0 its term is, too, whatever the logarithms are
            columns.append(torch.where(p > 0, p * (logs[1] - logs[0]), 0).sum(1))
            columns.append((logs[0].argmax(1) == logs[1].argmax(1)).float())
        return torch.stack(columns, 1)

    def proxies(self, which: int) -> dict[str, float]:
        """Of the model, or of the whole one."""
        table = torch.cat(self.parts).numpy()
        loss, entropy, rank = table[:, 1 + 3 * which : 4 + 3 * which].T
        nbytes = None if self.bytes_V is None else self.nbytes
        return proxy_metrics(loss, entropy, rank, table[:, 0], vocabulary=self.side.vocabulary, nbytes=nbytes)

    def continuations(self, tokenizer: Any, new_tokens: int) -> tuple[Continuation, ...]:
        """What both models make of the beginning of each domain's first document."""
        found = []
        for code, prompt in sorted(self.prompts.items()):
            texts = [_continue(one, prompt, tokenizer, new_tokens) for one in self.sides]
            shown = tokenizer.decode(prompt.tolist(), skip_special_tokens=True)
            found.append(Continuation(self.domains[code], shown, *texts))
        return tuple(found)


def _continue(side: Side, prompt: Tensor, tokenizer: Any, new_tokens: int) -> str:
    """The likeliest continuation, one token after the other."""
    ids = prompt[None].to(side.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # not the model's own settings, which may sample
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, pad_token_id=pad or 0, eos_token_id=tokenizer.eos_token_id
    )
    with side.masked():
        output = side.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )  # fmt: skip
    text: str = tokenizer.decode(output[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
    return text


def _layer_sums(side: Side, whole: Side | None, maps: Maps | None, notes: list[str]) -> dict[int, LayerSums]:
    """Of every MoE layer that both models have."""
    if whole is None:
        return {}
    found: dict[int, LayerSums] = {}
    unknown: list[int] = []
    for layer, site in sorted(side.sites.items()):
        if layer not in whole.sites:
            continue
        E = whole.sites[layer].num_experts
        new_of = new_ids(maps, layer, E, site.num_experts)
        if new_of is None:
            unknown.append(layer)
        found[layer] = LayerSums(layer, site.num_experts, E, new_of)
    if unknown:
        notes.append(
            f"layers {_some(unknown)}: which expert of one model is which of the other is not known, so the routers "
            "are not compared"
        )
    return found


def _some(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))
