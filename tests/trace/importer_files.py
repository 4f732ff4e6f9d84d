"""A made-up run as other programs write it, and whether a trace is that run."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from collegium.trace import Trace
from collegium.trace.importers import Known

Array = np.ndarray[Any, np.dtype[Any]]
E, K, LAYERS, VOCABULARY = 12, 3, (1, 2, 4), 97
PROMPTS, ANSWERS = (5, 9, 4), (6, 3, 1)  # tokens of the prompt, and generated ones, of each sequence


class Run:
    """A made-up run: three sequences, each a prompt and an answer whose last token is never fed back."""

    def __init__(self, seed: int = 0, answers: tuple[int, ...] = ANSWERS) -> None:
        draw = np.random.default_rng(seed)
        self.prompts = [draw.integers(0, VOCABULARY, n).tolist() for n in PROMPTS]
        self.answers = [draw.integers(0, VOCABULARY, n).tolist() for n in answers]
        self.fed = [p + a[:-1] for p, a in zip(self.prompts, self.answers, strict=True)]
        self.experts = [
            np.stack([[draw.permutation(E)[:K] for _ in LAYERS] for _ in tokens]) for tokens in self.fed
        ]  # a [n, L, K] for each sequence
        self.tokens = np.concatenate(self.fed)
        self.all = np.concatenate(self.experts)


def npy(array: Array) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def write_vllm(folder: Path, run: Run) -> list[Path]:
    lines = [
        json.dumps(
            {
                "id": f"cmpl-{n}",
                "prompt_token_ids": run.prompts[n],
                "choices": [
                    {"index": 0, "token_ids": run.answers[n], "routed_experts": npy(run.experts[n].astype(np.int16))}
                ],
            }
        )
        for n in range(len(run.fed))
    ]
    (folder / "responses.jsonl").write_text("\n".join(lines) + "\n")
    return [folder / "responses.jsonl"]


def sglang_data(run: Run, rows: int = 6, slots: int = 14) -> dict[str, Any]:
    """Prompts in one forward, then a token of each sequence a forward; ids are physical slots of a shuffled map."""
    draw = np.random.default_rng(1)
    table = np.stack([np.concatenate([draw.permutation(E), draw.integers(0, E, slots - E)]) for _ in range(rows)])
    slot_of = np.argsort(table[:, :E], axis=1)  # logical -> its first slot

    def record(number: int, mode: int, chosen: list[tuple[int, int]], lengths: list[int] | None) -> dict[str, Any]:
        ids = np.full((rows, len(chosen), 8), -1)
        for place, layer in enumerate(LAYERS):
            for t, (sequence, position) in enumerate(chosen):
                ids[layer, t, :K] = slot_of[layer][run.experts[sequence][position, place]]
        return {
            "forward_pass_id": 100 + number,
            "rank": 0,
            "gatherer_key": "primary",
            "input_ids": [run.fed[sequence][position] for sequence, position in chosen],
            "positions": [position for _, position in chosen],
            "extend_seq_lens": lengths,
            "forward_mode": mode,
            "topk_ids_of_layer": torch.tensor(ids, dtype=torch.int32),
            "misc_objects": [],
        }

    prompts = [(s, position) for s, tokens in enumerate(run.prompts) for position in range(len(tokens))]
    records = [record(0, 1, prompts, [len(tokens) for tokens in run.prompts])]
    longest = max(len(fed) - len(prompt) for fed, prompt in zip(run.fed, run.prompts, strict=True))
    for step in range(longest):
        running = [(s, len(p) + step) for s, p in enumerate(run.prompts) if len(p) + step < len(run.fed[s])]
        records.append(record(step + 1, 2, running, None))
    return {"records": records, "last_physical_to_logical_map": torch.tensor(table)}


def write_sglang(folder: Path, run: Run) -> list[Path]:
    torch.save(sglang_data(run), folder / "recorder_0.pt")
    return [folder / "recorder_0.pt"]


def write_llama_cpp(folder: Path, run: Run) -> list[Path]:
    """The layout ``pos,layer,id,...``: layer after layer of each batch, prompt positions negative."""
    lines = []
    for prompt, fed, experts in zip(run.prompts, run.fed, run.experts, strict=True):
        P = len(prompt)
        batches = [range(P), *([n] for n in range(P, len(fed)))]
        for batch in batches:
            for place, layer in enumerate(LAYERS):
                for n in batch:
                    ids = ",".join(map(str, experts[n, place]))
                    lines.append(f"{n - P},{layer},{ids}\n")
    (folder / "trace.csv").write_text("".join(lines))
    return [folder / "trace.csv"]


def logits_of(experts: Array, seed: int = 2) -> Array:
    """Logits ``[N, E]`` whose K largest are `experts [N, K]`, in that order."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(len(experts), E)) - 4
    np.put_along_axis(logits, experts, 3 - np.arange(experts.shape[1]) + 0.0 * experts, axis=1)
    return logits.astype(np.float32)


def write_router_logits(folder: Path, run: Run) -> list[Path]:
    """One forward with all sequences, padded on the right."""
    B, S = len(run.fed), max(map(len, run.fed))
    ids, mask = torch.zeros(B, S, dtype=torch.long), torch.zeros(B, S, dtype=torch.long)
    logits = torch.randn(len(LAYERS), B, S, E)
    for b, (fed, experts) in enumerate(zip(run.fed, run.experts, strict=True)):
        ids[b, : len(fed)], mask[b, : len(fed)] = torch.tensor(fed), 1
        for place in range(len(LAYERS)):
            logits[place, b, : len(fed)] = torch.from_numpy(logits_of(experts[:, place]))
    data = {"input_ids": ids, "attention_mask": mask, "router_logits": tuple(x.reshape(B * S, E) for x in logits)}
    torch.save(data, folder / "forward.pt")
    return [folder / "forward.pt"]


WRITERS: dict[str, Callable[[Path, Run], list[Path]]] = {
    "vllm": write_vllm,
    "sglang": write_sglang,
    "llama.cpp": write_llama_cpp,
    "router-logits": write_router_logits,
}


def known(format: str, run: Run, **changes) -> Known:
    """Everything there is to know; token ids only where the format has none."""
    tokens = {"tokens": run.tokens} if format == "llama.cpp" else {}
    return Known(**{"layers": LAYERS, "num_experts": E, "top_k": K, **tokens, **changes})


def in_reading_order(trace: Trace) -> np.ndarray:
    return np.lexsort((trace.column("position"), trace.column("sequence")))


def assert_is(trace: Trace, run: Run) -> None:
    order = in_reading_order(trace)
    assert trace.meta.complete
    assert trace.layers == list(LAYERS)
    assert trace.tokens()[order].tolist() == run.tokens.tolist()
    assert trace.column("position")[order].tolist() == [n for fed in run.fed for n in range(len(fed))]
    assert trace.column("sequence")[order].tolist() == [s for s, fed in enumerate(run.fed) for _ in fed]
    for place, layer in enumerate(LAYERS):
        assert np.array_equal(np.sort(trace.experts(layer)[order]), np.sort(run.all[:, place]))
        assert trace.meta.layer(layer).num_experts == E
        assert trace.meta.layer(layer).top_k == K
        assert np.isfinite(trace.weights(layer)).all()
