"""The benchmark of shrinking, small: what it makes up is a model, and what it measures is what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from collegium.benchmarks import shrink
from collegium.models.checkpoint import open_checkpoint
from collegium.process import peak_memory


def test_what_it_makes_up_is_a_finite_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrink, "SHARD_BYTES", 20_000)
    shrink.synthesise(tmp_path / "model", 2, E=8, d=32, f=16, vocabulary=64)
    checkpoint = open_checkpoint(tmp_path / "model")
    checkpoint.verify_finite()
    assert len({info.file for info in checkpoint.tensors.values()}) > 1
    report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)[1]
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert [layer.keep for layer in shrink.halve(tmp_path / "model").layers] == [(0, 2, 4, 6)] * 2


def test_rows_hold_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrink, "TURNS", 1)
    monkeypatch.setattr(shrink, "synthesise", partial(shrink.synthesise, E=8, d=32, f=16, vocabulary=64))
    monkeypatch.setattr(shrink, "gemm_rate", lambda dtype: 1e11)
    speed, memory, calibration, peak, size = shrink.run(True, lambda line: None)
    assert speed.goal == 0.7
    assert 0 < speed.ours < 60
    assert speed.peer is not None
    assert (memory.most, memory.unit) == (1.5e9, "bytes")
    assert 5e7 < memory.ours < 1.5e9
    assert calibration.share is not None
    assert 0 < calibration.share < 1
    assert "100 GFLOP/s" in calibration.limit
    assert (peak.most, peak.unit) == (4e9, "bytes")
    assert 5e7 < peak.ours < 4e9
    assert size.met
    assert 1e7 < size.ours < 5e8


def test_operations_are_those_of_olmoe() -> None:
    config = {"hidden_size": 2048, "intermediate_size": 1024, "num_experts_per_tok": 8, "num_hidden_layers": 16}
    active = 16 * (4 * 2048**2 + 8 * 3 * 2048 * 1024)  # 1.07 billion parameters, besides embeddings and norms
    assert shrink._operations(config) == pytest.approx(2 * active, rel=0.03)


def test_peak_memory_is_of_the_process_alone() -> None:
    held = bytearray(os.urandom(1 << 20)) * 600  # as the parent of a benchmark may hold
    program = "from collegium.process import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert peak_memory() > len(held)
    assert 1e6 < int(done.stdout) < len(held)
