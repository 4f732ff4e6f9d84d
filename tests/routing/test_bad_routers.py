"""Routers that cannot be, and routers that break: refused in words, by the API and by the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from collegium.cli.main import app, main
from collegium.errors import ConfigError, NonFiniteError
from collegium.layer import MoE
from collegium.models import MoEConfig
from collegium.routing import Router, RoutingContext, router_from
from collegium.routing.transforms import DocumentPool, GatingResidual

PLAIN = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

CANNOT_BE = [
    # more experts for a token than there are
    ("num_experts_per_tok=9", "num_experts_per_tok = 9 of num_experts = 8; it is 1 to 8"),
    ("num_experts_per_tok=0", "Input should be greater than or equal to 1"),
    ("router={select: {top_k: 9}}", "top_k is 9 but the layer has 8 experts; it must be 1 to 8"),
    ("router={select: {top_k: 0}}", "top_k is 0 but the layer has 8 experts; it must be 1 to 8"),
    ("router={top_k: 9}", "'top_k' is neither a system nor a key"),
    # groups that do not divide the experts
    ("router={moge: {groups: 3}}", "groups is 3, which does not divide 8 experts into equal groups; take a divisor"),
    ("router={moge: {groups: 0}}", "groups is 0, which does not divide 8 experts"),
    ("router={moge: {groups: 4}}", "top_k is 2, which 4 groups cannot give equal parts of"),
    (
        "router={transforms: [{group_limit: {groups: 3, keep: 1}}]}",
        r"groups \(n_group\) is 3, .* 8 experts .* take a divisor",
    ),
    ("n_group=4", "n_group is 4 and topk_group is None; set both or neither"),
    ("balance.losses=[{device_balance: {groups: 3}}]", "device_balance: 3 groups do not divide 8 experts evenly"),
    # no places, or fewer than none
    ("router={switch: {capacity_factor: 0}}", "capacity_factor must be above 0, not 0.* computes nothing"),
    ("router={gshard: {capacity_factor: -1}}", "capacity_factor must be above 0, not -1"),
    ("router={capacity: {priority: .nan}}", "capacity_factor must be above 0, not nan"),
    ("router={capacity: {random: {eval_capacity_factor: -0.5}}}", "eval_capacity_factor must be above 0, not -0.5"),
    ("router={expert_choice: {capacity_factor: 0}}", "capacity_factor must be above 0 and finite, not 0"),
    ("router={expert_choice: {capacity_factor: .inf}}", "capacity_factor must be above 0 and finite, not inf"),
    ("router={moe_plus_plus: {tau: -1}}", "tau must be above 0 and finite, not -1"),
    ("router={capacity: {two_class: {tau: .inf}}}", "tau must be above 0 and finite, not inf"),
    # a probability that is none
    ("router={select: {top_p: 0}}", "a probability above 0 and at most 1, not 0"),
    ("router={select: {top_p: 1.01}}", "a probability above 0 and at most 1, not 1.01"),
    ("router={select: {top_p: -0.1}}", "a probability above 0 and at most 1, not -0.1"),
    ("router={select: {top_p: .nan}}", "a probability above 0 and at most 1, not nan"),
    ("router={dynamic_moe: {threshold: 1.5}}", "a probability above 0 and at most 1, not 1.5"),
]


def with_field(field: str) -> dict[str, Any]:
    """`PLAIN` with one more field, written as on the command line."""
    path, _, text = field.partition("=")
    *sections, name = path.split(".")
    moe: dict[str, Any] = dict(PLAIN)
    at = moe
    for section in sections:
        at = at.setdefault(section, {})
    at[name] = yaml.safe_load(text)
    return moe


@pytest.mark.parametrize(("field", "words"), CANNOT_BE, ids=[field for field, _ in CANNOT_BE])
def test_what_cannot_be_is_refused_before_anything_is_read(field: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        MoEConfig.model_validate(with_field(field))
    model = {"family": "qwen3", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    plan = {
        "model": {**model, "num_attention_heads": 2},
        "moe": PLAIN,
        "data": {"corpus": str(tmp_path / "no corpus")},
        "run": {"steps": 1},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    arguments = ["train", str(tmp_path / "plan.yaml"), f"moe.{field}", "--out", str(tmp_path / "run")]
    with pytest.raises(ConfigError, match=rf"plan\.yaml: moe.*{words}"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MoE(16, 8, 8, 9), "num_experts_per_tok is 9, it must be from 1 to 8 experts"),
        (lambda: MoE(16, 8, 6, 9, zero_experts=["zero"] * 2), "num_experts_per_tok is 9, it must be from 1 to 8"),
        (
            lambda: MoE(16, 8, 8, 2, router={"n_group": 3, "topk_group": 1}),
            r"groups \(n_group\) is 3, which does not divide 8",
        ),
        (lambda: Router(16, 8, 2, num_true=9), "9 of 8 experts cannot compute something; it is 1 to all of them"),
        (lambda: MoE(16, 8, 8, 2, router=Router(16, 4, 2)), "2 of 4 experts, the layer for width 16 and 2 of 8"),
    ],
)
def test_layers_of_ones_own_are_refused_alike(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_router_that_looks_at_documents_says_which_layer_has_none_and_how_to_give_them() -> None:
    layer = MoE(16, 8, 8, 2, router=Router(16, 8, 2, transforms=[DocumentPool(2, 4)]), layer_index=5)
    with pytest.raises(ConfigError, match=r"DocumentPool needs RoutingContext\.document, .* layer 5; .*use_context"):
        layer.train()(torch.randn(3, 16))
    layer(torch.randn(3, 16), RoutingContext(document=torch.zeros(3, dtype=torch.int64)))
    assert layer.eval()(torch.randn(3, 16)).isfinite().all(), "at inference there is no pool"


def test_a_router_that_looks_back_at_other_experts_says_so() -> None:
    layers = [MoE(16, 8, E, 2, router=Router(16, E, 2, transforms=[GatingResidual()])) for E in (4, 8)]
    x = torch.randn(3, 16)
    before = layers[0].gate
    before.keep_logits = True
    with pytest.raises(ConfigError, match=r"(?s)4.*8|8.*4"):
        layers[1](x, RoutingContext(previous=before(x)))


# Routers that break


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ({}, torch.nan),
        ({}, torch.inf),
        ({"score": "sigmoid", "transforms": ["bias"]}, torch.nan),
        ({"select": {"top_p": 0.5}}, torch.nan),
        ({"capacity": "priority"}, torch.nan),
        ({"select": "expert_choice"}, torch.nan),
        ({"transforms": ["logit_selection"], "weigh": "softmax_selected"}, torch.nan),
    ],
    ids=str,
)
def test_logits_that_are_not_finite_are_caught_in_the_layer_that_made_them(said: dict[str, Any], value: float) -> None:
    layers = [MoE(16, 8, 8, 2, router=router_from(said, 16, 8, 2), layer_index=n) for n in range(3)]
    for layer in layers:
        layer.reset_parameters(0.3)
    with torch.no_grad():
        layers[1].gate.weight[:, 2] = value
    for training in (True, False):
        x = layers[0].train(training)(torch.ones(4, 16))
        with pytest.raises(NonFiniteError, match="layer 1: router gives NaN or infinity; see its weights and input"):
            layers[1].train(training)(x)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that trains on a few lines of text in a second."""
    folder = tmp_path_factory.mktemp("bad")
    for split, count in (("train", 24), ("valid", 4)):
        (folder / "corpus" / split / "lines").mkdir(parents=True)
        for n in range(count):
            text = " ".join(f"{split} line {n * m}" for m in range(40))
            (folder / "corpus" / split / "lines" / f"{n}.txt").write_text(text, encoding="utf-8")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    recipe = {
        "model": {"family": "qwen3", **sizes, "num_key_value_heads": 1, "head_dim": 16},
        "moe": PLAIN,
        "data": {
            "corpus": str(folder / "corpus"),
            "vocab_size": 300,
            "sequence_length": 32,
            "cache": str(folder / "cache"),
        },
        "run": {"steps": 3, "batch_size": 4},
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "plan.yaml"


def trained(plan: Path, out: Path, *fields: str) -> None:
    arguments = ["train", str(plan), *fields, "--out", str(out), "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert json.loads(result.stdout)["interrupted"] is False


def test_training_that_breaks_names_step_and_layer(plan: Path, tmp_path: Path) -> None:
    words = r"step 2: layer 0: router gives NaN or infinity.* latest checkpoint with a lower optim\.lr"
    with pytest.raises(NonFiniteError, match=words):
        trained(plan, tmp_path, "optim.lr=1e38", "schedule.warmup=0")
    assert not (tmp_path / "model").exists()


def test_a_model_folder_with_a_broken_router_is_refused_by_tensor(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(plan, tmp_path / "good")
    folder = tmp_path / "good" / "model"
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.gate.weight"
    tensors[name][3, 5] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    recipe = yaml.safe_load(plan.read_text())
    del recipe["moe"]
    recipe["model"] = {"checkpoint": str(folder)}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(recipe))
    # as a user sees it: one line, and status 2
    monkeypatch.setattr("sys.argv", ["collegium", "train", str(tmp_path / "more.yaml"), "-o", str(tmp_path / "more")])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert said.startswith("collegium: error: ")
    assert name in said
    assert str(file) in said
    assert not (tmp_path / "more" / "model").exists()
