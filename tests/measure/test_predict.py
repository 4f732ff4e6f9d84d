"""Predictors on routing that one of them knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from collegium.errors import TraceError
from collegium.layer import MoE
from collegium.measure.predict import PREDICTORS, predictability
from collegium.trace import Trace, record
from measure_traces import make_trace
from tiny import tiny_model

DOCUMENTS, LENGTH = 12, 25
N = DOCUMENTS * LENGTH
SEQUENCES = np.arange(N) // LENGTH
PLACE = np.arange(N) % LENGTH


def recall(trace: Trace, layer: int = -1, **settings: Any) -> dict[str, float]:
    return {name: float(found) for name, found in predictability(trace, **settings)[layer].recall.items()}


def test_frequency(tmp_path: Path) -> None:
    expert = np.where(PLACE % 5 == 0, 3, 1)
    found = recall(make_trace(tmp_path / "t", {0: expert[:, None]}, 4, sequences=SEQUENCES))
    assert found["frequency"] == pytest.approx(0.8)
    assert found["token id"] == pytest.approx(0.8)  # every id is met once, so nothing is known of it
    assert found["previous token"] == pytest.approx(15 / 25)  # every 3 is missed, and what follows it
    assert "previous layer" not in found
    assert "gate input" not in found


def test_previous_token(tmp_path: Path) -> None:
    """Each document has two experts of its own: only its first token cannot be known."""
    home = np.random.default_rng(0).permutation(2 * DOCUMENTS)
    experts = np.stack([home[2 * SEQUENCES], home[2 * SEQUENCES + 1]], 1)
    found = recall(make_trace(tmp_path / "t", {0: experts}, 2 * DOCUMENTS, sequences=SEQUENCES, part_rows=1000))
    assert found["previous token"] == pytest.approx((LENGTH - 1) / LENGTH)
    assert found["frequency"] == 0  # experts of the fitted documents
    assert found["token id"] == 0


def test_a_short_previous_token_is_filled_up_by_frequency(tmp_path: Path) -> None:
    experts = np.stack([np.zeros(N, int), np.where(PLACE % 2, 4, 2)], 1)  # 0 2 | 0 | 0 2 | 0 ...
    found = recall(make_trace(tmp_path / "t", {0: experts}, 4, sequences=SEQUENCES))
    assert found["previous token"] == 1


def test_token_id(tmp_path: Path) -> None:
    token = np.random.default_rng(0).integers(0, 6, N)
    experts = np.stack([token, token + 6], 1)
    found = recall(make_trace(tmp_path / "t", {0: experts}, 12, tokens=token, sequences=SEQUENCES))
    assert found["token id"] == 1
    assert found["frequency"] < 0.5


def test_previous_layer_with_other_sizes_and_ragged_tokens(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 5, N)
    second = np.stack([first, np.where(first % 2, first + 5, 10)], 1)  # some tokens have one expert
    trace = make_trace(tmp_path / "t", {1: first[:, None], 4: second}, {1: 5, 4: 10}, sequences=SEQUENCES)
    before, found = predictability(trace)
    assert "previous layer" not in before.recall
    assert found.recall["previous layer"].value == 1
    assert found.recall["previous layer"].low == 1
    assert (before.even, found.even) == (pytest.approx(0.2), pytest.approx(0.2))
    assert found.recall["frequency"].value < 0.5
    assert list(found.summary()) == ["layer", "by chance", *PREDICTORS]


def test_random_routing_is_guessed_by_chance_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sequence = np.arange(6000) // 100
    experts = {layer: np.stack([rng.permutation(8)[:2] for _ in range(6000)]) for layer in (0, 1)}
    trace = make_trace(tmp_path / "t", experts, 8, tokens=rng.integers(0, 20, 6000), sequences=sequence, part_rows=8192)
    for name, found in recall(trace).items():
        assert found == pytest.approx(0.25, abs=0.03), name


def test_one_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="one document"):
        predictability(make_trace(tmp_path / "t", {0: [[0]]}, 2))


class _Block(nn.Module):
    def __init__(self, norm: nn.Module | None) -> None:
        super().__init__()
        if norm is not None:
            self.norm = norm
        self.mlp = MoE(16, 8, 8, 2)
        nn.init.normal_(self.mlp.gate.weight)


class _Shifted(nn.Module):
    """A norm that multiplies by 1 + weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (16,)) * (1 + self.weight)


class _Toy(nn.Module):
    """Two MoE blocks at layers.0.mlp and layers.1.mlp that see the same stream."""

    def __init__(self, norm: type[nn.Module] | None) -> None:
        super().__init__()
        sizes: dict[Any, Any] = {nn.RMSNorm: (16,), nn.LayerNorm: (16,)}
        make = (lambda: norm(*([sizes[norm]] if norm in sizes else []))) if norm else (lambda: None)
        self.layers = nn.ModuleList([_Block(make()) for _ in range(2)])
        for name, weight in self.named_parameters():
            if "norm" in name:
                nn.init.normal_(weight, mean=1.0 if name.endswith("weight") else 0.0, std=0.5)


@torch.no_grad()
def toy_trace(folder: Path, model: _Toy) -> Trace:
    stream = torch.randn(40, 16)
    inputs = [block.norm(stream) if hasattr(block, "norm") else stream for block in model.layers]
    chosen = [block.mlp.gate(x).index_TK.numpy() for block, x in zip(model.layers, inputs, strict=True)]
    return make_trace(
        folder, dict(enumerate(chosen)), 8, gate_inputs={n: x.numpy() for n, x in enumerate(inputs)},
        sequences=np.arange(40) // 5, part_rows=16,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("norm", "treated"),
    [(None, "raw"), (nn.RMSNorm, "corrected"), (nn.LayerNorm, "corrected"), (_Shifted, "corrected")],
)
def test_gate_input_through_the_norms(tmp_path: Path, norm: type[nn.Module] | None, treated: str) -> None:
    """Where nothing happens between two layers, the next router is guessed exactly: with the weights of the norms."""
    torch.manual_seed(0)
    model = _Toy(norm)
    first, second = predictability(toy_trace(tmp_path / "t", model), model)
    assert first.gate_input_norm is None
    assert "gate input" not in first.recall
    assert second.gate_input_norm == treated
    assert second.recall["gate input"].value == pytest.approx(1, abs=0.01)
    assert second.recall["previous layer"].value < 0.9


def test_another_model_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Toy(None)
    trace = toy_trace(tmp_path / "t", model)
    model.layers[1].mlp = MoE(16, 8, 4, 2)
    with pytest.raises(TraceError, match=r"layer 1 is 'layers\.1\.mlp' with 8 experts"):
        predictability(trace, model)
    del model.layers[1]
    with pytest.raises(TraceError, match="no MoE block there"):
        predictability(trace, model)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_gate_input_of_real_families(tmp_path: Path, family: str) -> None:
    """Attention and experts that put out nothing leave the stream as it is: the guess is right."""
    model = tiny_model(family, num_hidden_layers=3)
    for name, weight in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            nn.init.zeros_(weight)
        if "norm" in name and weight.dim() == 1:
            nn.init.uniform_(weight, 0.5, 2)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(3, vocabulary, (8, 12))
    trace = record(model, [{"input_ids": ids}], tmp_path / "t", gate_inputs=0.8)
    found = predictability(trace, model)[1]
    assert found.gate_input_norm == "corrected"
    assert found.recall["gate input"].value > 0.99
