"""The sides of the `run` benchmark, each in a process of its own: ours, llama.cpp, and transformers.

All are driven alike: a prompt, then one forward for each token that the plan names, with the best next token taken
from its logits and thrown away. Nothing predicts, so that a table of routings is no help to anybody.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from collegium.offload.store.source import aligned

__all__ = ["LlamaCpp", "Ours", "Side", "Transformers", "drive", "main"]


class Side(Protocol):
    """Something that runs the model."""

    def prompt(self, tokens: list[int]) -> Any:
        """Begin a new sequence with these; the logits ``[V]`` of the token after them."""

    def step(self, token: int) -> Any:
        """Go on with one token; logits ``[V]``."""

    def read(self) -> float:
        """Bytes read from the disk so far, where the side counts them."""


class _Torch:
    """A model of transformers and its cache."""

    model: Any

    def prompt(self, tokens: list[int]) -> Any:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        return self._forward(tokens)

    def step(self, token: int) -> Any:
        return self._forward([token])

    @torch.inference_mode()
    def _forward(self, tokens: list[int]) -> Any:
        ids = torch.tensor([tokens])
        return self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[0, -1]

    def read(self) -> float:
        return 0.0


class Ours(_Torch):
    """The expert store at `path` in so many bytes."""

    def __init__(self, path: Path, context: int, memory: int | None) -> None:
        from collegium.offload.model import load_offloaded

        self.loaded = load_offloaded(path, memory=memory, context=context, dense_bits=8)
        self.model = self.loaded.model

    def prompt(self, tokens: list[int]) -> Any:
        from collegium.decode.kv import kv_cache  # what our server keeps keys and values in

        self.cache = kv_cache(self.model.config)
        return self._forward(tokens)

    def read(self) -> float:
        return self.loaded.counters()["read_bytes"]


class Transformers(_Torch):
    """The same weights in bfloat16, the experts dequantised."""

    def __init__(self, path: Path, context: int, memory: int | None, dtype: torch.dtype = torch.bfloat16) -> None:
        from safetensors.torch import load_file
        from transformers import OlmoeConfig, OlmoeForCausalLM

        from collegium.experts.stored import dequantise, quantise
        from collegium.offload.store import open_source

        config = OlmoeConfig.from_pretrained(path)
        with torch.device("meta"):
            model = OlmoeForCausalLM(config).to(dtype)
        model.to_empty(device="cpu")
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        weights = dict(model.named_parameters())
        for file in path.glob("model-*.safetensors"):
            for name, value in load_file(file).items():
                # the other sides hold these matrices in 8 bits
                rounded = value.dim() == 2 and not name.endswith("mlp.gate.weight")
                weights[name].data.copy_(dequantise(*quantise(value, 8), 8) if rounded else value)
        source = open_source(path)
        for index, layer in enumerate(source.layers):
            [(bits, layout)] = layer.layouts.items()
            record = aligned(layout.nbytes)
            for number in range(layer.num_experts):
                source.read(index, number, bits, record)
                matrices = layout.read(torch.from_numpy(record))
                weights[f"{layer.path}.experts.gate_up_proj"].data[number].copy_(matrices["up"])
                weights[f"{layer.path}.experts.down_proj"].data[number].copy_(matrices["down"])
        source.close()
        self.model = model.eval()


class LlamaCpp:
    """The GGUF file at `path`, mapped into memory as llama.cpp does."""

    def __init__(self, path: Path, context: int, memory: int | None) -> None:
        from llama_cpp import Llama  # an extra

        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        settings = {"n_ctx": context, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
        self.llama = Llama(str(path), n_batch=512, n_ubatch=512, **settings)

    def prompt(self, tokens: list[int]) -> Any:
        self.llama.reset()
        return self._eval(tokens)

    def step(self, token: int) -> Any:
        return self._eval([token])

    def _eval(self, tokens: list[int]) -> Any:
        self.llama.eval(tokens)
        logits = self.llama._ctx.get_logits_ith(-1)
        return np.ctypeslib.as_array(logits, shape=(self.llama.n_vocab(),))

    def read(self) -> float:
        return 0.0


SIDES: dict[str, Callable[[Path, int, int | None], Side]] = {
    "ours": Ours,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
}


def drive(
    side: Side, plan: dict[str, Any], begin: Callable[[str, str], None] = lambda run, stage: None
) -> dict[str, Any]:
    """Time a side.

    Args:
        plan: "runs" is a list of "name", "prompt" (token ids), "prompts" (how often it is timed, after one time that
            is not), "warm" and "decode" (token ids, not timed and timed).
        begin: told the name of a run and which stage of it begins: "prompt", "warm" or "decode".

    Returns:
        For each run by name: seconds of each prompt and each token, bytes read in them on average, and the best next
        token after each.
    """
    found = {}
    for run in plan["runs"]:
        begin(run["name"], "prompt")
        side.prompt(run["prompt"])
        start = side.read()
        prompts = [_timed(lambda: side.prompt(run["prompt"]))[0] for _ in range(run["prompts"])]  # noqa: B023
        prompt_read = (side.read() - start) / max(run["prompts"], 1)
        begin(run["name"], "warm")
        for token in run["warm"]:
            side.step(token)
        begin(run["name"], "decode")
        start = side.read()
        steps = [_timed(lambda: side.step(token)) for token in run["decode"]]  # noqa: B023
        found[run["name"]] = {
            "prompt": prompts,
            "decode": [seconds for seconds, _ in steps],
            "best": [best for _, best in steps],
            "prompt_read": prompt_read,
            "decode_read": (side.read() - start) / max(len(steps), 1),
        }
    return found


def _timed(call: Callable[[], Any]) -> tuple[float, int]:
    """Seconds until the best next token is known, and that token."""
    start = time.perf_counter()
    best = int(call().argmax())
    return time.perf_counter() - start, best


def main(name: str, plan_file: str) -> None:
    """Drive a side as a process; the last line on standard output is what `drive` found. Of ours a "record" in the plan
    names the file for `_run_simulated` and the cost model that it is based on."""
    plan = json.loads(Path(plan_file).read_text())
    start = time.perf_counter()
    side = SIDES[name](Path(plan["path"]), plan["context"], plan["memory"])
    loading = time.perf_counter() - start
    if name == "ours" and plan.get("record"):
        from collegium.benchmarks._run_simulated import Recording
        from collegium.offload.cost import CostModel

        recording = Recording(side.loaded, CostModel.model_validate(plan["record"]["cost"]))  # type: ignore[attr-defined]
        found = drive(side, plan, recording)
        recording.save(Path(plan["record"]["file"]))
    else:
        found = drive(side, plan)
    sys.stdout.write(json.dumps({"loading": loading, **found}) + "\n")
    sys.stdout.flush()
    os._exit(0)  # what a side does while Python ends is not measured, and must not fail it
