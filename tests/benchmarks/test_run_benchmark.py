"""The benchmark of running: both sides get one function, routing follows its table, limits hold, rows carry goals."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from collegium.benchmarks import _run_capped, _run_policies, harness, run
from collegium.benchmarks._run_capped import run_capped, why_not
from collegium.benchmarks._run_files import make
from collegium.benchmarks._run_limits import decode_bytes, disk_rate, prompt_operations
from collegium.benchmarks._run_model import Shape, expert, float32, tensor, tensors
from collegium.benchmarks._run_routing import demo_trace, replayed, routing_table
from collegium.benchmarks._run_sides import LlamaCpp, Ours, Transformers, drive
from collegium.errors import ConfigError
from collegium.offload.store import open_source
from collegium.offload.store.source import aligned

SMALL = Shape(layers=2, d=256, f=96, E=32, K=4, heads=4, vocabulary=512)
TEXT = 48  # token ids below that are a text


@pytest.fixture(scope="module", params=[8, 4])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Shape, Any, Path]:
    pytest.importorskip("gguf")
    folder, shape = tmp_path_factory.mktemp("run"), replace(SMALL, bits=request.param)
    table = routing_table(shape, TEXT)
    make(shape, table, folder / "store", folder / "model.gguf")
    return shape, table, folder


def test_experts_are_the_same_numbers_in_both_files(files: tuple[Shape, Any, Path]) -> None:
    gguf = pytest.importorskip("gguf")
    shape, _, folder = files
    held = {one.name: one for one in gguf.GGUFReader(folder / "model.gguf").tensors}
    source = open_source(folder / "store")
    record = aligned(shape.layout.nbytes)
    for layer, number in ((0, 0), (1, 31)):
        source.read(layer, number, shape.bits, record)
        ours = {name: value.numpy() for name, value in shape.layout.read(torch.from_numpy(record)).items()}
        peer = {}
        for name in ("gate", "up", "down"):
            stored = held[f"blk.{layer}.ffn_{name}_exps.weight"]
            assert stored.tensor_type.name == {8: "Q8_0", 4: "Q4_0"}[shape.bits]
            peer[name] = gguf.dequantize(stored.data[number], stored.tensor_type)
        np.testing.assert_array_equal(np.concatenate([peer["gate"], peer["up"]]), ours["up"])
        np.testing.assert_array_equal(peer["down"], ours["down"])
        assert not ours["down"][: shape.code].any()
        assert ours["down"][shape.code :].std() > 0.01
    source.close()


def test_all_sides_compute_one_function(files: tuple[Shape, Any, Path]) -> None:
    pytest.importorskip("llama_cpp")
    _, _, folder = files
    oracle = Transformers(folder / "store", 128, None, torch.float32)
    ours, peer = Ours(folder / "store", 128, None), LlamaCpp(folder / "model.gguf", 128, None)
    prompt = [*range(40), *range(100, 120)]
    for call in (lambda side: side.prompt(prompt), lambda side: side.step(44), lambda side: side.step(300)):
        want, got, other = (torch.as_tensor(call(side)).float().clone() for side in (oracle, ours, peer))
        assert torch.cosine_similarity(want, got, dim=0) > 0.999
        assert torch.cosine_similarity(want, other, dim=0) > 0.999
    assert ours.read() > 0
    ours.loaded.close()
    peer.llama.close()


def test_routing_follows_the_table_whatever_stands_before(files: tuple[Shape, Any, Path]) -> None:
    shape, table, folder = files
    side = Transformers(folder / "store", 128, None)
    seen: dict[int, Any] = {}
    for layer, block in enumerate(side.model.model.layers):
        block.mlp.gate.register_forward_hook(lambda gate, args, out, layer=layer: seen.update({layer: out[2].numpy()}))
    prompt = np.random.default_rng(1).permutation(shape.vocabulary)[:100].tolist()
    for tokens, call in ((prompt, lambda: side.prompt(prompt)), ([7], lambda: side.step(7))):
        call()
        for layer in range(shape.layers):
            np.testing.assert_array_equal(seen[layer], table[tokens, layer])


def test_replayed_routing_is_that_of_the_demo_model(tmp_path: Path) -> None:
    found = replayed(SMALL, TEXT)
    assert found.shape == (TEXT, 2, 4)
    trace = demo_trace("argparse", TEXT, tmp_path / "trace")
    for layer, number in enumerate(trace.layers[:2]):
        np.testing.assert_array_equal(found[:, layer, ::2] // 2, trace.experts(number))
        np.testing.assert_array_equal(found[:, layer, 1::2], found[:, layer, ::2] + 1)
    table = routing_table(SMALL, TEXT)
    np.testing.assert_array_equal(table[:TEXT], found)
    assert (np.sort(table, 2)[:, :, 1:] > np.sort(table, 2)[:, :, :-1]).all(), "no token gets an expert twice"
    assert np.bincount(table[TEXT:].ravel(), minlength=32).min() > 50


def test_shapes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="512 of 256 coordinates"):
        Shape(layers=8, d=256, f=96, E=64)
    with pytest.raises(ConfigError, match="cannot stand for 32 experts, 8 a token"):
        replayed(replace(SMALL, K=8), TEXT)


def test_weights_are_finite_and_leave_the_routing_alone() -> None:
    table = np.zeros((SMALL.vocabulary, SMALL.layers, SMALL.K), np.int64) + np.arange(SMALL.K)
    for name, size in tensors(SMALL):
        values = float32(tensor(SMALL, name, table))
        assert values.shape == size
        assert np.isfinite(values).all()
        if name.endswith("o_proj.weight"):
            assert not values[: SMALL.code].any()
        if "embed" in name:
            assert set(np.unique(values[:, : SMALL.code])) == {0, 1.5, 1.4375, 1.375, 1.3125}
    assert abs(expert(SMALL, 0, 0)["up"].astype(int)).max() <= 127


class _Counting:
    """A side whose calls are noted; a step reads 5 bytes, a prompt 100."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.bytes = 0.0

    def prompt(self, tokens: list[int]) -> Any:
        self.calls.append(tokens)
        self.bytes += 100
        return np.array([0.0, 2.0, 1.0])

    def step(self, token: int) -> Any:
        self.calls.append(token)
        self.bytes += 5
        return np.eye(3)[token]

    def read(self) -> float:
        return self.bytes


