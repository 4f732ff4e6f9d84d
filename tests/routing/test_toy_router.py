"""A router is added with one file: the example of CONTRIBUTING.md, put into a copy of the package, does all it says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import collegium

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTION = GUIDE.partition("### A whole router in one file\n")[2].partition("\n### ")[0]
FILES = dict(re.findall(r'^```python title="([^"]+)"\n(.*?)^```$', SECTION, re.DOTALL | re.MULTILINE))
COMMANDS = re.findall(r"^\$ collegium (.*)$", SECTION, re.MULTILINE)
METHOD, CHECKS = "src/collegium/systems/near_best.py", "check_near_best.py"


def files(package: Path) -> set[Path]:
    return {path.relative_to(package) for path in package.rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package and the one file more; beside it the recipes and a little text."""
    folder = tmp_path_factory.mktemp("house")
    package = Path(collegium.__file__).parent
    shutil.copytree(package, folder / "src/collegium")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / METHOD).write_text(FILES[METHOD], encoding="utf-8")
    for split in ("train", "valid"):
        text = folder / "text" / split / "numbers"
        text.mkdir(parents=True)
        for first in range(20):
            (text / f"{first}.txt").write_text(" ".join(map(str, range(first, first + 300))), encoding="utf-8")
    assert files(folder / "src/collegium") - files(package) == {Path("systems/near_best.py")}
    return folder


def python(house: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(house / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=house, env=env, capture_output=True, text=True, check=False, timeout=600
    )


def test_the_example_is_listed_and_trains_as_the_guide_says(house: Path) -> None:
    listed, trained = (shlex.split(command) for command in COMMANDS)
    listing = python(house, "-m", "collegium", *listed)
    # of less text than the recipe's, so that it takes seconds
    text = ("data.corpus=text", "data.options={}", "data.vocab_size=280", "data.cache=cache")
    training = python(house, "-m", "collegium", *trained, *text)
    assert listing.returncode == 0, listing.stderr
    for words in ("selection/near_best", "system/near_best", "Formula", "share max_i s_i", "no claim test yet"):
        assert words in listing.stdout
    assert training.returncode == 0, training.stderr
    recipe = (house / "runs/near_best/recipe.yaml").read_text(encoding="utf-8")
    assert "near_best" in recipe
    assert (house / "runs/near_best/model/model.safetensors").is_file()


def test_the_example_passes_the_checks_and_a_broken_one_is_told_why(house: Path) -> None:
    done = python(house, "-c", FILES[CHECKS])
    assert done.returncode == 0, done.stderr
    broken = FILES[METHOD].replace("scores.selection.topk(", "scores.selection.roll(-1, 0).topk(")  # the next token's
    assert broken != FILES[METHOD]
    (house / METHOD).write_text(broken, encoding="utf-8")
    try:
        done = python(house, "-c", FILES[CHECKS])
    finally:
        (house / METHOD).write_text(FILES[METHOD], encoding="utf-8")
    assert done.returncode == 1
    assert "AssertionError: check_causality: it looks at later tokens" in done.stderr
