"""What the verbs that write text share: sampling options, prompts as token ids, text on the terminal as it comes."""

from __future__ import annotations

from typing import Any

import typer

__all__ = ["encode", "padding", "sampling", "streamer_for"]


def sampling(
    greedy: bool,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float | None,
) -> dict[str, Any]:
    """Arguments of ``generate`` for the options that were given.

    Raises:
        ConfigError: one is out of range, or does nothing beside another.
    """
    from collegium.errors import ConfigError

    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given = {name: value for name, value in given.items() if value is not None}
    if greedy and given:
        raise ConfigError(f"--greedy takes the likeliest token, so {', '.join(given)} would do nothing; leave one out")
    if temperature is not None and not temperature > 0:
        raise ConfigError(f"temperature must be above 0, not {temperature}; --greedy is its limit at 0")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1, not {top_p}")
    if repetition_penalty is not None and not repetition_penalty > 0:
        raise ConfigError(f"repetition_penalty must be above 0, not {repetition_penalty}")
    penalty = {} if repetition_penalty is None else {"repetition_penalty": repetition_penalty}
    return {"do_sample": not greedy, **given, **penalty}


def encode(tokenizer: Any, prompt: str, network: Any) -> Any:
    """``[1, S]`` token ids, with the beginning-of-text token in front if the tokenizer has one."""
    import torch

    from collegium.cli._model import check_ids
    from collegium.errors import ConfigError

    ids = list(tokenizer(prompt).input_ids)
    start = tokenizer.bos_token_id
    if start is not None and ids[:1] != [start]:
        ids.insert(0, start)
    if not ids:
        raise ConfigError("the prompt is empty and the tokenizer has no beginning-of-text token to start from")
    check_ids(max(ids), network)
    return torch.tensor([ids], device=network.device)


def padding(tokenizer: Any, network: Any) -> int:
    """The token id that ``generate`` fills up with."""
    ends = network.generation_config.eos_token_id
    first = ends[0] if isinstance(ends, list) else ends
    return next((token for token in (tokenizer.pad_token_id, first) if token is not None), 0)


def streamer_for(tokenizer: Any) -> Any:
    """Writes text to the terminal as ``generate`` gives it."""
    from transformers import TextStreamer

    class Stream(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            typer.echo(text, nl=stream_end)

    return Stream(tokenizer, skip_prompt=True, skip_special_tokens=True)
