"""``collegium generate``: continue a prompt."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from collegium.cli._model import Device, Dtype, TrustRemoteCode

__all__ = ["run"]

PART_SECONDS = 1.0
"""How long a row of a trace waits before it is written, at the most: `collegium watch` sees it then."""


def run(
    model: Annotated[Path, typer.Argument(help="A model folder with a tokenizer; or demo.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Above 0; lower is more likely.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0, help="Only the k likeliest tokens; 0 is all.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Only the likeliest tokens that together reach p (0 to 1).")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1 makes tokens that are there less likely.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same text.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token; no sampling.")] = False,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print tokens as they come.")] = True,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Also record the routing here; collegium watch shows it meanwhile.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a trace that is there.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON when done; no streaming.")] = False,
) -> None:
    """Continue a prompt with a model, MoE or dense. Options left out are those of the model's generation config."""
    import torch

    from collegium.cli._generation import encode, padding, sampling, streamer_for
    from collegium.cli._model import open_folder, open_model, open_tokenizer

    chosen = sampling(greedy, temperature, top_k, top_p, repetition_penalty)
    if trace is not None:
        _check_trace(trace, overwrite)  # before a large model is read for nothing
    checkpoint = open_folder(model, trust_remote_code=trust_remote_code)
    folder = checkpoint.folder
    tokenizer = open_tokenizer(folder, trust_remote_code=trust_remote_code)
    network = open_model(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    ids = encode(tokenizer, sys.stdin.read() if prompt == "-" else prompt, network)
    if seed is not None:
        torch.manual_seed(seed)
    streamer = streamer_for(tokenizer) if stream and not as_json else None
    settings = {"max_new_tokens": max_new_tokens, "pad_token_id": padding(tokenizer, network), **chosen}
    start = time.perf_counter()
    if trace is None:
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            output = network.generate(input_ids=ids, attention_mask=mask, streamer=streamer, **settings)
        fresh = output[0, ids.shape[1] :].tolist()
    else:
        described = {"name": str(model), "fingerprint": checkpoint.fingerprint, "overwrite": overwrite}
        fresh = _traced(network, tokenizer, ids, trace, streamer, **described, **settings)
    seconds = time.perf_counter() - start
    text = tokenizer.decode(fresh, skip_special_tokens=True)
    if as_json:
        record = {
            "text": text,
            "prompt_tokens": ids.shape[1],
            "tokens": len(fresh),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(len(fresh) / seconds, 2),
            **({} if trace is None else {"trace": str(trace)}),
        }
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False))
        return
    if not stream:
        typer.echo(text)
    typer.echo(f"{len(fresh)} tokens in {seconds:.2f} s ({len(fresh) / seconds:.1f} tokens/s)", err=True)


def _check_trace(trace: Path, overwrite: bool) -> None:
    """Raises ConfigError if a trace is there that is not to be replaced."""
    from collegium.errors import ConfigError
    from collegium.trace.run import check_target

    if check_target(trace, resume=False, overwrite=True) and not overwrite:
        raise ConfigError(f"{trace} holds a trace already; choose another folder, or replace it with --overwrite")


def _traced(network: Any, tokenizer: Any, ids: Any, trace: Path, streamer: Any, **settings: Any) -> list[int]:
    """Generate as without a trace, and record where every token goes; the generated tokens."""
    from transformers.generation.streamers import BaseStreamer

    from collegium.data.tokenize import tokenizer_fingerprint
    from collegium.trace import record_generate

    seen: list[int] = []  # the prompt comes first

    class Listen(BaseStreamer):
        def put(self, value: Any) -> None:
            seen.extend(value.reshape(-1).tolist())
            if streamer is not None:
                streamer.put(value)

        def end(self) -> None:
            if streamer is not None:
                streamer.end()

    record_generate(
        network,
        [{"input_ids": ids}],
        trace,
        tokenizer=tokenizer_fingerprint(tokenizer),
        data="a prompt, and what was generated",
        part_seconds=PART_SECONDS,
        streamer=Listen(),
        **settings,
    )
    return seen[ids.shape[1] :]
