"""The arena, from a plan to its table: what it refuses, that it goes on, and that its numbers are those of the runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from collegium import load
from collegium.arena import ArenaPlan, collect, run_arena
from collegium.catalog import methods
from collegium.errors import CollegiumError, ConfigError
from collegium.layer import moe_layers
from collegium.report.arena import arena_markdown, write_arena

METHODS: dict[str, dict[str, Any]] = {"top_k": {}, "expert_choice": {"moe.router": "expert_choice"}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A plan of two methods on a corpus of two domains."""
    corpus = tmp_path_factory.mktemp("arena_corpus")
    for n in range(60):
        texts = {"count": " ".join(str(n * 7 + i) for i in range(60)), "song": "la di da du wo " * (n % 5 + 4)}
        for domain, text in texts.items():
            place = corpus / ("valid" if n % 6 == 0 else "train") / domain
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{n}.txt").write_text(text)
    model = {"family": "qwen3", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
    cache = str(tmp_path_factory.mktemp("arena_cache"))
    return {
        "base": {
            "model": model,
            "moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            "data": {"corpus": str(corpus), "vocab_size": 300, "sequence_length": 32, "cache": cache},
            "run": {"steps": 7, "batch_size": 4, "log_every": 2},
        },
        "baseline": "top_k",
        "seeds": [0, 1],
        "probe": 1500,
        "methods": METHODS,
    }


@pytest.fixture
def written(data: dict[str, Any], tmp_path: Path) -> Any:
    """A function that writes a plan, changed, and gives its file."""

    def write(**changes: Any) -> Path:
        file = tmp_path / "plan.yaml"
        file.write_text(yaml.safe_dump({**data, **changes}))
        return file

    return write


@pytest.fixture(scope="module")
def finished(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[ArenaPlan, Path]:
    plan, out = ArenaPlan.model_validate(data), tmp_path_factory.mktemp("arena")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert run_arena(plan, out, say=lambda text: None)
    return plan, out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "topk"}, "baseline 'topk' is none of the methods; did you mean 'top_k'"),
        ({"seeds": [1, 1]}, "hold one twice"),
        ({"seed": 3}, "there is no 'seed'; did you mean 'seeds'"),
        ({"methods": {"top_k": {"run.seed": 3}}}, "run.seed is set by the arena"),
        ({"methods": {"../top_k": {}}, "baseline": "../top_k"}, "names become folders"),
        ({"methods": {"top_k": {"moe.router": "srs"}}}, "method top_k.*did you mean 'ssr'"),
        ({"methods": {"top_k": {"run.steps": 2}}}, "at least 3"),
        ({"methods": {}}, "methods"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_plans_that_cannot_be(written: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ArenaPlan.load(written(**changes))


def test_the_shipped_plan_has_every_system() -> None:
    plan = ArenaPlan.load(Path(__file__).parents[2] / "recipes" / "arena.yaml")
    there = {system for name in plan.names for system in plan.systems(name)}
    assert there == {one.name for one in methods("system")}
    steps = {plan.recipe(name, seed).steps for name in plan.names for seed in plan.seeds}
    assert len(steps) == 1


def test_a_plan_from_its_file(written: Any, tmp_path: Path) -> None:
    plan = ArenaPlan.load(written(), ["run.steps=9"])
    recipe = plan.recipe("expert_choice", 1)
    assert (recipe.steps, recipe.run.seed, recipe.run.checkpoint_every) == (9, 1, 3)
    assert plan.systems("expert_choice") == ["expert_choice"]
    assert plan.systems("top_k") == []
    assert plan.only([]).names == ["top_k"]
    with pytest.raises(ConfigError, match="did you mean 'expert_choice'"):
        plan.only(["expert-choice"])
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="a plan is a mapping"):
        ArenaPlan.load(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match="cannot read the plan"):
        ArenaPlan.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="no measured run"):
        collect(plan, tmp_path)


