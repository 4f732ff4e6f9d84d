"""``collegium shrink``: from a checkpoint to a smaller one and a page about it; stopped anywhere, it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from folders import TEXTS, model_folder
from test_inspect import refused
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from collegium.cli import _shrink
from collegium.cli.main import app
from collegium.compress import judge_memory
from collegium.compress.plan import Plan
from collegium.compress.rewrite_config import EDIT

STAGES = ("_calibrate", "_plan", "_predict", "_apply", "_evaluate")


@cache
def corpus() -> Path:
    """The documents of `TEXTS`, and of each domain one more that is held out, and one to watch training by."""
    root = Path(mkdtemp(prefix="corpus-"))
    for domain, texts in TEXTS.items():
        held_out = [("test", texts[0] + texts[1]), ("valid", texts[1] + texts[0])]
        for number, (split, text) in enumerate([*(("train", text) for text in texts), *held_out]):
            file = root / split / domain / f"{number}.txt"
            file.parent.mkdir(exist_ok=True, parents=True)
            file.write_text(text)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models"))


def run(model: Path, out: Path, *arguments: object) -> Any:
    command = ["shrink", model, "--data", corpus(), "--out", out, *arguments]
    return CliRunner().invoke(app, list(map(str, command)), env={"COLUMNS": "160"})


def record(model: Path, out: Path, *arguments: object) -> dict[str, Any]:
    result = run(model, out, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_half_of_the_experts(model: Path, tmp_path: Path) -> None:
    found = record(model, tmp_path / "small", "--pin", "0:3")
    small, info = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info.values())
    assert small.config.num_experts == 4
    assert small.num_parameters() == found["parameters"] < found["of_parameters"]
    assert (found["experts"], found["of_experts"]) == (8, 16)
    predicted, measured = found["predicted"], found["measured"]
    assert predicted["overall"]["loss"]["value"] == pytest.approx(measured["overall"]["loss"]["value"], abs=1e-5)
    assert measured["overall"]["whole_loss"] != measured["overall"]["loss"]["value"]
    assert {one["domain"] for one in measured["domains"]} == set(TEXTS)
    assert measured["overall"]["documents"] == 2, "only what is held out"
    plan = Plan.load(tmp_path / "small.work" / "plan.json")
    assert 3 in plan.layers[0].protected
    assert "split train" in plan.data[0]
    page = (tmp_path / "small.work" / "page.html").read_text()
    assert f"{measured['overall']['loss']['value']:.4f}" in page
    assert found["left_out"] == []
    assert {file.name for file in (tmp_path / "small.work").iterdir()} == {
        "request.json", "statistics", "plan.json", "prediction.json", "evaluation.json", "page.html",
    }  # fmt: skip


def test_what_it_says(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path / "small", "--method", "frequency")
    assert result.exit_code == 0, result.output
    assert "Is it what was predicted? yes" in result.stdout
    assert str(tmp_path / "small.work" / "page.html") in result.stdout
    assert "calibrate ..." in result.stderr


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_stopped_run_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, when: str
) -> None:
    out = tmp_path / "small"
    ran: list[str] = []
    with monkeypatch.context() as patch:
        _count(patch, ran)
        original: Callable[..., Any] = getattr(_shrink._Run, stage)

        def stop(self: Any, *args: Any) -> Any:
            if when == "after":
                original(self, *args)
            raise KeyboardInterrupt

        patch.setattr(_shrink._Run, stage, stop)
        result = run(model, out)
        assert result.exit_code == 130
        assert "the same command goes on" in result.stderr
    with monkeypatch.context() as patch:
        _count(patch, ran)
        found = record(model, out)
    assert sorted(ran) == sorted(set(ran)), "nothing is done twice"
    assert set(ran) == {"calibrate", "make_asked", "apply_plan", "judge predicted", "judge measured"}
    assert found["predicted"]["overall"]["loss"]["value"] == pytest.approx(
        found["measured"]["overall"]["loss"]["value"]
    )


def _count(patch: pytest.MonkeyPatch, ran: list[str]) -> None:
    """Note which of the costly functions run to their end."""

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(_shrink, name)

        def call(*args: Any, **options: Any) -> Any:
            found = function(*args, **options)
            kind = ("predicted" if options.get("plan") else "measured") if name == "judge_folders" else ""
            ran.append(f"judge {kind}" if kind else name)
            return found

        return call

    for name in ("calibrate", "make_asked", "apply_plan", "judge_folders"):
        patch.setattr(_shrink, name, counted(name))


def test_a_finished_run_is_not_done_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(model, tmp_path / "small")
    ran: list[str] = []
    _count(monkeypatch, ran)
    found = record(model, tmp_path / "small")
    assert ran == []
    assert found["measured"]["overall"]["loss"]["value"] > 0


def test_where_memory_is_short_the_page_says_what_is_missing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_memory, "available_bytes", lambda: 1000)
    result = run(model, tmp_path / "small", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["predicted"] is None
    assert found["measured"] is None
    assert "warning: the loss was not predicted" in result.stderr
    assert "warning: the result was not measured" in result.stderr
    page = (tmp_path / "small.work" / "page.html").read_text()
    for note in found["left_out"]:
        assert note[1:] in page
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.num_experts == 4
    monkeypatch.undo()
    assert record(model, tmp_path / "small")["measured"] is not None, "with more memory it goes on"


def test_where_only_the_result_fits_it_is_measured_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = record(model, tmp_path / "first")
    monkeypatch.setattr(judge_memory, "available_bytes", lambda: int(1.21 * small["nbytes"]))
    found = record(model, tmp_path / "small")
    assert found["predicted"] is None
    assert found["measured"]["whole"] is None
    assert found["measured"]["overall"]["loss"] == small["measured"]["overall"]["loss"]
    assert any("not compared with the original" in note for note in found["left_out"])


def test_experts_are_merged(model: Path, tmp_path: Path) -> None:
    found = record(model, tmp_path / "small", "--merge", "average", "--grouping", "mc_smoe", "--router", "freq_avg",
                   "--set", "router.rescale=false")  # fmt: skip
    plan = Plan.load(tmp_path / "small.work" / "plan.json")
    assert plan.operator is not None
    assert (plan.operator.name, plan.router.mode, plan.router.settings) == ("average", "freq_avg", {"rescale": False})
    assert {one.op for one in plan.layers} == {"merge"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.num_experts == 4
    assert found["predicted"] is None
    assert any("which no mask can do" in note for note in found["left_out"])
    assert found["measured"]["layers"][0]["present"]["value"] == 1, "every expert is in a new one"
    assert found["measured"]["layers"][0]["agreement"]["value"] < 1


def test_experts_become_slimmer(model: Path, tmp_path: Path) -> None:
    found = record(model, tmp_path / "small", "--neurons", 0.5)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert (small.config.num_experts, small.config.moe_intermediate_size) == (8, 8)
    assert Plan.load(tmp_path / "small.work" / "plan.json").method == "heapr"
    assert found["measured"]["layers"][0]["agreement"]["value"] == 1
    assert found["measured"]["layers"][0]["output_error"]["value"] > 0
    page = (tmp_path / "small.work" / "page.html").read_text()
    assert "neurons of experts" in page
    assert "Every expert stayed." in page


@pytest.mark.parametrize(
    "ways",
    [("--planner", "global_floor", "--keep", "0.7", "--floor", "3"), ("--neurons", "0.6", "--widths", "ragged")],
)
def test_layers_that_differ_need_our_own_format(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ways: tuple[str, ...],
) -> None:
    arguments = ("shrink", model, "--data", corpus(), "--out", tmp_path / "small", *ways)
    assert "--own" in refused(monkeypatch, capsys, *arguments)
    found = record(model, tmp_path / "small", *ways, "--own")
    assert not Plan.load(tmp_path / "small.work" / "plan.json").portable
    assert found["parameters"] < found["of_parameters"]
    if found["predicted"] is not None:
        predicted, measured = (found[kind]["overall"]["loss"]["value"] for kind in ("predicted", "measured"))
        assert predicted == pytest.approx(measured, abs=1e-5)
    assert found["measured"]["overall"]["whole_loss"] != found["measured"]["overall"]["loss"]["value"]


def test_what_was_lost_is_regained(model: Path, tmp_path: Path) -> None:
    found = record(model, tmp_path / "small", "--recover", 6000, "--sequence-length", 16)
    assert found["recovered"]["overall"]["loss"]["value"] < found["measured"]["overall"]["loss"]["value"]
    assert found["predicted"]["overall"]["loss"]["value"] == pytest.approx(
        found["measured"]["overall"]["loss"]["value"]
    )
    assert found["recovered"]["layers"][0]["present"]["value"] < 1, "the maps lead through the training"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.num_experts == 4
    assert not (tmp_path / "small.work" / "shrunk").exists()
    again = record(model, tmp_path / "small", "--recover", 6000, "--sequence-length", 16)
    assert again["recovered"] == found["recovered"]


def test_training_that_does_not_help_changes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nothing:
        out = None

    monkeypatch.setattr(_shrink, "recover", lambda *args, **options: Nothing)
    found = record(model, tmp_path / "small", "--recover", 100)
    assert found["recovered"] is None
    assert any("did not lower the loss" in note for note in found["left_out"])
    assert json.loads((tmp_path / "small" / EDIT).read_text())["kind"] == "shrink"


def test_bad_input_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: object, model: Path = model, data: Path = corpus(), out: str = "small") -> str:  # noqa: B008
        return refused(monkeypatch, capsys, "shrink", model, "--data", data, "--out", tmp_path / out, *arguments)

    assert "its router chooses 2" in error("--keep", "0.1")
    assert "leaves layer 0 with" in error("--parameters", "0.01")
    assert "above 0 and up to 1" in error("--keep", "1.5")
    assert "experts [0, 1, 2, 3, 4] are protected" in error("--pin", "1:0,1,2,3,4")
    assert "layer 9 has no experts" in error("--pin", "9:0")
    assert "no importance is named 'magic'" in error("--method", "magic")
    assert "exclude each other" in error("--keep", "0.5", "--parameters", "0.9")
    assert "no merge is named 'magic'" in error("--merge", "magic")
    assert "no grouping is named 'magic'" in error("--merge", "average", "--grouping", "magic")
    assert "say how with --merge" in error("--grouping", "mc_smoe")
    assert "say of which with --grouping" in error("--merge", "average")
    assert "must be PART.NAME=VALUE" in error("--set", "seed=3")
    assert "no setting" in error("--merge", "average", "--grouping", "mc_smoe", "--set", "merge.magic=1")
    assert "no router_edit is named 'magic'" in error("--router", "magic")
    assert "collegium's own loader" in error("--router", "many_to_one")
    assert "leave out --keep" in error("--neurons", "0.5", "--keep", "0.5")
    assert "leave out --merge" in error("--neurons", "0.5", "--merge", "average")
    assert "above 0 and up to 1, not 1.5" in error("--neurons", "1.5")
    assert "no neurons is named 'reap'" in error("--neurons", "0.5", "--method", "reap")
    assert "how many tokens with --recover" in error("--stages", "2")
    assert "share of the experts to keep" in error("--stages", "2", "--recover", "100", "--parameters", "0.9")
    assert "--pin has no meaning" in error("--stages", "2", "--recover", "100", "--pin", "1:0")
    dense = model_folder(tmp_path / "dense", "qwen3")
    assert "has no routed experts" in error(model=dense)
    (tmp_path / "empty").mkdir()
    assert "is empty" in error(data=tmp_path / "empty")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "text.txt").write_text("a single document")
    assert "no document in its test split" in error(data=tmp_path / "one")
    assert "domain" in error("--domain", "poems")
    assert not (tmp_path / "small").exists()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    assert "there exists" in error(out="there")
    assert (tmp_path / "there" / "file").read_text() == "mine"
    assert "holds no work of this command" in error("--work", tmp_path / "there", out="other")


def test_another_request_needs_another_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(model, tmp_path / "small")
    command = ("shrink", model, "--data", corpus(), "--out")
    work = ("--work", tmp_path / "small.work")
    assert "was 'reap' and is 'frequency'" in refused(
        monkeypatch, capsys, *command, tmp_path / "other", *work, "--method", "frequency"
    )
    assert f"{tmp_path / 'small'} exists" in refused(monkeypatch, capsys, *command, tmp_path / "small", "--fresh")
    edit = tmp_path / "small" / EDIT
    edit.write_text(edit.read_text().replace('"reap"', '"frequency"'))
    assert f"{tmp_path / 'small'} exists" in refused(monkeypatch, capsys, *command, tmp_path / "small")
    assert record(model, tmp_path / "other", *work, "--method", "frequency", "--fresh")["of_experts"] == 16


def test_stages_shrink_and_train_in_turn(model: Path, tmp_path: Path) -> None:
    found = record(model, tmp_path / "small", "--stages", 2, "--recover", 6000, "--sequence-length", 16)
    assert found["experts"] / found["of_experts"] == pytest.approx(2 / 3), "of the 6 that the first stage left, 4 stay"
    assert found["recovered"]["overall"]["loss"]["value"] < found["measured"]["overall"]["loss"]["value"]
    assert found["recovered"]["layers"][0]["present"]["value"] < 1, "the maps lead through both stages"
    assert any("2 stages (75%, 50% of the experts)" in note for note in found["left_out"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.num_experts == 4
    assert not (tmp_path / "small.work" / "stages").exists()
