"""Recording: run a model over batches and write what its routers decide.

The tap only keeps references while the model runs; everything is converted once per forward, and encoded and written
by the writer's thread, so that tracing costs a few percent of the forward.

Legend: B sequences, S tokens of a sequence, T = B * S, E experts, d model width.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from collegium.errors import ConfigError, TraceError
from collegium.trace.reader import Trace
from collegium.trace.run import Batch, Progress, Run, batch_ids, batch_inputs

__all__ = ["record", "record_generate"]

Array = np.ndarray[Any, np.dtype[Any]]


def record(
    model: nn.Module,
    batches: Iterable[Batch],
    out: str | os.PathLike[str],
    *,
    name: str | None = None,
    fingerprint: str | None = None,
    tokenizer: str | None = None,
    data: str = "unnamed",
    domains: Sequence[str] = ("unknown",),
    logits: bool = False,
    gate_inputs: float = 0.0,
    dropped: bool = False,
    max_tokens: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Trace:
    """Run `model` over `batches` in eval mode and record where every token goes. All rows are of phase "prefill".

    Args:
        model: any model `collegium.sites.sites` finds blocks in, one block a decoder layer. Of a block that routes
            several times in a forward all iterations are recorded, without logits and gate inputs.
        batches: dicts with ``input_ids [B, S]``; optional ``attention_mask [B, S]`` (0 is padding and is not stored),
            ``position [B, S]`` (handed to the model as ``position_ids``; else the place among the real tokens),
            ``domain`` (index into `domains`), ``document`` and ``sequence`` ids, each ``[B]`` or ``[B, S]``
            (sequences are numbered, and a document is a sequence, if not given).
        out: folder for the trace.
        name, fingerprint, tokenizer, data, domains: go into the meta; see `TraceMeta`.
        logits: also store router logits (E float16 values a token and layer).
        gate_inputs: share of tokens, in 0 .. 1, whose router inputs are stored too (d float32 values).
        dropped: also store the experts that were chosen but not carried out because of a capacity limit.
        max_tokens: stop after so many rows.
        resume: continue the trace in `out`: the batches must be those of the first run; what is stored is skipped.
        overwrite: delete the trace in `out` first.
        progress: called after each batch with the number of rows it gave.

    Raises:
        TraceError: `out` holds a trace and neither `resume` nor `overwrite` is set, or it does not fit the batches.
        NotMoEError, UnsupportedFamilyError: there is nothing to record, or not in a way that fits a trace.
        NonFiniteError: a router gives NaN; the message names the layer.
        StorageError: the disk is full; the parts written so far stay readable.
    """
    describe = {"name": name, "fingerprint": fingerprint, "tokenizer": tokenizer, "data": data, "domains": domains}
    run = Run(model, Path(out), logits, gate_inputs, dropped, progress, describe)
    accepts = inspect.signature(model.forward).parameters
    with run.open(resume=resume, overwrite=overwrite) as stored:
        replay = _Replay(stored)
        for batch in batches:
            ids, mask = batch_ids(batch, run.device)
            tokens = run.describe_tokens(batch, ids, mask)
            chosen = np.flatnonzero(mask.reshape(-1).cpu().numpy())
            chosen = chosen[: None if max_tokens is None else max(0, max_tokens - run.seen)]
            run.seen += len(chosen)
            chosen = chosen[replay.skip(tokens["token"][chosen]) :]
            if len(chosen):
                run.expect(chosen)
                model(**batch_inputs(ids, mask, batch, accepts))
                run.write({key: values[chosen] for key, values in tokens.items()}, ids.numel(), "prefill")
            run.step += 1
            if progress is not None:
                progress(len(chosen))
            if max_tokens is not None and run.seen >= max_tokens:
                break
        replay.finish()
    return Trace.open(out)


def record_generate(
    model: Any,
    batches: Iterable[Batch],
    out: str | os.PathLike[str],
    *,
    max_new_tokens: int,
    name: str | None = None,
    fingerprint: str | None = None,
    tokenizer: str | None = None,
    data: str = "unnamed",
    domains: Sequence[str] = ("unknown",),
    logits: bool = False,
    gate_inputs: float = 0.0,
    dropped: bool = False,
    max_tokens: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    part_seconds: float | None = None,
    **generate: Any,
) -> Trace:
    """Let `model` continue every sequence of `batches`, and record the prompts (phase "prefill") and the generated
    tokens the model was fed (phase "decode", one forward step each). A sequence ends with its end token.

    Args:
        max_new_tokens, generate: handed to ``model.generate``; greedy unless they say otherwise.
        batches: as for `record`, but padded on the left.
        max_tokens: start no further batch once there are so many rows.
        part_seconds: write what there is whenever its first row has waited so long, for who watches; see `TraceWriter`.

    Other arguments and errors are those of `record`; also

    Raises:
        ConfigError: padding on the right, or several beams or sequences for one prompt.
    """
    describe = {"name": name, "fingerprint": fingerprint, "tokenizer": tokenizer, "data": data, "domains": domains}
    run = Run(model, Path(out), logits, gate_inputs, dropped, progress, describe, part_seconds)
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, **generate}
    ends = settings.get("eos_token_id", model.generation_config.eos_token_id)
    with run.open(resume=False, overwrite=overwrite):
        for batch in batches:
            ids, mask = batch_ids(batch, run.device)
            if not bool(mask[:, -1].all()):
                raise ConfigError("a batch to generate from must be padded on the left: its last column holds padding")
            with _Decoding(run, batch, ids, mask, ends).hooks():
                model.generate(input_ids=ids, attention_mask=mask.long(), **settings)
            if max_tokens is not None and run.seen >= max_tokens:
                break
    return Trace.open(out)


class _Replay:
    """Compares the batches of a resumed run with what is stored, and says how much of each to skip."""

    def __init__(self, stored: Trace | None) -> None:
        self._left = 0 if stored is None else len(stored)
        self._parts = iter(()) if stored is None else (part.column("token") for part in stored.iter_parts(["token"]))
        self._held = np.empty(0, np.uint32)

    def skip(self, tokens: Array) -> int:
        """How many of these rows are stored already."""
        count = min(len(tokens), self._left)
        while len(self._held) < count:
            self._held = np.concatenate([self._held, next(self._parts)])
        if not np.array_equal(self._held[:count], tokens[:count]):
            raise TraceError("cannot resume: the tokens of this run are not those of the trace; record a new one")
        self._held = self._held[count:]
        self._left -= count
        return count

    def finish(self) -> None:
        """Refuse to complete a trace that holds more than this run gives."""
        if self._left:
            raise TraceError(f"cannot resume: the trace holds {self._left} tokens more than this run would give")


class _Decoding:
    """Follows one call of ``generate``: the first forward sees the prompts, each later one a token a sequence."""

    def __init__(self, run: Run, batch: Batch, ids: Tensor, mask: Tensor, ends: int | list[int] | None) -> None:
        B, S = ids.shape
        self.run, self.shape = run, (B, S)
        self.prompt = run.describe_tokens(batch, ids, mask)
        self.real = mask.reshape(-1).cpu().numpy()
        self.last = {key: values.reshape(B, S)[:, -1] for key, values in self.prompt.items()}
        self.alive = np.ones(B, bool)
        self.ends = np.atleast_1d(np.array([] if ends is None else ends, np.int64))
        self.prefilled = False
        self.rows: dict[str, Array] = {}

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        model = self.run.model
        handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        expected = (self.shape[0], 1) if self.prefilled else self.shape
        if tuple(ids.shape) != expected:
            raise ConfigError(
                f"generate fed the model {list(ids.shape)} tokens where a trace expects {list(expected)}: record with "
                "one sequence a prompt (no beams, no assistant) and with the cache on"
            )
        if self.prefilled:
            token = ids[:, 0].cpu().numpy()
            self.alive &= ~np.isin(token, self.ends)
            self.last |= {"token": token, "position": self.last["position"] + 1}
        columns, stored = (self.last, self.alive) if self.prefilled else (self.prompt, self.real)
        chosen = np.flatnonzero(stored)
        self.rows = {key: values[chosen] for key, values in columns.items()}
        self.run.expect(chosen)

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        phase, tokens = ("decode", self.shape[0]) if self.prefilled else ("prefill", self.shape[0] * self.shape[1])
        self.run.write(self.rows, tokens, phase)
        self.run.step += 1
        self.run.seen += len(self.rows["token"])
        self.prefilled = True
        if self.run.progress is not None:
            self.run.progress(len(self.rows["token"]))
