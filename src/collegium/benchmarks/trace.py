"""What tracing costs: the same forwards with and without it. Goal: at most 5 percent more time.

The model is OLMoE's architecture at a width where a CPU needs about a second for a batch. Opening and closing the
trace counts too. There is no physical limit to compare with: the forward without a trace is the bound.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from collegium.benchmarks.harness import Row, Say, medians
from collegium.trace import record

__all__ = ["run"]

GOAL = 1 / 1.05  # of the speed without a trace
VOCABULARY = 4096


def run(quick: bool, say: Say) -> Iterator[Row]:
    """Ids and weights alone, which the goal is for, and with logits."""
    model = _model(layers=2 if quick else 8)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(VOCABULARY, (4, 512), generator=generator) for _ in range(4)]
    tokens = sum(ids.numel() for ids in data)
    say(f"{tokens} tokens through {model.config.num_hidden_layers} layers, with and without a trace")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "trace"
        seconds = medians(
            {
                "forward": partial(_forward, model, data),
                "trace": partial(_trace, model, data, out, logits=False),
                "trace with logits": partial(_trace, model, data, out, logits=True),
            },
            repeats=3 if quick else 7,
        )
    limit = f"the forward: {tokens / seconds['forward']:,.0f} tokens/s"
    for name, goal in (("trace", GOAL), ("trace with logits", None)):
        share = seconds["forward"] / seconds[name]
        yield Row(name, seconds[name], seconds["forward"], "forward without a trace", goal, limit, share)


def _model(layers: int) -> OlmoeForCausalLM:
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=512,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=32,
        num_experts_per_tok=4,
        vocab_size=VOCABULARY,
        eos_token_id=0,
        pad_token_id=0,
    )
    return OlmoeForCausalLM(config).eval()


@torch.no_grad()
def _forward(model: OlmoeForCausalLM, data: list[Tensor]) -> None:
    for ids in data:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)


def _trace(model: OlmoeForCausalLM, data: list[Tensor], out: Path, logits: bool) -> None:
    record(model, [{"input_ids": ids} for ids in data], out, logits=logits, overwrite=True)
