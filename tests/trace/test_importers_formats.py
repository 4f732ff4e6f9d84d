"""What is particular to each format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from importer_files import LAYERS, PROMPTS, WRITERS, E, K, Run, assert_is, known, logits_of, npy, sglang_data
from safetensors.torch import save_file

from collegium.errors import ConfigError, TraceError
from collegium.sites import sites
from collegium.trace import record
from collegium.trace.importers import Known, from_router_logits, import_trace
from tiny import tiny_inputs, tiny_model

FACTS = Known(layers=LAYERS, num_experts=E, top_k=K)


def vllm(tmp_path: Path, content: object, facts: Known = FACTS):
    file = tmp_path / "response.json"
    file.write_text(json.dumps(content))
    return import_trace("vllm", [file], tmp_path / "t", facts, overwrite=True)


def responses(run: Run) -> list[dict]:
    """As release 0.21 gives them: nested lists, the prompt's apart, a row for the last token too or not."""
    found = []
    for n, P in enumerate(PROMPTS):
        found.append(
            {
                "prompt_token_ids": run.prompts[n],
                "prompt_routed_experts": run.experts[n][:P].tolist(),
                "choices": [{"token_ids": run.answers[n], "routed_experts": run.experts[n][P:].tolist()}],
            }
        )
    return found


def test_vllm_prompt_and_answer_apart(tmp_path: Path) -> None:
    run = Run()
    trace, _ = vllm(tmp_path, responses(run))
    assert_is(trace, run)


def test_vllm_dense_layers_are_zeros(tmp_path: Path) -> None:
    run = Run()
    wide = [np.zeros((len(e), 6, K), np.int64) for e in run.experts]
    for rows, experts in zip(wide, run.experts, strict=True):
        rows[:, list(LAYERS)] = experts
    files = [
        {"prompt_token_ids": p, "choices": [{"token_ids": a, "routed_experts": npy(rows)}]}
        for p, a, rows in zip(run.prompts, run.answers, wide, strict=True)
    ]
    trace, notes = vllm(tmp_path, files, Known(num_experts=E))
    assert_is(trace, run)
    assert any("3 layers hold zeros only" in note for note in notes)


def test_vllm_several_choices_share_the_prompt(tmp_path: Path) -> None:
    run = Run()
    whole = npy(run.experts[0])
    choice = {"token_ids": run.answers[0], "routed_experts": whole}
    trace, _ = vllm(tmp_path, {"prompt_token_ids": run.prompts[0], "choices": [choice, choice]})
    assert len(trace) == len(run.fed[0]) + len(run.answers[0]) - 1
    assert trace.column("sequence").max() == 1
    assert trace.column("position")[trace.column("sequence") == 1].min() == PROMPTS[0]
    assert trace.column("phase").tolist().count(0) == PROMPTS[0]


def test_vllm_answer_rows_only(tmp_path: Path) -> None:
    run = Run()
    choice = {"token_ids": run.answers[0], "routed_experts": npy(run.experts[0][PROMPTS[0] :])}
    trace, _ = vllm(tmp_path, {"prompt_token_ids": run.prompts[0], "choices": [choice]})
    assert trace.tokens().tolist() == run.answers[0][:-1]
    assert set(trace.column("phase")) == {1}
    assert trace.column("position")[0] == PROMPTS[0]


def test_vllm_arrays(tmp_path: Path) -> None:
    run = Run()
    np.save(tmp_path / "a.npy", run.experts[0])
    trace, _ = import_trace("vllm", [tmp_path / "a.npy"], tmp_path / "t", known("vllm", run, tokens=run.tokens[:10]))
    assert trace.tokens().tolist() == run.fed[0]
    fields = {"prompt_token_ids": run.prompts[1], "token_ids": run.answers[1]}
    np.savez(tmp_path / "b.npz", routed_experts=run.experts[1], **fields)
    trace, _ = import_trace("vllm", [tmp_path / "b.npz"], tmp_path / "u", FACTS)
    assert trace.tokens().tolist() == run.fed[1]
    assert trace.column("phase").tolist().count(1) == len(run.answers[1]) - 1
    both = [tmp_path / "b.npz", tmp_path / "a.npy"]
    assert len(import_trace("vllm", both, tmp_path / "v", FACTS)[0]) == len(run.fed[0]) + len(run.fed[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["choices"][0].pop("routed_experts"), r"choices\.0\.routed_experts' is missing"),
        (lambda r: r["choices"][0].pop("token_ids"), r"choices\.0\.token_ids' is missing.*return_token_ids"),
        (lambda r: r.update(choices=3), "'choices' must be a list"),
        (lambda r: r["choices"][0].update(routed_experts="@@"), "routed_experts' is not base64"),
        (lambda r: r["choices"][0].update(routed_experts="AAAA"), "not a readable numpy file"),
        (lambda r: r["choices"][0].update(routed_experts=[[[0.5, float("nan"), 2]] * 3]), "float64 with NaN"),
        (lambda r: r["choices"][0].update(routed_experts=[[[0, 1], [2]]]), "not a regular array"),
        (lambda r: r["choices"][0].update(routed_experts=[[1, 2]]), r"must be \[tokens, layers, experts"),
        (lambda r: r["choices"][0].update(routed_experts=[[[1, 1, 2]] * 3] * 10), "names an expert twice"),
        (lambda r: r["choices"][0].update(routed_experts=[[[-1, 1, 2]] * 3] * 10), "expert id -1"),
        (lambda r: r["choices"][0]["token_ids"].append(1) or r["choices"][0]["token_ids"].append(1), "has 10 rows"),
    ],
)
def test_vllm_names_the_field(tmp_path: Path, change, message: str) -> None:
    run = Run()
    choice = {"token_ids": list(run.answers[0]), "routed_experts": npy(run.experts[0])}
    response = {"prompt_token_ids": run.prompts[0], "choices": [choice]}
    change(response)
    with pytest.raises(TraceError, match=rf"response\.json.*{message}"):
        vllm(tmp_path, response)


