"""`collegium methods`: all of them in a table, one in full, and everything as data."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from collegium.catalog import KINDS, claims, methods
from collegium.cli.main import app
from collegium.errors import ConfigError


def shown(*arguments: str, columns: int = 80) -> str:
    result = CliRunner().invoke(app, ["methods", *arguments], env={"COLUMNS": str(columns)}, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def flat(text: str) -> str:
    """Without the line breaks of a terminal."""
    return " ".join(text.split())


@pytest.mark.parametrize("columns", [80, 160])
def test_the_list_has_every_method_with_paper_module_and_claim(columns: int) -> None:
    output = shown(columns=columns)
    assert max(map(len, output.splitlines())) <= columns
    blocks = re.split(r"\n\n(?=\w+: )", output)
    for kind in {one.kind for one in methods()}:
        [block] = [one for one in blocks if one.lstrip().startswith(f"{kind}: {KINDS[kind]}"[: columns - 5])]
        members = methods(kind)
        assert block.count("no claim test yet") == sum(one.claim is None for one in members)
        for one in members:
            assert re.search(rf"^{one.name}\s", block, re.MULTILINE)
            assert re.search(rf"^{one.module.removeprefix('collegium.')}\s", block, re.MULTILINE)


def test_numbers_are_shown_of_claims_that_hold_too() -> None:
    output = shown("--kind", "balance", columns=1000)
    for name in ("balance/global_batch", "balance/load_balancing"):
        claim = claims()[name]
        assert f"{claim['status']}: {claim['numbers']}" in output
    assert claims()["balance/global_batch"]["status"] == "holds"


def test_one_method_in_full() -> None:
    output = flat(shown("selection/top_p"))
    for words in (
        "selection/top_p Harder Tasks Need More Experts (2024), arXiv 2403.07652",
        "collegium.routing.selection.top_p.TopP",
        "The fewest experts whose selection scores add up to more than `threshold`, at least one.",
        "Formula s sorted, largest first, and of sum 1: expert i is taken while s_1 + ... + s_(i-1) <= threshold",
        "Cost a sort of E scores for each token;",
        "Use it where hard tokens may cost more",
        "Not where the cost of a token must be known",
        "threshold float 0.4 p, above 0 and at most 1.",
        f"Claim {claims()['selection/top_p']['status']}",
    ):
        assert words in output
    assert "global_batch" not in output


def test_a_name_of_several_kinds_shows_all_of_them() -> None:
    both = shown("expert_choice")
    assert "selection/expert_choice" in both
    assert "system/expert_choice" in both
    assert "selection/expert_choice" not in shown("expert_choice", "--kind", "system")


def test_a_setting_without_a_default_is_needed_and_code_keeps_its_lines() -> None:
    assert re.search(r"groups +int +needed", shown("grouped_top_k"))
    assert "\n    Megatron-LM, OLMo-core, Pangu         1 x ours\n" in shown("load_balancing", columns=160)


def test_json_has_everything() -> None:
    rows = json.loads(shown("--json"))
    assert len(rows) == len(methods())
    [row] = json.loads(shown("system/ssr", "--json"))
    assert row in rows
    assert row["arxiv"] == "2511.08972"
    assert set(row["sections"]) == {"Formula", "Cost", "Use it", "Not"}
    assert [one["name"] for one in row["settings"]] == ["probability", "xi", "cost", "noise"]
    assert row["text"].startswith("A softmax router")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no method is named 'top_kk'; did you mean 'top_k'"):
        CliRunner().invoke(app, ["methods", "top_kk"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="lists them all"):
        CliRunner().invoke(app, ["methods", "ssr", "--kind", "cache"], catch_exceptions=False)
