"""Stages: what each is told, that an interrupted call goes on, and one real model through two of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from collegium.benchmarks.shrink import halve
from collegium.compress.recover import recover, shrink_in_stages, stages
from collegium.compress.rewrite import apply_plan
from collegium.errors import ConfigError
from recovering import LENGTH, corpus, pair


def test_stages_take_equal_steps() -> None:
    assert stages(0.5) == [0.75, 0.5]
    assert stages(0.25, 3) == pytest.approx([0.75, 0.5, 0.25])
    assert stages(0.3, 1) == [0.3]
    for keep, count in ((0.0, 2), (1.0, 2), (0.5, 0)):
        with pytest.raises(ConfigError, match="keep"):
            stages(keep, count)


class Fakes:
    """Write an empty folder each time, and remember what was asked."""

    def __init__(self, *, helps: bool = True) -> None:
        self.helps = helps
        self.shrunk: list[tuple[str, float]] = []
        self.recovered: list[tuple[str, int]] = []

    def shrink(self, model: Path, keep: float, out: Path) -> None:
        self.shrunk.append((model.name, keep))
        out.mkdir(parents=True)

    def recover(self, model: Path, tokens: int, out: Path) -> Path:
        self.recovered.append((model.name, tokens))
        if self.helps:
            out.mkdir()
        return out if self.helps else model


def test_each_stage_goes_on_from_the_one_before(tmp_path: Path) -> None:
    fakes = Fakes()
    found = shrink_in_stages(
        Path("source"), 0.5, tmp_path, shrink=fakes.shrink, recover=fakes.recover, tokens=1000, count=2
    )
    assert fakes.shrunk == [("source", 0.75), ("stage-1-recovered", pytest.approx(2 / 3))]
    assert fakes.recovered == [("stage-1", 100), ("stage-2", 900)]
    assert [(one.keep, one.tokens, one.recovered) for one in found] == [
        (0.75, 100, tmp_path / "stage-1-recovered"),
        (0.5, 900, tmp_path / "stage-2-recovered"),
    ]
    three = Fakes()
    shrink_in_stages(
        Path("source"), 0.4, tmp_path / "3", shrink=three.shrink, recover=three.recover, tokens=1000, count=3, early=0.4
    )
    assert [tokens for _, tokens in three.recovered] == [200, 200, 600]


def test_an_interrupted_call_goes_on(tmp_path: Path) -> None:
    fakes = Fakes()
    shrink_in_stages(Path("source"), 0.5, tmp_path, shrink=fakes.shrink, recover=fakes.recover, tokens=1000)
    (tmp_path / "stage-2-recovered").rmdir()
    again = Fakes()
    shrink_in_stages(Path("source"), 0.5, tmp_path, shrink=again.shrink, recover=again.recover, tokens=1000)
    assert (again.shrunk, again.recovered) == ([], [("stage-2", 900)])


def test_where_training_does_not_help_the_shrunk_model_goes_on(tmp_path: Path) -> None:
    fakes = Fakes(helps=False)
    found = shrink_in_stages(Path("source"), 0.5, tmp_path, shrink=fakes.shrink, recover=fakes.recover, tokens=1000)
    assert [name for name, _ in fakes.shrunk] == ["source", "stage-1"]
    assert found[-1].recovered == tmp_path / "stage-2"


@pytest.mark.parametrize(("early", "tokens"), [(0.0, 100), (1.0, 100), (0.1, 1)])
def test_nonsense_is_refused(early: float, tokens: int, tmp_path: Path) -> None:
    fakes = Fakes()
    with pytest.raises(ConfigError, match="early"):
        shrink_in_stages(
            Path("s"), 0.5, tmp_path, shrink=fakes.shrink, recover=fakes.recover, tokens=tokens, early=early
        )


def test_a_real_model_in_two_stages(tmp_path: Path) -> None:
    _, teacher = pair()

    def shrink(model: Path, keep: float, out: Path) -> None:
        plan = halve(model)
        count = round(keep * plan.layers[0].num_experts)
        layers = tuple(one.model_copy(update={"keep": tuple(range(count))}) for one in plan.layers)
        apply_plan(plan.model_copy(update={"layers": layers}), model, out)

    def train(model: Path, tokens: int, out: Path) -> Path:
        found = recover(
            model, teacher, corpus(), out, tokens=tokens, lr=3e-3, batch_size=4, sequence_length=LENGTH,
            kd_shares=(0.5, 0.25), eval_sequences=8, store=tmp_path / "store",
        )  # fmt: skip
        return found.out or model

    found = shrink_in_stages(
        teacher, 0.5, tmp_path / "work", shrink=shrink, recover=train, tokens=8 * 4 * LENGTH, early=0.5
    )
    sizes = [AutoConfig.from_pretrained(one.recovered).num_experts for one in found]
    assert sizes == [6, 4]
    assert found[-1].recovered.name == "stage-2-recovered"
