from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from collegium.errors import ConfigError
from collegium.train import Recipe, build_model, count_parameters, dense_twin

RECIPES = [file for file in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")) if file.stem != "arena"]
"""A plan of an arena is not one."""
Make = Callable[..., Recipe]


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_shipped_recipes_are_valid_and_survive_a_round_trip(file: Path) -> None:
    recipe = Recipe.load(file)
    assert Recipe.parse(yaml.safe_load(recipe.dump())) == recipe
    assert not recipe.differences(Recipe.parse(yaml.safe_load(recipe.dump())))


def test_overrides_reach_nested_fields_and_new_sections(settings: Callable[..., dict[str, Any]]) -> None:
    recipe = Recipe.parse(
        settings(), ["optim.lr=1e-4", "moe.balance.scope=sequence", "schedule.name=wsd", "run.loggers=[trackio]"]
    )
    assert recipe.optim.lr == 1e-4
    assert recipe.moe is not None
    assert recipe.moe.balance.scope == "sequence"
    assert recipe.schedule.name == "wsd"
    assert recipe.run.loggers == ("trackio",)
    assert Recipe.parse(settings(), ["moe=null"]).moe is None


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optim.lr=fast", r"optim\.lr.*'fast'"),
        ("optim.momentum=0.9", r"optim\.momentum"),
        ("moe.num_experts=1", r"moe: .*num_experts_per_tok = 2 of num_experts = 1"),
        ("moe.balance.scope=planet", r"moe\.balance\.scope.*'planet'"),
        ("run.tokens=5", r"run: .*either steps or tokens"),
        ("model.checkpoint=somewhere", r"model: .*family, hidden_size"),
        ("optim.lr.deep=1", r"lr is not a section"),
        ("optim.lr", r"section\.field=value"),
    ],
)
def test_a_bad_field_is_named(settings: Callable[..., dict[str, Any]], override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Recipe.parse(settings(), [override])


def test_an_unreadable_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        Recipe.load(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("model: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        Recipe.load(tmp_path / "broken.yaml")


def test_tokens_give_steps(settings: Callable[..., dict[str, Any]]) -> None:
    data = settings(run__tokens=1000)
    del data["run"]["steps"]
    assert Recipe.parse(data).steps == 4  # 8 sequences of 32 tokens a step, rounded up


def test_differences_name_what_decides_the_result_only(recipe: Make) -> None:
    assert recipe().differences(recipe(run__steps=99, run__log_every=5, run__checkpoint_every=1)) == []
    assert recipe().differences(recipe(optim__lr=0.5)) == ["optim.lr: 0.003 != 0.5"]
    assert [d.split(":")[0] for d in recipe().differences(recipe(moe__num_experts=8))] == ["moe.num_experts"]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"moe__n_shared_experts": 2, "moe__shared_expert_gate": True},
        {"moe__num_experts": 16, "moe__num_experts_per_tok": 4, "moe__scoring_func": "sigmoid"},
        {"moe__first_k_dense_replace": 1, "model__intermediate_size": 64},
        {"moe__router_bias": True, "model__tie_word_embeddings": False},
    ],
)
def test_the_dense_twin_has_as_many_active_parameters(recipe: Make, overrides: dict[str, Any]) -> None:
    plan = recipe(**overrides)
    twin = dense_twin(plan)
    mixture, dense = count_parameters(build_model(plan)), count_parameters(build_model(twin))
    assert twin.moe is None
    assert dense.total == dense.active
    # never the smaller one, and larger by less than one rounding of the width: 8 columns of 3 matrices in 2 layers
    assert 0 <= dense.total - mixture.active < 8 * 3 * 32 * 2
    assert mixture.active < mixture.total


def test_no_twin_of_a_dense_recipe(recipe: Make) -> None:
    with pytest.raises(ConfigError, match="dense already"):
        dense_twin(recipe(moe=None))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"model__family": "qwen99"}, "qwen99"),
        ({"model__family": "t5", "moe": None}, "t5"),
        ({"model__config": {"hiden_act": "silu"}}, "hiden_act"),
    ],
)
def test_a_model_that_does_not_exist_is_refused(recipe: Make, overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build_model(recipe(**overrides))
