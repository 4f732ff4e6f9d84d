"""Every importer: what another program recorded comes back as it was, and what is not understood is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from importer_files import LAYERS, WRITERS, E, K, Run, assert_is, in_reading_order, known

from collegium.errors import ConfigError, TraceError
from collegium.trace import LayerMeta
from collegium.trace.importers import IMPORTERS, Known, ModelFacts, import_trace

FORMATS = sorted(IMPORTERS)


def model_facts(layers=LAYERS, num_experts: int = E, num_layers: int = 6) -> ModelFacts:
    entries = {
        n: LayerMeta(layer=n, path=f"model.layers.{n}", num_experts=num_experts, top_k=K, score="sigmoid")
        for n in layers
    }
    return ModelFacts("the model", "a family", "abc", entries, num_layers)


def test_every_importer_has_a_writer_here() -> None:
    assert set(WRITERS) == set(FORMATS)
    assert all(IMPORTERS[name].reads for name in FORMATS)


@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(tmp_path: Path, format: str) -> None:
    run = Run()
    trace, notes = import_trace(format, WRITERS[format](tmp_path, run), tmp_path / "t", known(format, run))
    assert_is(trace, run)
    assert all(note in trace.meta.data for note in notes)
    phases = {True: {0}, False: {0, 1}}[format == "router-logits"]
    assert set(trace.column("phase")) == phases
    if phases == {0, 1}:
        decoded = trace.column("phase")[in_reading_order(trace)]
        asked = [n >= len(p) for p, fed in zip(run.prompts, run.fed, strict=True) for n in range(len(fed))]
        assert decoded.astype(bool).tolist() == asked


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "router-logits"])
def test_the_model_gives_layers_and_sizes(tmp_path: Path, format: str) -> None:
    run = Run()
    facts = Known(model=model_facts(), tokens=run.tokens if format == "llama.cpp" else None)
    trace, _ = import_trace(format, WRITERS[format](tmp_path, run), tmp_path / "t", facts)
    assert_is(trace, run)
    assert trace.meta.model == "the model"
    assert trace.meta.fingerprint == "abc"
    assert trace.meta.layer(2).path == "model.layers.2"
    assert trace.meta.layer(2).score == "sigmoid"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
def test_a_truncated_file_is_named(tmp_path: Path, format: str, share: float) -> None:
    run = Run()
    files = WRITERS[format](tmp_path, run)
    content = files[0].read_bytes()
    cut = int(len(content) * share)
    while content[cut - 1 : cut] == b"\n":
        cut -= 1
    files[0].write_bytes(content[:cut])
    with pytest.raises(TraceError, match=files[0].name):
        import_trace(format, files, tmp_path / "t", known(format, run))
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_an_expert_that_does_not_exist_is_named(tmp_path: Path, format: str) -> None:
    run = Run()
    files = WRITERS[format](tmp_path, run)
    with pytest.raises(TraceError, match=rf"{files[0].name}.*(expert 11 of only 11|12 experts there, not 11)"):
        import_trace(format, files, tmp_path / "t", known(format, run, num_experts=E - 1))
    assert not (tmp_path / "t" / "meta.json").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_missing_layers_are_named(tmp_path: Path, format: str) -> None:
    run = Run()
    files = WRITERS[format](tmp_path, run)
    with pytest.raises(TraceError, match=rf"{files[0].name}.*3 layers"):
        import_trace(format, files, tmp_path / "t", known(format, run, layers=(1, 2)))
    if format != "router-logits":
        facts = known(format, run, layers=None, model=model_facts((1, 2, 4, 5)))
        with pytest.raises(TraceError, match=rf"{files[0].name}.*(layers \[5\] are missing|4 MoE layers)"):
            import_trace(format, files, tmp_path / "t", facts)


@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_order_of_ones_own(tmp_path: Path, format: str) -> None:
    run = Run()
    files = WRITERS[format](tmp_path, run)
    trace, _ = import_trace(format, files, tmp_path / "t", known(format, run, layers=(9, 3, 0)))
    assert trace.layers == [0, 3, 9]
    order = in_reading_order(trace)
    for place, layer in enumerate((9, 3, 0)):
        assert np.array_equal(np.sort(trace.experts(layer)[order]), np.sort(run.all[:, place]))


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "sglang"])
def test_what_nothing_tells_is_asked_for(tmp_path: Path, format: str) -> None:
    run = Run()
    with pytest.raises(ConfigError, match=r"--num-experts|--top-k"):
        import_trace(format, WRITERS[format](tmp_path, run), tmp_path / "t", Known(tokens=None))


def test_token_ids_must_fit(tmp_path: Path) -> None:
    run = Run()
    files = WRITERS["llama.cpp"](tmp_path, run)
    with pytest.raises(TraceError, match=f"2 token ids.*{len(run.tokens)} tokens"):
        import_trace("llama.cpp", files, tmp_path / "t", known("llama.cpp", run, tokens=np.array([1, 2])))
    trace, notes = import_trace("llama.cpp", files, tmp_path / "t", known("llama.cpp", run, tokens=None))
    assert set(trace.tokens()) == {0}
    assert any("token ids were not recorded" in note for note in notes)


def test_a_trace_that_is_there_stays_unless_told(tmp_path: Path) -> None:
    run = Run()
    files = WRITERS["vllm"](tmp_path, run)
    import_trace("vllm", files, tmp_path / "t", known("vllm", run))
    with pytest.raises(TraceError, match="--overwrite"):
        import_trace("vllm", files, tmp_path / "t", known("vllm", run))
    other = Run(seed=5)
    WRITERS["vllm"](tmp_path, other)
    assert_is(import_trace("vllm", files, tmp_path / "t", known("vllm", other), overwrite=True)[0], other)


def test_names_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sglang"):
        import_trace("triton", [tmp_path / "x"], tmp_path / "t")
    with pytest.raises(TraceError, match="is not a file"):
        import_trace("vllm", [tmp_path / "x.npy"], tmp_path / "t")
    with pytest.raises(ConfigError, match="at least one"):
        import_trace("vllm", [], tmp_path / "t")