def sglang(tmp_path: Path, *data: object):
    files = [tmp_path / f"rank_{rank}.pt" for rank in range(len(data))]
    for file, content in zip(files, data, strict=True):
        torch.save(content, file)
    return import_trace("sglang", files, tmp_path / "t", overwrite=True)


def test_sglang_tells_layers_and_sizes_itself(tmp_path: Path) -> None:
    run = Run()
    trace, notes = sglang(tmp_path, sglang_data(run))
    assert_is(trace, run)
    assert any("only the last map" in note for note in notes)
    assert trace.column("step").min() == 100


def test_sglang_ranks_that_saw_the_same_count_once(tmp_path: Path) -> None:
    run = Run()
    trace, notes = sglang(tmp_path, sglang_data(run), sglang_data(run))
    assert_is(trace, run)
    assert any("several ranks recorded alike" in note for note in notes)


def test_sglang_ranks_with_requests_of_their_own(tmp_path: Path) -> None:
    first, second = Run(), Run(seed=9)
    data = sglang_data(second)
    trace, _ = sglang(tmp_path, sglang_data(first), data)
    assert len(trace) == len(first.tokens) + len(second.tokens)
    assert trace.column("sequence").max() == 5


def test_sglang_prompts_in_chunks_and_unsure_tokens(tmp_path: Path) -> None:
    run = Run()
    data = sglang_data(run)
    whole = data["records"][0]
    split = PROMPTS[0] + 4  # within the second prompt
    parts = []
    for rows, lengths in ((slice(0, split), [PROMPTS[0], 4]), (slice(split, None), [PROMPTS[1] - 4, PROMPTS[2]])):
        part = {key: whole[key][rows] for key in ("input_ids", "positions")}
        ids = whole["topk_ids_of_layer"][:, rows]
        parts.append({**whole, **part, "topk_ids_of_layer": ids, "extend_seq_lens": lengths})
    parts[1]["forward_pass_id"] = 101
    trace, notes = sglang(tmp_path, {**data, "records": [*parts, *data["records"][1:]]})
    assert_is(trace, run)
    assert not any("fitted several" in note for note in notes)
    twins = {**whole, "positions": [0, 1] * 9, "extend_seq_lens": [2] * 9}
    decode = {**data["records"][1], "positions": [2, 2]}
    _, notes = sglang(tmp_path, {**data, "records": [twins, decode]})
    assert any("2 tokens fitted several sequences" in note for note in notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(logical_count=torch.zeros(1, 6, E)), "holds counts.*per_token"),
        (lambda d: d.pop("records"), "'records' must be a list"),
        (lambda d: d["records"][1].pop("topk_ids_of_layer"), "per_pass mode"),
        (lambda d: d.pop("last_physical_to_logical_map"), "last_physical_to_logical_map' is missing"),
        (lambda d: d["last_physical_to_logical_map"].fill_(3), "row 0 does not place every expert"),
        (lambda d: d["records"][0].update(forward_mode=5), r"records\.0\.forward_mode' is 5"),
        (lambda d: d["records"][0].update(extend_seq_lens=[1]), r"extend_seq_lens' must add up to the 18"),
        (lambda d: d["records"][0].update(extend_seq_lens=None), r"extend_seq_lens' must be whole numbers"),
        (lambda d: d["records"][0].update(positions=[0] * 18), "must count up by one"),
        (lambda d: d["records"][0]["positions"].pop(), r"records\.0': topk_ids_of_layer is .* positions \[17\]"),
        (lambda d: d["records"][0].update(forward_pass_id="x"), r"forward_pass_id' must be a whole number"),
        (lambda d: d["records"][0]["topk_ids_of_layer"][1].clamp_(max=-1), "layer 1 has no expert for token 0"),
        (lambda d: d["records"][0]["topk_ids_of_layer"][1].add_(9), "layer 1 holds slot 2., the map has 14"),
        (
            lambda d: d["records"][0].update(topk_ids_of_layer=torch.full((6, 18, 8), torch.nan)),
            r"records\.0\.topk_ids_of_layer' must be whole numbers, not float32 with NaN",
        ),
        (lambda d: d.update(records=[]), "holds no tokens"),
    ],
)
def test_sglang_names_the_field(tmp_path: Path, change, message: str) -> None:
    data = sglang_data(Run())
    change(data)
    with pytest.raises(TraceError, match=rf"rank_0\.pt.*{message}"):
        sglang(tmp_path, data)
    assert not (tmp_path / "t" / "meta.json").exists()