def test_drive_times_what_the_plan_says() -> None:
    side = _Counting()
    plan = {"runs": [{"name": "a", "prompt": [8, 9], "prompts": 2, "warm": [0], "decode": [1, 2]}]}
    found = drive(side, plan)["a"]
    assert side.calls == [[8, 9]] * 3 + [0, 1, 2]
    assert [len(found[kind]) for kind in ("prompt", "decode")] == [2, 2]
    assert (found["best"], found["prompt_read"], found["decode_read"]) == ([1, 2], 100, 5)


HOLD = "import sys; held = b'x' * int(float(sys.argv[1])); print(len(held))"


def _command(nbytes: float) -> list[str]:
    return [sys.executable, "-S", "-c", HOLD, str(nbytes)]


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_capped_command_is_measured_and_ends_at_its_limit() -> None:
    done = run_capped(_command(6e7), 200 << 20)
    assert done.output == "60000000\n"
    assert 6e7 < done.peak < 1.2e8
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_capped(_command(5e8), 200 << 20)
    assert error.value.returncode in (-9, 137)
    assert not list(_run_capped.ROOT.rglob("collegium-bench-*/cgroup.procs"))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_machine_without_groups_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    if version == "v1":
        (tmp_path / "memory").mkdir()
        (tmp_path / "memory" / "memory.limit_in_bytes").touch()
    monkeypatch.setattr(_run_capped, "ROOT", tmp_path / "absent" if version == "v2" else tmp_path)
    monkeypatch.setattr(_run_capped, "_remove", lambda folder: None)
    assert "memory cgroup" in str(why_not())
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"x" * 1000)
    [row] = run._capped(run._Files(SMALL, tmp_path, gguf, 1e10, 1e11), 0.5, print)
    assert math.isnan(row.ours)
    assert (row.met, row.record()["ours"]) == (None, None)
    assert "not measured" in row.limit
    assert harness.cost(row.ours, row.unit) == harness.cost(None, "s") == "not measured"


def test_limits_are_plausible(files: tuple[Shape, Any, Path]) -> None:
    shape, _, folder = files
    assert 1e6 < disk_rate(folder / "store", shape, 0.05) < 1e11
    assert decode_bytes(Shape()) == pytest.approx(16 * (8 * 6.29e6 + 4 * 2048**2) + 50304 * 2048, rel=0.01)
    assert prompt_operations(Shape(), 512) == pytest.approx(2 * 512 * 1.07e9, rel=0.05)


FOUND = {
    side: {
        routing: {
            "prompt": [seconds * 4, 9.0, seconds * 4],
            "decode": [seconds, 50.0, seconds / 2],
            "best": [1, 2, 3],
            "prompt_read": 4e9,
            "decode_read": 1e9,
        }
        for routing in ("random", "replayed")
    }
    for side, seconds in (("ours", 0.5), ("llama.cpp", 1.5), ("transformers", 2.0))
}


