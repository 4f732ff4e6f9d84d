"""Claims about how an MoE block is put together."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import pytest

pytestmark = pytest.mark.claim


def test_a_shared_expert_helps_at_equal_size(experiment: Callable, claim: Callable) -> None:
    """DeepSeekMoE (2024): at equal parameters and compute, making one of the active experts a shared one helps."""
    routed = experiment("moe.num_experts_per_tok=4")
    shared = experiment("moe.num_experts=15", "moe.num_experts_per_tok=3", "moe.n_shared_experts=1")
    bits = [o.bits_per_byte for o in routed], [o.bits_per_byte for o in shared]
    claim(
        "layer/shared_experts",
        mean(bits[1]) < mean(bits[0]),
        "bits per byte "
        + ", ".join(
            f"{name} {mean(b):.3f} ({min(b):.3f} to {max(b):.3f})"
            for name, b in (("3 of 15 and 1 shared", bits[1]), ("4 of 16 routed", bits[0]))
        )
        + "; 3 seeds",
    )
