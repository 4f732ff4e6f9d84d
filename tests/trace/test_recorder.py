"""Recording: the trace holds what the model's own routers gave out, and recording changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from collegium.errors import ConfigError, NonFiniteError, NotMoEError, TraceError, UnsupportedFamilyError
from collegium.routing import Routing
from collegium.sites import Site, SwitchOff, sites, tap
from collegium.trace import LayerMeta, Trace, record, record_generate
from collegium.trace.rows import layer_rows
from tiny import families, tiny_model

LENGTH = 10


def batches(count: int = 3, padded: bool = True, left: bool = False) -> list[dict[str, Tensor]]:
    """Batches of two sequences; the second has four tokens of padding."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        mask = torch.ones(2, LENGTH, dtype=torch.long)
        if padded:
            mask[1, slice(0, 4) if left else slice(LENGTH - 4, LENGTH)] = 0
        ids = torch.randint(3, 64, (2, LENGTH), generator=generator)
        found.append({"input_ids": ids, "attention_mask": mask, "domain": torch.tensor([0, 1])})
    return found


def columns(trace: Trace) -> dict[str, Any]:
    frame = trace.scan().collect()
    return {name: frame[name].to_list() for name in frame.columns}


class Oracle:
    """Hooks on gates and experts themselves: ``(logits, weights, index)`` of every forward, padding included."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.inputs: dict[int, list[Tensor]] = {}
        for site in sites(model):
            self.hook(site)

    def hook(self, site: Site) -> None:
        logits: list[Tensor] = []

        def decide(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            outputs = [output] if isinstance(output, Tensor) else output
            logits.append(next(t for t in outputs if t.shape[-1] == site.num_experts).detach().clone())
            self.inputs.setdefault(site.layer, []).append(args[0].detach().reshape(-1, args[0].shape[-1]).clone())

        def told(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            _, index, weights = (t.detach().clone() for t in args)
            self.seen.setdefault(site.layer, []).append((logits.pop(), weights, index))

        site.gate.register_forward_hook(decide)
        site.experts.register_forward_pre_hook(told)


@pytest.mark.parametrize(
    "family", families("qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "minimax_m2", "phimoe")
)
def test_a_trace_is_what_the_gates_gave_out(family, tmp_path):
    model = tiny_model(family)
    oracle = Oracle(model)
    data = batches()
    trace = record(model, data, tmp_path / "t", domains=["a", "b"], logits=True, gate_inputs=0.4)
    real = torch.cat([batch["attention_mask"].reshape(-1) for batch in data]).bool()
    assert len(trace) == int(real.sum())
    assert trace.layers == list(oracle.seen)
    parts = list(trace.iter_parts())
    for layer, calls in oracle.seen.items():
        logits, weights, index = (torch.cat(tensors)[real] for tensors in zip(*calls, strict=True))
        assert np.array_equal(trace.experts(layer), index.numpy())
        assert np.array_equal(trace.weights(layer), weights.to(torch.float16).numpy())
        assert np.array_equal(np.concatenate([p.logits(layer) for p in parts]), logits.to(torch.float16).numpy())
        rows, x = (np.concatenate(found) for found in zip(*(p.gate_inputs(layer) for p in parts), strict=True))
        assert 0 < len(rows) < len(trace)
        assert np.array_equal(x, torch.cat(oracle.inputs[layer])[real][rows].numpy())
    assert trace.tokens().tolist() == torch.cat([b["input_ids"].reshape(-1) for b in data])[real].tolist()
    assert trace.column("domain").tolist() == ([0] * 10 + [1] * 6) * 3
    assert trace.column("step").tolist() == [step for step in range(3) for _ in range(16)]
    assert trace.column("sequence").tolist() == [2 * s + i for s in range(3) for i in [0] * 10 + [1] * 6]


@pytest.mark.parametrize("family", ["llama4_text", "gemma4_text", "nemotron_h", "qwen3_5_moe_text"])
def test_families_off_the_beaten_path_are_recorded_too(family, tmp_path):
    model = tiny_model(family)
    trace = record(model, batches(1), tmp_path, domains=["a", "b"])
    for layer in trace.layers:
        experts = trace.experts(layer)
        assert experts.shape == (16, trace.meta.layer(layer).top_k)
        assert (np.sort(experts, axis=1)[:, 1:] != np.sort(experts, axis=1)[:, :-1]).all(), "an expert twice"


def test_recording_changes_nothing(tmp_path):
    model = tiny_model("qwen3_moe").train()
    data = batches(1)
    inputs = {name: data[0][name] for name in ("input_ids", "attention_mask")}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    model.eval()
    before = model(**inputs).logits
    model.train()
    record(model, data, tmp_path, domains=["a", "b"])
    assert model.training
    model.eval()
    assert torch.equal(model(**inputs).logits, before)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert all(p.grad is None for p in model.parameters())


def test_an_earlier_taps_decision_is_what_is_recorded(tmp_path):
    model = tiny_model("qwen3_moe")
    site = sites(model)[0]
    with tap(model, SwitchOff({site.path: [0, 1, 2]})):
        trace = record(model, batches(2), tmp_path, domains=["a", "b"])
    assert trace.counts(site.layer)[:3].sum() == 0


def test_positions_count_real_tokens(tmp_path):
    trace = record(tiny_model("olmoe"), batches(1, left=True), tmp_path / "a", domains=["a", "b"])
    assert trace.column("position").tolist() == [*range(10), *range(6)]
    packed = {
        "input_ids": torch.randint(3, 64, (1, 6)),
        "position": torch.tensor([[0, 1, 2, 0, 1, 2]]),
        "document": torch.tensor([[4, 4, 4, 7, 7, 7]]),
        "sequence": torch.tensor([9]),
    }
    trace = record(tiny_model("olmoe"), [packed], tmp_path / "b")
    assert trace.column("position").tolist() == [0, 1, 2, 0, 1, 2]
    assert trace.documents().tolist() == [4, 4, 4, 7, 7, 7]
    assert trace.column("sequence").tolist() == trace.column("request").tolist() == [9] * 6


def interrupted(data: list[dict[str, Tensor]], after: int) -> Iterator[dict[str, Tensor]]:
    yield from data[:after]
    raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 3])
def test_resuming_gives_the_trace_of_an_uninterrupted_run(tmp_path, after):
    model, data = tiny_model("qwen3_moe"), batches(5)
    whole = record(model, data, tmp_path / "whole", domains=["a", "b"], gate_inputs=0.5)
    with pytest.raises(KeyboardInterrupt):
        record(model, interrupted(data, after), tmp_path / "cut", domains=["a", "b"], gate_inputs=0.5)
    assert not Trace.open(tmp_path / "cut").meta.complete
    told: list[int] = []
    resumed = record(
        model, data, tmp_path / "cut", domains=["a", "b"], gate_inputs=0.5, resume=True, progress=told.append
    )
    assert sum(told) == len(whole) - 16 * after
    assert columns(resumed) == columns(whole)
    assert resumed.meta.complete


def test_a_run_that_fails_before_its_first_batch_leaves_nothing(tmp_path):
    model = tiny_model("qwen3_moe")
    with pytest.raises(KeyboardInterrupt):
        record(model, interrupted(batches(1), 0), tmp_path / "t")
    assert not (tmp_path / "t").exists()
    assert len(record(model, batches(1), tmp_path / "t", domains=["a", "b"], resume=True)) == 16
    assert len(record(model, [], tmp_path / "empty")) == 0


def test_resuming_inside_a_batch_and_for_more_tokens(tmp_path):
    model, data = tiny_model("qwen3_moe"), batches(4)
    whole = record(model, data, tmp_path / "whole", domains=["a", "b"])
    for limit in (5, 21, 21, 40):
        part = record(model, data, tmp_path / "part", domains=["a", "b"], max_tokens=limit, resume=True)
        assert len(part) == limit
    resumed = record(model, data, tmp_path / "part", domains=["a", "b"], resume=True)
    assert columns(resumed) == columns(whole)


def test_resuming_with_other_tokens_is_refused(tmp_path):
    model, data = tiny_model("qwen3_moe"), batches(3)
    before = columns(record(model, data, tmp_path, domains=["a", "b"]))
    data[1]["input_ids"][0, 0] += 1
    with pytest.raises(TraceError, match="the tokens of this run are not those of the trace"):
        record(model, data, tmp_path, domains=["a", "b"], resume=True)
    with pytest.raises(TraceError, match="holds 38 tokens more than this run would give"):
        record(model, batches(3), tmp_path, domains=["a", "b"], resume=True, max_tokens=10)
    assert columns(Trace.open(tmp_path)) == before
    assert Trace.open(tmp_path).meta.complete


def test_a_trace_is_not_overwritten_by_accident(tmp_path):
    model, data = tiny_model("qwen3_moe"), batches(1)
    record(model, data, tmp_path, domains=["a", "b"])
    with pytest.raises(TraceError, match="holds a trace already; resume it"):
        record(model, data, tmp_path, domains=["a", "b"])
    with pytest.raises(ConfigError, match="exclude each other"):
        record(model, data, tmp_path, resume=True, overwrite=True)
    assert len(record(model, data, tmp_path, domains=["a", "b"], max_tokens=3, overwrite=True)) == 3
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="a trace is a folder"):
        record(model, data, tmp_path / "file")


def test_models_that_cannot_be_traced(tmp_path):
    with pytest.raises(NotMoEError, match="has no MoE block"):
        record(tiny_model("llama"), batches(1), tmp_path / "t")
    with pytest.raises(UnsupportedFamilyError, match="one stream of tokens"):
        record(tiny_model("switch_transformers", num_sparse_encoder_layers=1), batches(1), tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_nan_is_noticed_and_the_layer_named(tmp_path):
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp \(layer 1\)"):
        record(model, batches(2), tmp_path, domains=["a", "b"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask alike"),
        ({"input_ids": torch.ones(5, dtype=torch.long)}, r"must be \[B, S\]"),
        ({"domain": torch.tensor([0, 2])}, r"domain 2 is no index into the domains \['a', 'b'\]"),
        ({"domain": torch.zeros(3)}, r"a column of a batch must be \[2\] or \[2, 10\], not \[3\]"),
    ],
)
def test_batches_of_wrong_shape_are_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        record(tiny_model("qwen3_moe"), [batches(1)[0] | change], tmp_path, domains=["a", "b"])


def test_dropped_assignments_and_unused_slots_are_not_stored():
    routing = Routing(
        expert=torch.tensor([3, 1, 0, 2, 3]),
        weight=torch.tensor([0.5, 0.25, 1.0, 0.75, 0.125]),
        num_tokens=4,
        num_experts=4,
        ragged_token=torch.tensor([0, 0, 1, 3, 3]),
        kept=torch.tensor([True, False, True, True, True]),
    )
    layer = LayerMeta(layer=0, path="mlp", num_experts=4, top_k=2, score="softmax")
    rows = layer_rows(layer, routing, torch.tensor([0, 2, 3]), None, logits=False)
    assert rows.expert.tolist() == [3, 2, 3]
    assert rows.weight.tolist() == [0.5, 0.75, 0.125]
    assert rows.lengths is not None
    assert rows.lengths.tolist() == [1, 0, 2]


def test_generated_tokens_are_recorded_step_by_step(tmp_path):
    model = tiny_model("qwen3_moe")
    model.generation_config.eos_token_id = None
    data = batches(2, left=True)
    trace = record_generate(model, data, tmp_path / "g", max_new_tokens=4, domains=["a", "b"])
    assert trace.column("phase").tolist() == ([0] * 16 + [1] * 6) * 2
    assert trace.column("step").tolist() == [
        s for first in (0, 4) for s in [first] * 16 + [first + i for i in (1, 1, 2, 2, 3, 3)]
    ]
    assert trace.column("position").tolist()[16:22] == [10, 6, 11, 7, 12, 8]
    for number, batch in enumerate(data):
        text = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=4, do_sample=False
        )
        for row in (0, 1):
            chosen = trace.column("sequence") == 2 * number + row
            real = text[row, 4 * row : -1]  # the last token was never fed to the model
            assert trace.tokens()[chosen].tolist() == real.tolist()
            again = record(model, [{"input_ids": real[None]}], tmp_path / "again", overwrite=True)
            for layer in trace.layers:
                alike = np.sort(trace.experts(layer)[chosen]) == np.sort(again.experts(layer))
                assert alike.all(), "decoding and one forward over the whole text choose the same experts"


def test_a_sequence_ends_with_its_end_token(tmp_path):
    model = tiny_model("qwen3_moe")
    model.generation_config.eos_token_id = None
    data = batches(1, padded=False)
    free = model.generate(data[0]["input_ids"], max_new_tokens=6, do_sample=False)[:, LENGTH:].tolist()
    end = next(token for token in free[0] if token not in free[1])
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = 0
    trace = record_generate(model, data, tmp_path, max_new_tokens=6, domains=["a", "b"])
    fed = [trace.tokens()[(trace.column("sequence") == row) & (trace.column("phase") == 1)].tolist() for row in (0, 1)]
    assert fed == [free[0][: free[0].index(end)], free[1][:5]]


def test_generation_that_does_not_fit_a_trace_is_refused(tmp_path):
    model = tiny_model("qwen3_moe")
    with pytest.raises(ConfigError, match="padded on the left"):
        record_generate(model, batches(1), tmp_path / "a", max_new_tokens=2, domains=["a", "b"])
    for settings in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"use_cache": False}):
        with pytest.raises(ConfigError, match="one sequence a prompt"):
            record_generate(
                model, batches(1, padded=False), tmp_path / "b", max_new_tokens=3, domains=["a", "b"], overwrite=True,
                **settings,
            )  # fmt: skip
