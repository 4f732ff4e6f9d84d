"""vLLM's returned expert ids (``--enable-return-routed-experts``).

Files:

* ``.json`` (a response, or a list of them) or ``.jsonl`` (one a line): what the API returns with
  ``"return_token_ids": true``. ``choices[i].routed_experts`` is an array ``[tokens, L, K]``: base64 of a ``.npy`` file
  or nested lists; ``choices[i].token_ids`` and ``prompt_token_ids`` (of the response or the choice) say for which
  tokens. Newer releases return one array from the first prompt token on; 0.21 returned the prompt's apart, as
  ``prompt_routed_experts``. The last generated token never went through the model and has no row.
* ``.npy``: one such array, one sequence.
* ``.npz``: ``routed_experts``, and optionally ``prompt_routed_experts``, ``prompt_token_ids``, ``token_ids``.

L counts MoE layers, or all decoder layers with zeros for dense ones; both are understood. Weights are not returned.

Legend: P tokens of the prompt, G generated tokens, L layers, K experts of a token.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from collegium.errors import TraceError
from collegium.trace.importers.base import (
    EQUAL_WEIGHTS,
    Block,
    Known,
    Recording,
    checked_rows,
    importer,
    layer_entries,
    sequence_columns,
    token_ids,
    whole_numbers,
)
from collegium.trace.schema import LayerMeta

__all__ = ["read_vllm"]

Array = np.ndarray[Any, np.dtype[Any]]

_STEPS = "which requests shared a forward was not recorded: steps are counted one sequence after the other"


@dataclass(eq=False)
class _Sequence:
    """One request as it was recorded: rows from position `start` on."""

    where: str
    ids: Array  # [n, L, K]
    token: Array | None  # [n]
    start: int
    prompt: int  # so many of the rows are prompt


@importer("vllm", reads="API responses with routed_experts (.json, .jsonl), or such arrays (.npy, .npz)")
def read_vllm(files: Sequence[Path], known: Known) -> Recording:
    """See the module."""
    sequences = [sequence for path in files for sequence in _sequences(path)]
    sequences = [sequence for sequence in sequences if len(sequence.ids)]
    if not sequences:
        raise TraceError(f"{files[0]}: field 'routed_experts' holds no tokens")
    L, K = sequences[0].ids.shape[1:]
    for sequence in sequences:
        if sequence.ids.shape[1:] != (L, K):
            raise TraceError(f"{sequence.where} is {list(sequence.ids.shape)}, the first array [tokens, {L}, {K}]")
    # the buffer of a dense layer stays zero; a MoE layer cannot choose expert 0 twice
    used = [layer for layer in range(L) if K == 1 or any(sequence.ids[:, layer].any() for sequence in sequences)]
    entries = layer_entries(known, used, L, sequences[0].where, top_k=K)
    notes = [EQUAL_WEIGHTS, _STEPS]
    if len(used) < L:
        notes.append(f"{L - len(used)} layers hold zeros only: they were taken for dense ones")
    _give_tokens(sequences, known, notes)
    return Recording(entries, _blocks(sequences, used, entries), notes=notes)


def _give_tokens(sequences: list[_Sequence], known: Known, notes: list[str]) -> None:
    without = [sequence for sequence in sequences if sequence.token is None]
    if known.tokens is not None and len(without) < len(sequences):
        raise TraceError(f"{sequences[0].where}: the files hold token ids; leave out --tokens")
    if not without:
        return
    ids = token_ids(known, sum(len(sequence.ids) for sequence in without), notes)
    for sequence in without:
        sequence.token, ids = ids[: len(sequence.ids)], ids[len(sequence.ids) :]


def _sequences(path: Path) -> Iterator[_Sequence]:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        where = f"{path}: the array"
        ids = _experts(_load_numpy(path.read_bytes(), str(path)), where)
        yield _Sequence(where, ids, None, 0, len(ids))
    elif suffix == ".npz":
        archive = _load_numpy(path.read_bytes(), str(path))
        if not hasattr(archive, "files"):
            raise TraceError(f"{path} is not an .npz archive")
        try:
            fields = {name: archive[name] for name in archive.files}
        except Exception as error:  # a damaged member
            raise TraceError(f"{path} is not readable: {error}") from error
        yield _sequence(fields, fields, str(path), "", fields.get("prompt_routed_experts"), needs_tokens=False)
    elif suffix in (".json", ".jsonl", ".ndjson"):
        for response, where in _responses(path):
            yield from _choices(response, where)
    else:
        raise TraceError(f"{path}: vLLM's expert ids are read from .json, .jsonl, .npy and .npz files")


def _load_numpy(content: bytes, where: str) -> Any:
    try:
        return np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # foreign bytes; what their parser raises is not ours to list
        raise TraceError(f"{where} is not a readable numpy file: {error}") from error


def _responses(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path} is not text in UTF-8: {error}") from error
    lines = path.suffix.lower() != ".json"
    numbered = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()] if lines else [(0, text)]
    for number, piece in numbered:
        where = f"{path}, line {number}" if lines else str(path)
        try:
            found = json.loads(piece)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{where} is not JSON: {error}") from error
        several = isinstance(found, list)
        for place, response in enumerate(found if several else [found]):
            if not isinstance(response, dict):
                raise TraceError(f"{where}: a response must be an object, not a {type(response).__name__}")
            yield response, f"{where}, response {place}" if several else where


def _choices(response: dict[str, Any], where: str) -> Iterator[_Sequence]:
    # "outputs" is what the offline API calls the choices
    name = next((name for name in ("choices", "outputs") if name in response), None)
    if name is None:
        yield _sequence(response, response, where, "", response.get("prompt_routed_experts"), needs_tokens=True)
        return
    choices = response[name]
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise TraceError(f"{where}: field {name!r} must be a list of objects")
    for place, choice in enumerate(choices):
        shared = response.get("prompt_routed_experts")
        found = _sequence(choice, response, where, f"{name}.{place}.", shared, needs_tokens=True)
        if place and found.prompt:  # the prompt went through the model once, for all choices
            rows, prompt = slice(found.prompt, None), found.prompt
            assert found.token is not None
            found = _Sequence(found.where, found.ids[rows], found.token[rows], prompt, 0)
        yield found


def _sequence(
    fields: dict[str, Any], response: dict[str, Any], file: str, prefix: str, prompt_rows: Any, *, needs_tokens: bool
) -> _Sequence:
    """One choice: its array, cut to tokens by the lengths of prompt and answer."""

    def where(name: str) -> str:
        return f"{file}: field '{prefix}{name}'"

    if fields.get("routed_experts") is None:
        raise TraceError(f"{where('routed_experts')} is missing; serve with --enable-return-routed-experts")
    ids = _experts(fields["routed_experts"], where("routed_experts"))
    given = {
        "prompt_token_ids": fields.get("prompt_token_ids", response.get("prompt_token_ids")),
        "token_ids": fields.get("token_ids"),
    }
    if any(value is None for value in given.values()):
        if needs_tokens or prompt_rows is not None:
            name = next(name for name, value in given.items() if value is None)
            raise TraceError(f'{where(name)} is missing; ask the server with "return_token_ids": true')
        return _Sequence(where("routed_experts"), ids, None, 0, len(ids))
    prompt, answer = (whole_numbers(value, where(name)) for name, value in given.items())
    if prompt.ndim != 1 or answer.ndim != 1 or (np.concatenate([prompt, answer]) < 0).any():
        raise TraceError(f"{where('token_ids')} and prompt_token_ids must be lists of token ids")
    P, G = len(prompt), len(answer)
    start = 0
    if prompt_rows is not None:
        first = _experts(prompt_rows, f"{file}: field 'prompt_routed_experts'")
        if not len(ids):  # an answer of one token, which was never fed back
            ids = ids.reshape(0, *first.shape[1:])
        if len(first) != P or len(ids) not in (G, G - 1) or first.shape[1:] != ids.shape[1:]:
            raise TraceError(
                f"{where('routed_experts')} is {list(ids.shape)} and prompt_routed_experts {list(first.shape)}, for "
                f"{P} prompt tokens and {G} generated ones"
            )
        ids = np.concatenate([first, ids])
    elif len(ids) in (P + G, P + G - 1):
        pass
    elif len(ids) in (G, G - 1):
        start = P
    else:
        raise TraceError(
            f"{where('routed_experts')} has {len(ids)} rows, for {P} prompt tokens and {G} generated ones; it needs "
            f"{P + G - 1} (or {G - 1} where the prompt's were not returned)"
        )
    token = np.concatenate([prompt, answer])[start : start + len(ids)]
    return _Sequence(where("routed_experts"), ids, token, start, max(0, min(P - start, len(ids))))


def _experts(value: Any, where: str) -> Array:
    """``[n, L, K]`` from nested lists, an array, or base64 of a .npy file."""
    if isinstance(value, str):
        try:
            content = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise TraceError(f"{where} is not base64: {error}") from error
        value = _load_numpy(content, where)
    ids = whole_numbers(value, where)
    if ids.size == 0:
        return ids.reshape(0, *(ids.shape[1:] if ids.ndim == 3 else (0, 0)))
    if ids.ndim != 3:
        raise TraceError(f"{where} must be [tokens, layers, experts per token], not {list(ids.shape)}")
    if ids.min() < 0:
        raise TraceError(f"{where} holds the expert id {ids.min()}")
    return ids


def _blocks(sequences: list[_Sequence], used: Sequence[int], entries: tuple[LayerMeta, ...]) -> Iterator[Block]:
    step = 0
    for number, sequence in enumerate(sequences):
        assert sequence.token is not None  # `_give_tokens` saw to it
        for phase, rows in (("prefill", slice(0, sequence.prompt)), ("decode", slice(sequence.prompt, None))):
            token = sequence.token[rows]
            if not len(token):
                continue
            first = sequence.start + (0 if phase == "prefill" else sequence.prompt)
            columns = sequence_columns(token, number, first + np.arange(len(token)))
            ids = sequence.ids[rows]
            layers = [
                checked_rows(ids[:, row], entry, sequence.where) for row, entry in zip(used, entries, strict=True)
            ]
            # a prompt is one forward, each generated token another
            steps = np.full(len(token), step) if phase == "prefill" else step + np.arange(len(token))
            step = int(steps[-1]) + 1
            yield Block(columns, layers, phase, steps)
