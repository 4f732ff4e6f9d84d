"""The run that claim experiments change."""

from __future__ import annotations

from typing import Any

__all__ = ["BASE", "SEEDS"]

SEEDS = (0, 1, 2)

BASE: dict[str, Any] = {
    "model": {
        "family": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "moe": {
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "balance": {"load_balancing": 0.01, "scope": "global"},
    },
    "data": {"corpus": "local", "vocab_size": 1024, "sequence_length": 128},
    "optim": {"lr": 3.0e-3},
    "schedule": {"name": "cosine", "warmup": 0.05},
    "run": {"steps": 400, "batch_size": 32, "log_every": 100},
}
"""A model that learns something in half a minute on two cores: 1.6M tokens of nine domains."""