class Code:
    """Unpickling this would run something."""

    def __reduce__(self):
        return (Path.touch, (Path("was-run"),))


@pytest.mark.parametrize("format", ["sglang", "router-logits"])
def test_code_in_a_file_is_refused(tmp_path: Path, format: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"records": Code(), "router_logits": Code()}, tmp_path / "x.pt")
    with pytest.raises(TraceError, match=r"x\.pt is not a readable file of tensors"):
        import_trace(format, [tmp_path / "x.pt"], tmp_path / "t", FACTS)
    assert not (tmp_path / "was-run").exists()


def csv(tmp_path: Path, text: str, facts: Known = FACTS):
    (tmp_path / "trace.csv").write_text(text)
    return import_trace("llama.cpp", [tmp_path / "trace.csv"], tmp_path / "t", facts, overwrite=True)


def test_llama_cpp_assignments_without_tokens(tmp_path: Path) -> None:
    run = Run()
    lines = [
        f"{layer},{e}\n"
        for batch in np.split(run.all, [11])
        for place, layer in enumerate(LAYERS)
        for e in batch[:, place].flatten()
    ]
    for head in ("", "layer,expert\n"):
        trace, notes = csv(tmp_path, head + "".join(lines), known("llama.cpp", run))
        for place, layer in enumerate(LAYERS):
            assert np.array_equal(np.sort(trace.experts(layer)), np.sort(run.all[:, place]))
        assert any("no phases" in note for note in notes)
    with pytest.raises(TraceError, match="no multiple of the 3"):
        csv(tmp_path, "".join(lines[:-1]))
    with pytest.raises(TraceError, match="different numbers of tokens"):
        csv(tmp_path, "".join(lines[:-3]))
    with pytest.raises(ConfigError, match="--top-k"):
        csv(tmp_path, "".join(lines), Known(num_experts=E))


def test_llama_cpp_ranked(tmp_path: Path) -> None:
    run = Run()
    lines = ["phase,token,layer,rank,expert\n"]
    for prompt, fed, experts in zip(run.prompts, run.fed, run.experts, strict=True):
        for n in range(len(fed)):
            phase = "prefill" if n < len(prompt) else "decode"
            for place, layer in enumerate(LAYERS):
                lines += [f"{phase},{n},{layer},{rank},{e}\n" for rank, e in enumerate(experts[n, place])]
    trace, _ = csv(tmp_path, "".join(lines), known("llama.cpp", run))
    assert_is(trace, run)
    with pytest.raises(TraceError, match="column 'rank' of layer 4"):
        csv(tmp_path, "".join(lines[:-1]))
    with pytest.raises(TraceError, match="'phase' holds 'guess'"):
        csv(tmp_path, "".join([*lines[:-1], lines[-1].replace("prefill", "guess")]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("0,1,2,3\n0,1,2,", "cut short"),
        ("layer,expert,count\n0,1,2\n", "none of the layouts.*counts have no tokens"),
        ("0,1,2,3\n0,1,2\n", "line 2: column 4 is missing"),
        ("0,1,2,nan\n", "must hold 4 whole numbers a line"),
        ("0,1,2.5,3\n", "must hold 4 whole numbers a line"),
        ("-1,1,2,3\n0,1,2,3\n-1,2,2,3\n-1,2,2,3\n", "column 'pos' of layer 2 has other phases"),
        ("0,1,2,-3\n", "holds expert -3"),
    ],
)
def test_llama_cpp_names_the_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TraceError, match=rf"trace\.csv.*{message}"):
        csv(tmp_path, text, Known(num_experts=E, top_k=2))


