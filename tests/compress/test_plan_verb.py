"""``collegium plan``: from statistics to a file, and looking at such files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shrinking import batches
from typer.testing import CliRunner

from collegium.cli import main
from collegium.cli._planning import _size
from collegium.cli.main import app
from collegium.cli.plan import _ranges
from collegium.compress.collectors import collectors_for
from collegium.compress.plan import Plan
from collegium.compress.target import Target
from collegium.errors import ConfigError
from collegium.measure.collect import collect
from collegium.models.checkpoint import open_checkpoint
from tiny import tiny_model


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and statistics of it."""
    root = tmp_path_factory.mktemp("plan")
    model = tiny_model("mixtral")
    model.save_pretrained(root / "model")
    checkpoint = open_checkpoint(root / "model")
    found = collect(
        model, batches(), collectors_for("reap", "frequency"), domains=("code", "prose"), data="numbers",
        name=str(root / "model"), fingerprint=checkpoint.fingerprint,
    )  # fmt: skip
    found.save(root / "stats")
    return root / "model", root / "stats"


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr("sys.argv", ["collegium", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_plan_is_made_written_and_shown(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, stats = folders
    shown = run("plan", stats, "--keep", 0.5, "--method", "reap", "--pin", "1:3", "--out", tmp_path / "plan.json")
    assert "keeps 8 of 16 experts" in shown
    assert "score reap" in shown
    assert f"written to {tmp_path / 'plan.json'}" in shown
    plan = Plan.load(tmp_path / "plan.json")
    plan.check(Target.of(open_checkpoint(model)))
    assert plan.layers[1].protected == (3,)
    assert all(len(one.keep) == 4 for one in plan.layers)
    again = run("plan", "show", tmp_path / "plan.json")
    assert again == shown.replace(f"written to {tmp_path / 'plan.json'}\n", "")
    record = json.loads(run("plan", "show", tmp_path / "plan.json", "--json"))
    assert record["uniform"]
    assert record["reached"]["experts"] == 8
    assert record["layers"][1]["keep"] == list(plan.layers[1].keep)
    assert record["layers"][1]["expected"] == plan.layers[1].expected


def test_two_plans_are_compared(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, stats = folders
    run("plan", stats, "--out", tmp_path / "a.json")
    run("plan", stats, "-m", "random", "--set", "score.seed=3", "--out", tmp_path / "b.json")
    shown = run("plan", "diff", tmp_path / "a.json", tmp_path / "b.json")
    assert "method: reap -> random" in shown
    record = json.loads(run("plan", "diff", tmp_path / "a.json", tmp_path / "b.json", "--json"))
    assert record["fields"]["method"] == ["reap", "random"]
    assert 0 < record["overlap"] < 1
    same = json.loads(run("plan", "diff", tmp_path / "a.json", tmp_path / "a.json", "--json"))
    assert same == {"fields": {}, "layers": [], "overlap": 1.0}


@pytest.mark.parametrize(
    ("options", "planner", "kept"),
    [
        (["--bytes", "0.1MB"], "budget", None),
        (["--parameters", "0.7"], "budget", None),
        (["--planner", "global_floor", "--keep", "0.5", "--floor", "3"], "global_floor", 8),
        (["--domain", "prose", "--combine", "any", "--no-protect", "--mtp", "drop"], "uniform", 8),
    ],
    ids=["bytes", "parameters", "global", "domain"],
)
def test_every_planner_is_reached(
    folders: tuple[Path, Path], options: list[str], planner: str, kept: int | None
) -> None:
    record: dict[str, Any] = json.loads(run("plan", folders[1], "--model", folders[0], *options, "--json"))
    assert record["planner"] == planner
    assert kept is None or record["reached"]["experts"] == kept
    if "--bytes" in options:
        assert record["reached"]["nbytes"] <= 100_000
    if "--parameters" in options:
        assert record["reached"]["parameters"] <= 0.7 * record["reached"]["of_parameters"]
    if "--domain" in options:
        assert (record["domains"], record["mtp"], record["settings"]["combine"]) == (["prose"], "drop", "any")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "0.1"], "keep 0.1 leaves layer 0 with 1 of 8 experts"),
        (["--keep", "0.5", "--bytes", "1GB"], "exclude each other"),
        (["--bytes", "lots"], "'lots' is no size"),
        (["--planner", "magic"], "--planner 'magic' is none of uniform, global_floor"),
        (["--planner", "global_floor", "--bytes", "1GB"], "takes a share"),
        (["--floor", "3"], "--floor is a setting of the planner global_floor"),
        (["--method", "easy_ep"], "importance 'easy_ep' needs easy_sum"),
        (["--method", "magic"], "no importance is named 'magic'"),
        (["--set", "score.seed=3"], "importance 'reap' has no setting 'seed'"),
        (["more"], "is none of STATS, show PLAN, diff PLAN PLAN"),
        (["--set", "nonsense"], "must be PART.NAME=VALUE"),
        (["--set", "planner.keep=1"], "PART one of score, merge"),
        (["--merge", "average"], "name a grouping"),
        (["--grouping", "mc_smoe"], "name a merge"),
        (["--merge", "magic"], "no merge is named 'magic'"),
        (["--merge", "average", "--grouping", "random", "--set", "grouping.seeed=1"], "no setting 'seeed'"),
        (["--router", "magic"], "no router_edit is named 'magic'"),
        (["--neurons", "0.5"], "neuron score 'heapr' needs"),
        (["--neurons", "0.5", "--keep", "0.5"], "does not go with --keep"),
        (["--neurons", "0.5", "-m", "random", "--widths", "odd"], "--widths 'odd' is none of"),
        (["--factor", "magic"], "no factor is named 'magic'"),
        (["--combine", "mean"], "--combine 'mean' is none of"),
        (["--mtp", "guess"], "--mtp 'guess' is none of refuse, keep, drop"),
        (["--pin", "1-3"], "must be LAYER:EXPERT"),
        (["--pin", "1:9"], "a pin names expert 9 of layer 1, which has 8"),
        (["--domain", "maths"], "domains are code, prose"),
        (["--model", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused(
    folders: tuple[Path, Path], options: list[str], message: str, capsys: Any, monkeypatch: Any
) -> None:
    assert message in refused(capsys, monkeypatch, "plan", folders[1], *options)


def test_files_are_not_replaced_unasked(
    folders: tuple[Path, Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    (tmp_path / "plan.json").write_text("mine")
    assert "--overwrite" in refused(capsys, monkeypatch, "plan", folders[1], "--out", tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == "mine"
    run("plan", folders[1], "--out", tmp_path / "plan.json", "--overwrite")
    assert Plan.load(tmp_path / "plan.json").reached.experts == 8
    assert "show PLAN" in refused(capsys, monkeypatch, "plan")
    assert "no statistics" in refused(capsys, monkeypatch, "plan", tmp_path)


def test_statistics_of_a_model_that_is_elsewhere(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    collect(tiny_model("mixtral"), batches(1), [], domains=("a", "b"), name="org/model").save(tmp_path / "stats")
    said = refused(capsys, monkeypatch, "plan", tmp_path / "stats")
    assert "the statistics are of 'org/model', which is no folder here; name the model with --model" in said


def test_sizes_and_ranges() -> None:
    assert (_size("14GB"), _size("1.5 GiB"), _size("1000"), _size("2tb")) == (14 * 10**9, 3 << 29, 1000, 2 * 10**12)
    for wrong in ("", "GB", "-1GB", "1 gigabyte", "nan"):
        with pytest.raises(ConfigError):
            _size(wrong)
    assert _ranges((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"
    assert _ranges(()) == "-"