def test_the_numbers_are_those_of_the_runs(finished: tuple[ArenaPlan, Path]) -> None:
    plan, out = finished
    results = collect(plan, out)
    assert not results.missing
    top, choice = results.entries
    assert top.causal
    assert not choice.causal
    for seed in plan.seeds:
        summary = json.loads((out / "runs" / f"top_k-seed{seed}" / "summary.json").read_text())
        assert top.numbers["bits_per_byte"][seed] == pytest.approx(np.mean(list(summary["domains"].values())))
        assert top.domains["count"][seed] == summary["domains"]["count"]
        assert top.numbers["peak_memory"][seed] == summary["peak_memory_bytes"]
    assert top.numbers["active_experts"] == (2.0, 2.0)
    assert top.numbers["active_spread"] == (0.0, 0.0)
    assert choice.numbers["active_spread"][0] > 0  # experts choose: some tokens get more
    assert choice.mean("max_violation") < top.mean("max_violation")
    assert all(0 <= value <= 1 for value in top.numbers["fluctuation"])
    assert [one.name for one in results.ranked] == ["top_k"]
    assert results.ranking() is None


def test_operations_are_counted(finished: tuple[ArenaPlan, Path]) -> None:
    plan, out = finished
    model = load(out / "runs" / "top_k-seed0" / "model")
    d, f, E, K, V, H, hd = 32, 16, 4, 2, model.config.vocab_size, 2, 16
    products = 2 * (d * H * hd + 2 * d * hd + H * hd * d + d * E + K * 3 * d * f)  # q, k and v, o, router, experts
    found = collect(plan, out).entries[0].numbers["flops_per_token"][0]
    least = 2 * (2 * products / 2 + d * V)  # two layers and the head
    attention = 2 * 2 * 2 * 32 * H * hd  # scores and sums over at most 32 tokens, two layers
    assert least < found <= least + attention
    assert len(moe_layers(model)) == 2


def test_what_is_done_is_not_done_again(finished: tuple[ArenaPlan, Path]) -> None:
    plan, out = finished
    files = {file: file.stat().st_mtime_ns for file in out.rglob("*.json")}
    said: list[str] = []
    assert run_arena(plan, out, say=said.append)
    assert said == []
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.json")} == files
    other = plan.model_copy(update={"base": {**plan.base, "optim": {"lr": 1e-4}}})
    with pytest.raises(ConfigError, match="holds a run of another recipe"):
        run_arena(other, out)


def test_files_and_tables(finished: tuple[ArenaPlan, Path], tmp_path: Path) -> None:
    plan, out = finished
    results = collect(plan, out)
    files = write_arena(results, tmp_path, "collegium arena plan.yaml")
    assert all(file.is_file() for file in files)
    # domains and tournament compare what is ranked, and there is one such method
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == {"numbers", "balance"}
    record = json.loads(files[0].read_text())
    assert [one["name"] for one in record["methods"]] == ["top_k", "expert_choice"]
    table = arena_markdown(results, "collegium arena plan.yaml")
    assert table in files[1].read_text()
    mean = results.entries[0].mean("bits_per_byte")
    assert f"{mean:.4f}" in table
    assert "`expert_choice` \\*" in table
    assert "not ranked" in table


def test_a_run_that_fails_leaves_the_others(data: dict[str, Any], tmp_path: Path) -> None:
    methods = {"top_k": {}, "broken": {"data.corpus": str(tmp_path / "nothing")}}
    plan = ArenaPlan.model_validate({**data, "methods": methods, "seeds": [0]})
    with pytest.raises(CollegiumError, match="broken, seed 0: training ended with exit status 2"):
        run_arena(plan, tmp_path / "out", say=lambda text: None)
    results = collect(plan, tmp_path / "out")
    assert [one.name for one in results.entries] == ["top_k"]
    assert results.missing == ("broken, seed 0",)


def test_it_stops_and_goes_on(written: Any, tmp_path: Path) -> None:
    """SIGTERM to the arena reaches the run, which writes a checkpoint; the same command ends it."""
    file = written(methods={"top_k": {"run.steps": 200}}, seeds=[0])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "collegium", "arena", str(file), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    metrics = out / "runs" / "top_k-seed0" / "metrics.jsonl"
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as first:
        while first.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.1)
        first.send_signal(signal.SIGTERM)
        _, errors = first.communicate(timeout=120)
    assert first.returncode == 130, errors
    assert "stopped after step" in errors
    assert not (out / "arena.json").exists()
    again = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "resuming after step" in again.stderr
    assert json.loads(again.stdout)["missing"] == []
