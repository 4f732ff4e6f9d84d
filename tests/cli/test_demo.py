"""The main job: what ``collegium demo`` prints and writes is computed from the models in the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from collegium import Trace
from collegium.assets import SHIPPED, model_folder
from collegium.cli.main import app
from collegium.errors import ModelError
from collegium.models.checkpoint import open_checkpoint
from collegium.models.summary import summarize


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(app, ["demo", "--out", str(out), "--tokens", "9216", "--new-tokens", "4", "--json"])
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def test_moe_beats_its_dense_twin_on_this_machine(demo: tuple[Path, dict]) -> None:
    scores = demo[1]["bits_per_byte"]
    assert scores["moe"]["all"] < scores["dense"]["all"]
    domains = [name for name in scores["moe"] if name != "all"]
    assert sum(scores["moe"][name] < scores["dense"][name] for name in domains) > len(domains) / 2


def test_experts_specialise_and_none_is_dead(demo: tuple[Path, dict]) -> None:
    layers = demo[1]["layers"]
    assert all(layer["domain_information_bits"] > layer["domain_information_shuffled_bits"] for layer in layers)
    assert all(layer["dead"] == [] for layer in layers)


def test_the_trace_and_the_plots_are_there(demo: tuple[Path, dict]) -> None:
    out, numbers = demo
    trace = Trace.open(out / "trace")
    assert len(trace) == numbers["tokens"] > 4000
    assert trace.counts().tolist() == [layer["counts"] for layer in numbers["layers"]]
    assert trace.meta.fingerprint == open_checkpoint(SHIPPED["demo"]).fingerprint
    written = ("report.html", "figures/load.png", "figures/domains.svg")
    assert all((out / name).stat().st_size > 10_000 for name in written)


def test_the_shipped_weights_are_small_and_what_the_card_says() -> None:
    size = sum(file.stat().st_size for folder in SHIPPED.values() for file in folder.glob("*.safetensors"))
    assert size <= 16_000_000
    card = (SHIPPED["demo"] / "README.md").read_text(encoding="utf-8")
    for name, folder in SHIPPED.items():
        found = summarize(open_checkpoint(folder))
        assert f"| {name} | {found.parameters:,} | {found.active_parameters:,} |" in card
    assert "collegium train recipes/demo.yaml" in card


def test_a_name_that_is_no_model_lists_the_shipped_ones() -> None:
    with pytest.raises(ModelError, match="demo-dense"):
        model_folder("nonsense")