def test_rows_hold_the_goals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def fake_make(shape: Shape, table: Any, store: Path, gguf: Path) -> None:
        made.append(shape.bits)
        gguf.write_bytes(b"x" * 1000)

    def predicted(file: Path, measured: Any, words: dict[str, str]) -> Iterator[harness.Row]:
        assert measured is FOUND["ours"]
        for name, word in words.items():
            yield harness.Row(f"simulated decode, {word}", 0.5, measured[name]["decode"][0], within=0.15)

    monkeypatch.setattr(run, "SHAPE", SMALL)
    monkeypatch.setattr(run, "_PEER", ())  # nothing of it runs here
    monkeypatch.setattr(run, "make", fake_make)
    monkeypatch.setattr(run, "routing_table", lambda shape, tokens: None)
    monkeypatch.setattr(run, "memory_bandwidth", lambda: 1e10)
    monkeypatch.setattr(run, "gemm_rate", lambda dtype: 1e11)
    monkeypatch.setattr(run, "disk_rate", lambda store, shape: 4e9)
    monkeypatch.setattr(run, "why_not", lambda: None)
    monkeypatch.setattr(run, "_fits", lambda shape: True)
    monkeypatch.setattr(run, "hit_rates", lambda tokens: iter(()))
    monkeypatch.setattr(run, "_process", lambda side, files, plan: FOUND[side])
    monkeypatch.setattr(run, "predicted", predicted)
    monkeypatch.setattr(run, "_process_capped", lambda side, files, plan, limit: (FOUND[side], limit - 1))
    rows = {row.name: row for row in run.run(False, lambda line: None)}
    assert made == [8, 4]
    goals = {name: row.goal for name, row in rows.items()}
    assert goals == {
        "decode, 8 bits in memory": 1.0,
        "prefill 512, 8 bits in memory": 1.5,
        "decode, 8 bits, transformers' bfloat16": None,
        "prefill 512, 8 bits, transformers' bfloat16": None,
        "decode, 8 bits in 50%, random routing": 2.2,
        "decode, 8 bits in 50%, replayed routing": 3.0,
        "prefill 512, 8 bits in 50%": 2.0,
        "simulated decode, 8 bits in 50%, random routing": None,
        "simulated decode, 8 bits in 50%, replayed routing": None,
        "peak memory, 8 bits in 50%": None,
        "decode, 8 bits in 28%, random routing": 12.0,
        "decode, 8 bits in 28%, replayed routing": 15.0,
        "prefill 512, 8 bits in 28%": 2.0,
        "simulated decode, 8 bits in 28%, random routing": None,
        "simulated decode, 8 bits in 28%, replayed routing": None,
        "peak memory, 8 bits in 28%": None,
        "decode, 4 bits in memory": 1.0,
        "prefill 512, 4 bits in memory": 1.5,
    }
    row = rows["decode, 8 bits in 50%, random routing"]
    assert (row.ours, row.peer, row.ratio, row.met) == (0.5, 1.5, 3.0, True)
    assert row.share == pytest.approx(0.25 / 0.5)  # 1 GB at 4 GB/s
    assert rows["decode, 8 bits in 28%, random routing"].met is False
    assert (rows["peak memory, 8 bits in 28%"].most, rows["peak memory, 8 bits in 28%"].met) == (280, True)
    assert [row.name for row in run.run(True, lambda line: None) if "50%" in row.name] == []


def test_tokens_of_a_plan_are_routed_as_it_says() -> None:
    random, text = run._plan(("random", "replayed"))["runs"]
    length = run.PROMPT + run.WARM + run.DECODE
    assert text["prompt"] + text["warm"] + text["decode"] == list(range(length))
    assert min(random["prompt"] + random["warm"] + random["decode"]) == length


def test_hit_rates_are_below_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_run_policies, "TEXTS", ("argparse",))
    rows = list(_run_policies.hit_rates(40))
    assert {"hit rate, lru", "hit rate, lfu", "hit rate, hobbit"} <= {row.name for row in rows}
    assert "hit rate, opt" not in {row.name for row in rows}
    assert [row.goal for row in rows] == [0.9] + [None] * (len(rows) - 1)
    rates = [row.ours for row in rows]
    assert rates == sorted(rates, reverse=True)
    for row in rows:
        assert row.peer is not None
        assert 0 < row.ours <= row.peer
        assert row.ratio == pytest.approx(row.share)


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_all_of_it_on_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    for name, value in {"PROMPT": 24, "WARM": 2, "DECODE": 4, "PROMPTS": 1, "TURNS": 1, "CONTEXT": 64}.items():
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(run, "SHAPE", replace(SMALL, f=128))
    monkeypatch.setattr(run, "CAPPED_GOALS", {0.5: run.CAPPED_GOALS[0.5]})
    monkeypatch.setattr(run, "_limit", lambda share, files: 2 << 30)
    monkeypatch.setattr(run, "hit_rates", lambda tokens: iter(()))
    rows = list(run.run(False, lambda line: None))
    assert len(rows) == 12
    assert [row.name for row in rows if row.within is not None] == [
        "simulated decode, 8 bits in 50%, random routing",
        "simulated decode, 8 bits in 50%, replayed routing",
    ]
    assert all(0 < row.ours < (2 << 30) for row in rows)
    assert all(row.share is None or 0 < row.share < 2 for row in rows)