def test_llama_cpp_rankings_are_not_routing(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    ids = np.concatenate([draw.permutation(E) for _ in range(8)]).reshape(-1, K)
    with pytest.raises(TraceError, match=r"trace\.csv.*layer 7 every 4 tokens use each expert exactly once"):
        csv(tmp_path, "".join(f"-1,7,{a},{b},{c}\n" for a, b, c in ids), Known(num_experts=E))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss"])
def test_router_logits_with_the_model_are_what_the_recorder_sees(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    inputs = tiny_inputs(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, 8:] = 0
    batch = {**inputs, "attention_mask": mask}
    asked = record(model, [batch], tmp_path / "recorded", logits=True)
    seen: list[torch.Tensor] = []

    def keep(gate: torch.nn.Module, args: object, output: Any) -> None:
        seen.append(output if isinstance(output, torch.Tensor) else output[0])

    handles = [site.gate.register_forward_hook(keep) for site in sites(model)]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    trace, notes = from_router_logits(seen, batch["input_ids"], tmp_path / "t", attention_mask=mask, model=model)
    assert notes == []
    assert trace.layers == asked.layers
    assert trace.meta.layers == asked.meta.layers
    assert trace.meta.family == asked.meta.family
    assert np.array_equal(trace.tokens(), asked.tokens())
    assert np.array_equal(trace.column("position"), asked.column("position"))
    for layer in trace.layers:
        assert np.array_equal(trace.experts(layer), asked.experts(layer))
        np.testing.assert_allclose(trace.weights(layer), asked.weights(layer), atol=1e-3)
        mine, theirs = (next(t.iter_parts([f"logits_{layer}"])).logits(layer) for t in (trace, asked))
        np.testing.assert_allclose(mine, theirs, atol=1e-3)


def test_router_logits_that_a_model_returns(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        output = model(**inputs, output_router_logits=True)
    trace, _ = from_router_logits(output.router_logits, inputs["input_ids"], tmp_path / "t", model=model)
    asked = record(model, [inputs], tmp_path / "recorded")
    for layer in asked.layers:
        assert np.array_equal(trace.experts(layer), asked.experts(layer))


def test_router_logits_without_a_model(tmp_path: Path) -> None:
    run = Run()
    logits = [torch.from_numpy(logits_of(run.experts[0][:, place])) for place in range(3)]
    ids = torch.tensor([run.fed[0]])
    trace, notes = from_router_logits([x[None] for x in logits], ids, tmp_path / "t", top_k=K)
    assert trace.layers == [0, 1, 2]
    assert np.array_equal(trace.experts(1), run.experts[0][:, 1])
    asked = logits[1].softmax(-1).topk(K).values
    np.testing.assert_allclose(trace.weights(1), asked.numpy(), atol=1e-3)
    assert any("plain softmax" in note for note in notes)
    with pytest.raises(TraceError, match="--overwrite"):
        from_router_logits(logits, ids, tmp_path / "t", top_k=K)


def test_router_logits_in_safetensors(tmp_path: Path) -> None:
    run = Run()
    tensors = {f"router_logits.{n}": torch.from_numpy(logits_of(run.experts[0][:, n])) for n in range(3)}
    save_file({**tensors, "input_ids": torch.tensor([run.fed[0]])}, tmp_path / "x.safetensors")
    trace, _ = import_trace("router-logits", [tmp_path / "x.safetensors"] * 2, tmp_path / "t", FACTS)
    assert np.array_equal(trace.experts(4)[:10], run.experts[0][:, 2])
    assert trace.column("sequence").tolist() == [0] * 10 + [1] * 10
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-9])
    with pytest.raises(TraceError, match=r"x\.safetensors is not a readable safetensors"):
        import_trace("router-logits", [tmp_path / "x.safetensors"], tmp_path / "u", FACTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("input_ids"), "'input_ids' is missing"),
        (lambda d: d.update(router_logits=()), "'router_logits' must be a list"),
        (lambda d: d["router_logits"][1].fill_(torch.nan), r"router_logits\.1' holds NaN"),
        (
            lambda d: d.update(input_ids=d["input_ids"][:, 1:], attention_mask=d["attention_mask"][:, 1:]),
            r"router_logits\.0' must be the logits of 30 tokens over 12 experts, not \[33, 12\]",
        ),
        (lambda d: d.update(input_ids=d["input_ids"].float()), "'input_ids' must be"),
        (lambda d: d.update(attention_mask=d["attention_mask"][0]), "'attention_mask' must be"),
        (lambda d: d.update(router_logits=(d["router_logits"][0], None, 3)), r"router_logits\.2' must be a tensor"),
    ],
)
def test_router_logits_name_the_field(tmp_path: Path, change, message: str) -> None:
    (file,) = WRITERS["router-logits"](tmp_path, Run())
    data = torch.load(file, weights_only=True)
    change(data)
    torch.save(data, file)
    with pytest.raises(TraceError, match=rf"forward\.pt.*{message}"):
        import_trace("router-logits", [file], tmp_path / "t", FACTS)
