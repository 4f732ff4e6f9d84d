"""`Writer`: text from a model that runs from a store: streamed, stopped by Ctrl-C, with what it cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from collegium.errors import ConfigError
from collegium.process import peak_memory

if TYPE_CHECKING:
    from collegium.offload.model import Offloaded

__all__ = ["Writer"]


class Writer:
    """Continues prompts one after the other.

    Args:
        found: the model.
        tokenizer: its own.
        settings: arguments of ``generate``.
        watch: show a live panel of the cache.
        quiet: print nothing.

    Attributes:
        last: tokens and speed of the last text, and what its experts cost.
    """

    def __init__(
        self, found: Offloaded, tokenizer: Any, settings: dict[str, Any], *, watch: bool = False, quiet: bool = False
    ) -> None:
        from collegium.cli._generation import padding

        self._found, self._tokenizer, self._watch, self._quiet = found, tokenizer, watch, quiet
        self._settings = {**settings, "pad_token_id": padding(tokenizer, found.model)}
        self._stopped = False
        self._ids: list[int] = []  # what the cache of the chat holds
        self._cache: Any = None
        self.last: dict[str, float] = {}

    def stop(self) -> None:
        """Stop after the token that is being computed."""
        self._stopped = True

    def budget(self) -> dict[str, Any]:
        """The plan of memory as plain data."""
        return {**asdict(self._found.budget), "total": self._found.budget.total}

    def write(self, prompt: str) -> str:
        """Continue a text."""
        from collegium.cli._generation import encode

        return self._generate(encode(self._tokenizer, prompt, self._found.model)[0].tolist())

    def answer(self, messages: Sequence[dict[str, str]]) -> str:
        """Answer the last message of a chat. What it has in common with the turn before is not computed again."""
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program that came with the model
            raise ConfigError(f"the model's chat template does not take this chat: {error}") from error
        return self._generate(list(self._tokenizer(text, add_special_tokens=False).input_ids))

    def _generate(self, ids: list[int]) -> str:
        import torch
        from transformers import DynamicCache, StoppingCriteriaList

        room = self._found.context - len(ids)
        if room < 1:
            raise ConfigError(
                f"the prompt is {len(ids)} tokens and the context {self._found.context}; shorten it, or give a longer "
                "--context"
            )
        self._stopped = False
        self._shorten_cache(ids)
        if self._cache is None:
            self._cache = DynamicCache(config=self._found.model.config)
        before, start = self._found.counters(), time.perf_counter()
        settings = {**self._settings, "max_new_tokens": min(self._settings["max_new_tokens"], room)}
        with torch.inference_mode(), self._shown() as streamer:
            output = self._found.model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                past_key_values=self._cache,
                prefill_chunk_size=self._found.chunk,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([lambda ids, scores: torch.tensor([self._stopped])]),
                **settings,
            )[0].tolist()
        self._ids = output[:-1]  # the last token was chosen and not fed
        fresh = output[len(ids) :]
        self._count(before, len(ids), len(fresh), time.perf_counter() - start, streamer.first - start)
        return self._tokenizer.decode(fresh, skip_special_tokens=True)

    def _shorten_cache(self, ids: list[int]) -> None:
        """Keep of the cache what the new prompt begins with; nothing where a cache cannot be cut."""
        from transformers.cache_utils import DynamicLayer

        common = 0
        while common < min(len(ids) - 1, len(self._ids)) and ids[common] == self._ids[common]:
            common += 1
        plain = self._cache is not None and all(type(layer) is DynamicLayer for layer in self._cache.layers)
        if not (plain and common):
            self._cache = None
        elif surplus := self._cache.get_seq_length() - common:
            self._cache.crop(-surplus)

    def _shown(self) -> Any:
        from collegium.cli._panel import Shown

        return Shown(self._found, self._tokenizer, watch=self._watch, quiet=self._quiet)

    def _count(self, before: dict[str, float], prompt: int, tokens: int, seconds: float, first: float) -> None:
        now = self._found.counters()
        more = {name: now[name] - before[name] for name in now}
        asked = sum(more[name] for name in ("hits", "prefetched", "late", "misses")) or 1.0
        after = max(seconds - first, 1e-9)
        self.last = {
            "prompt_tokens": prompt,
            "tokens": tokens,
            "prompt_seconds": round(first, 3),
            "tokens_per_second": round((tokens - 1) / after, 2) if tokens > 1 else 0.0,
            "hit_rate": round((more["hits"] + more["prefetched"]) / asked, 4),
            "bytes_read": more["read_bytes"],
            "stall_seconds": round(more["stall_seconds"], 3),
            "peak_bytes": peak_memory(),
        }
        if not self._quiet:
            typer.echo(
                f"{prompt} tokens read in {first:.2f} s, {tokens} written"
                + (f" ({self.last['tokens_per_second']:.1f} tokens/s)" if tokens > 1 else "")
                + f"; {self.last['hit_rate']:.0%} of experts in memory, {more['read_bytes'] / 1e6:,.0f} MB read, "
                f"{more['stall_seconds']:.2f} s waited",
                err=True,
            )
