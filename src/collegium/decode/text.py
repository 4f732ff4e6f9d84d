"""Text from token ids as they come: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["Detokenizer", "StopTexts"]

UNFINISHED = "\ufffd"
PATIENCE = 8
"""Tokens that may end in half a character before it is taken for damaged; a character has at most four bytes."""


class Detokenizer:
    """Decodes one sequence token by token.

    The tokens whose text was sent last are decoded again with the new ones, because many tokenizers write a token
    otherwise at the start of a text than inside it. The cost per token does not grow with the text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._ids: list[int] = []
        self._sent = 0

    def push(self, token: int) -> str:
        """The text that is certain after one more token; empty while a character is unfinished."""
        if token in self._special:
            return ""
        self._ids.append(token)
        return self._advance(len(self._ids) - self._sent >= PATIENCE)

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        return self._advance(True)

    def _advance(self, certain: bool) -> str:
        before, text = self._decode(self._ids[: self._sent]), self._decode(self._ids)
        if (text.endswith(UNFINISHED) and not certain) or len(text) <= len(before):
            return ""
        self._ids, self._sent = self._ids[self._sent :], len(self._ids) - self._sent
        return text[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


class StopTexts:
    """Cuts a text before the first of `stops`, wherever the pieces of it are cut.

    Attributes:
        hit: a stop text was met; nothing more is sent.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def push(self, piece: str) -> str:
        """The text that can be sent now: all but an end that may be the beginning of a stop text."""
        if self.hit or not self._stops:
            return "" if self.hit else piece
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
