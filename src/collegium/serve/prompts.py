"""Token ids from what a client sent: a text, or the messages of a chat through the model's own template."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from collegium.serve.bodies import Message
from collegium.serve.errors import ApiError

__all__ = ["Prompts"]


class Prompts:
    """Encodes prompts. Any thread may.

    Args:
        tokenizer: of the model; a copy is made, since the batcher decodes with it at the same time.
        chat_template: stands in for the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self._template = chat_template
        self._lock = threading.Lock()

    @property
    def chats(self) -> bool:
        """There is a chat template."""
        return bool(self._template or getattr(self.tokenizer, "chat_template", None))

    def text(self, prompt: str) -> tuple[int, ...]:
        """Ids of a text, after the beginning-of-text token if the tokenizer has one."""
        ids = self._encode(prompt, "prompt", special=True)
        start = self.tokenizer.bos_token_id
        return ids if start is None or ids[:1] == (start,) else (start, *ids)

    def chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of a chat, up to where the assistant is to speak.

        Raises:
            ApiError: there is no template, or it refuses the messages.
        """
        if not self.chats:
            raise ApiError(
                400,
                "the model has no chat template; use /v1/completions, or start the server with --chat-template",
                param="messages",
                code="no_chat_template",
            )
        if not messages:
            raise ApiError(400, "messages holds none; send at least one", param="messages")
        turns = [{"role": _role(message.role), "content": message.text()} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, chat_template=self._template, add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            refusal = f"the chat template of the model refuses the messages: {error}"
            raise ApiError(400, refusal, param="messages") from error
        # the template has written the special tokens itself
        return self._encode(text, "messages", special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a prompt that was sent as ids."""
        with self._lock:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _encode(self, text: str, field: str, *, special: bool) -> tuple[int, ...]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ApiError(400, f"{field} holds half a character (a lone surrogate)", param=field) from error
        with self._lock:
            return tuple(self.tokenizer(text, add_special_tokens=special).input_ids)


def _role(role: str) -> str:
    return "system" if role == "developer" else role
