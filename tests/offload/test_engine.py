"""The engine: outputs are those of the plain model, whatever the cache holds, predicts, or fails to read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines import Failing, continued, logits, saved
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.decode import Batcher, Request
from collegium.errors import CheckpointError, ConfigError, NonFiniteError
from collegium.offload import model as offload_model
from collegium.offload.cache import Found
from collegium.offload.cost import CostModel
from collegium.offload.geometry import Geometry
from collegium.offload.model import load_offloaded
from collegium.offload.policies import find_policy
from collegium.offload.policies.lru import LRU
from collegium.offload.predictors.base import Moment, Prediction, Predictor
from collegium.offload.prefetch import Prefetch
from collegium.offload.simulate import SimulationSettings, simulate
from collegium.offload.store import pack
from collegium.trace import record_generate
from tiny import families, tiny_inputs

FAMILIES = families(
    "qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "glm4_moe", "nemotron_h", "minimax_m2",
    "phimoe", "qwen2_moe",
)  # fmt: skip


POLICIES = (
    "lru", "lru:scope=global", "lfu", "arc", "hobbit", "edgemoe", "hybrimoe", "moe_infinity", "fate", "expertflow",
)  # fmt: skip

COST = CostModel(read_bandwidth=1e9, read_latency=1e-4, memory_bandwidth=1e10, measured="made up")


class Wrong(Predictor):
    """Expects the experts with the highest numbers, whatever happens."""

    horizon = 2

    def predict(self, moment: Moment) -> list[Prediction]:
        ahead = range(moment.layer + 1, min(moment.layer + 3, self.geometry.num_layers))
        return [Prediction(layer, np.arange(self.geometry.experts[layer], dtype=float)) for layer in ahead]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder, model = saved(family, tmp_path / "model")
    pack(folder, tmp_path / "store", bits=(32,))
    ids = tiny_inputs(model, batch=1, length=9)["input_ids"]
    expected = logits(model, ids)
    for kind in ("exact", "fast"):
        with load_offloaded(tmp_path / "store", experts=4, kind=kind, context=64) as found:
            ours = logits(found.model, ids)
            assert found.counters()["misses"] > 0
        if kind == "exact" and family != "gpt_oss":  # whose matrices lie the other way round in transformers
            assert torch.equal(ours, expected)
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=2e-4)


def test_a_plain_folder_runs_without_packing(tmp_path: Path) -> None:
    folder, model = saved("qwen3_moe", tmp_path / "model")
    ids = tiny_inputs(model, batch=1, length=6)["input_ids"]
    with load_offloaded(folder, experts=4, kind="exact") as found:
        assert torch.equal(logits(found.model, ids), logits(model, ids))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine")
    folder, _ = saved("qwen3_moe", root / "model", num_local_experts=12, num_experts_per_tok=3, num_hidden_layers=3)
    pack(folder, root / "store", bits=(32, 8))
    return root / "store"


@settings(max_examples=12, deadline=None)
@given(
    experts=st.integers(3, 36),
    wrong=st.booleans(),
    scope=st.sampled_from(["layer", "global"]),
    length=st.integers(3, 40),
)
def test_outputs_do_not_depend_on_the_cache(store: Path, experts: int, wrong: bool, scope: Any, length: int) -> None:
    ids = torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(length))
    predictor = (lambda model, geometry: Wrong(geometry)) if wrong else None
    with load_offloaded(store, context=64) as roomy:
        expected = logits(roomy.model, ids)
        assert roomy.counters()["evictions"] == 0
    with load_offloaded(
        store, experts=experts, context=64, policy=LRU(scope), predictor=predictor, prefetch=Prefetch(width=2)
    ) as tight:
        assert torch.equal(logits(tight.model, ids), expected)
        assert tight.engine.pools[32].cache.peak <= experts


@pytest.mark.parametrize("policy", [*POLICIES, "lfu:scope=global", "arc:scope=global"])
@pytest.mark.parametrize("experts", [8, 24])
def test_a_prompt_reads_the_next_layers_experts(store: Path, policy: str, experts: int) -> None:
    ids = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(1))
    outputs, ahead = [], {}
    for prompt in (0, 4):
        settings = {"policy": find_policy(policy), "prefetch": Prefetch(prompt=prompt)}
        with load_offloaded(store, experts=experts, context=64, **settings) as found:
            outputs += [logits(found.model, ids) for _ in range(3)]
            counters, log = found.counters(), found.engine.found
            # nothing of the first layer is read ahead, and nothing twice
            assert log[0, [Found.PREFETCHED, Found.LATE]].sum() == 0
            ahead[prompt] = counters["prefetched"] + counters["late"]
            assert counters["read_prefetch"] + counters["read_demand"] <= log.sum()
    assert ahead[0] == 0
    assert ahead[4] >= 3 * min(4, experts // 8) * (found.engine.geometry.num_layers - 1) - 3
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_lower_bits_are_nearly_the_same_and_smaller(store: Path) -> None:
    from collegium.offload.precision.fixed import Fixed

    ids = torch.arange(3, 20)[None]
    with load_offloaded(store, context=64) as exact, load_offloaded(store, context=64, precision=Fixed(8)) as small:
        a, b = logits(exact.model, ids), logits(small.model, ids)
        assert not torch.equal(a, b)
        assert torch.nn.functional.cosine_similarity(a, b).min() > 0.999
        assert small.counters()["read_bytes"] < exact.counters()["read_bytes"]


def test_a_failed_read_ends_one_pass_only(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Failing(store, lambda layer, expert: False)
    monkeypatch.setattr(offload_model, "open_source", lambda path: source)
    ids = torch.arange(3, 20)[None]
    with load_offloaded(store, experts=6, context=64) as found:
        expected = logits(found.model, ids)
        source.broken = lambda layer, expert: layer == 1
        with pytest.raises(CheckpointError, match="injected: layer 1"):
            logits(found.model, ids)
        source.broken = lambda layer, expert: False
        assert torch.equal(logits(found.model, ids), expected)
        cache = found.engine.pools[32].cache
        assert int((cache.slot >= 0).sum()) <= 6


def test_a_prefetch_that_fails_is_read_again_on_demand(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: dict[tuple[int, int], int] = {}

    def first_time(layer: int, expert: int) -> bool:
        attempts[layer, expert] = attempts.get((layer, expert), 0) + 1
        return expert >= 10 and attempts[layer, expert] == 1

    source = Failing(store, lambda layer, expert: False)
    monkeypatch.setattr(offload_model, "open_source", lambda path: source)
    ids = torch.arange(3, 30)[None]
    with load_offloaded(
        store, experts=24, context=64, predictor=lambda model, geometry: Wrong(geometry), prefetch=Prefetch(width=2)
    ) as found:
        source.broken = first_time
        for at in range(10):
            try:
                found.model(input_ids=ids[:, at : at + 1])
            except CheckpointError:  # one that was not prefetched
                continue
        source.broken = lambda layer, expert: False
        assert torch.isfinite(logits(found.model, ids)).all()
        assert found.counters()["read_failed"] > 0


def test_counters_add_up(store: Path) -> None:
    seen: list[int] = []
    with load_offloaded(store, experts=9, context=64) as found:
        end = found.watch(lambda layer, experts, weights, source: seen.append(int((source == 2).sum())))
        continued(found.model, torch.arange(3, 12)[None], 8)
        end()
        counters = found.counters()
        asked = sum(counters[name] for name in ("hits", "prefetched", "late", "misses"))
        assert counters["misses"] == counters["read_demand"]
        assert sum(seen) >= counters["misses"]
        assert asked == found.engine.found.sum()
        size = found.source.layers[0].layouts[32].nbytes
        assert counters["read_bytes"] == size * counters["misses"]


def test_nan_of_a_router_is_named(store: Path) -> None:
    with load_offloaded(store, context=64) as found:
        gate = found.model.model.layers[1].mlp.gate
        gate.weight.data.fill_(torch.nan)
        with pytest.raises(NonFiniteError, match="layer 1"):
            found.model(input_ids=torch.tensor([[5]]))


def test_too_few_experts_are_refused(store: Path) -> None:
    with pytest.raises(ConfigError, match="too few"):
        load_offloaded(store, experts=2)


def test_context_must_fit_the_model(store: Path) -> None:
    with pytest.raises(ConfigError, match="context of 4000"):
        load_offloaded(store, context=4000)


def test_geometry_counts_moe_layers_only(tmp_path: Path) -> None:
    folder, _ = saved("deepseek_v3", tmp_path / "model")
    with load_offloaded(folder, context=64) as found:
        assert found.engine.geometry == Geometry((8,), (2,), (1,))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("experts", [9, 18])
def test_the_simulator_sees_the_same_events(store: Path, tmp_path: Path, policy: str, experts: int) -> None:
    """Same requests, same places, same victims, prompt and generated tokens, also with more experts than slots. On
    demand only: whether what is read ahead comes in time is up to the disk."""
    ids = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(experts))
    demand = Prefetch(prompt=0)
    with load_offloaded(store, experts=experts, context=64, policy=find_policy(policy), prefetch=demand) as found:
        found.engine.record_events()
        trace = record_generate(found.model, [{"input_ids": ids}], tmp_path / "trace", max_new_tokens=10, logits=True)
        log, nbytes = found.engine.log, found.source.layers[0].layouts[32].nbytes
    assert log is not None
    asked = SimulationSettings(find_policy(policy), experts, {32: nbytes}, prefetch=demand)
    events = simulate(trace, asked, COST, by="recorded").log
    assert len(events) == len(log) > 100
    for column in ("layer", "expert", "found", "evicted", "bytes"):
        assert np.array_equal(events[column], log[column]), column


def test_other_weights_in_8_bits_take_half_the_memory(tmp_path: Path) -> None:
    folder, _ = saved("qwen3_moe", tmp_path / "model", hidden_size=64, tie_word_embeddings=True)
    ids = torch.arange(3, 20)[None]
    with load_offloaded(folder, context=64, kind="float32") as plain:
        expected, weights = logits(plain.model, ids), plain.budget.weights
    with load_offloaded(folder, context=64, kind="float32", dense_bits=8) as small:
        # of one token the rounding changes a choice of experts
        assert torch.nn.functional.cosine_similarity(logits(small.model, ids), expected).median() > 0.999
        assert small.budget.weights < weights / 2
        assert small.model.lm_head.codes is small.model.model.embed_tokens.codes
    with pytest.raises(ConfigError, match="8 bits"):
        load_offloaded(folder, context=64, dense_bits=4)


def test_requests_that_run_together_read_as_if_alone(store: Path) -> None:
    """The batcher over the engine: three requests share passes, and each gets the text it gets alone."""
    prompts = [tuple(range(3, 3 + n)) for n in (5, 9, 14)]
    tokenizer = SimpleNamespace(
        eos_token_id=None, all_special_ids=[], decode=lambda ids, **settings: "".join(map(chr, ids))
    )
    with load_offloaded(store, experts=12, context=64, sequences=3, kind="float32") as found:
        alone = [continued(found.model, torch.tensor([prompt]), 8) for prompt in prompts]
        found.model.generation_config.eos_token_id = []
        batcher = Batcher(found.model, tokenizer, context=64, max_batch=3)
        assert batcher.batched
        streams = [batcher.submit(Request(prompt, max_tokens=8, temperature=0.0)) for prompt in prompts]
        together = [[event.token for event in stream if event.token is not None] for stream in streams]
        batcher.close()
    assert together == alone
