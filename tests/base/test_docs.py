"""What the documentation says runs, and the README names every verb."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from collegium.cli.main import app
from measure_traces import make_trace

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "docs/examples").glob("*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()  # what `make demo` leaves must not be taken for the shipped model
    arguments = []
    if name in ("read_trace", "see"):
        rng = np.random.default_rng(0)
        experts = {layer: rng.permuted(np.tile(np.arange(8), (120, 1)), axis=1)[:, :2] for layer in (0, 1)}
        sequences = np.repeat(np.arange(6), 20)
        make_trace(
            tmp_path / "trace", experts, 8, sequences=sequences, domains=sequences % 2, domain_names=("chat", "code")
        )
        arguments = [str(tmp_path / "trace")]
    done = subprocess.run(
        [sys.executable, ROOT / f"docs/examples/{name}.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_example_is_shown_on_a_page() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    assert {name for name in EXAMPLES if f'"{name}.py"' in pages} == set(EXAMPLES)


def test_readme_lists_every_verb_and_no_other() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `collegium ([\w-]+)", readme, re.MULTILINE))
    assert listed == {command.name for command in app.registered_commands}


def test_readme_has_two_setup_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.search(r"```console\n(.*?)```", readme, re.DOTALL)
    assert first is not None
    assert [line.split("#")[0].strip() for line in first[1].strip().splitlines()] == ["make demo", "make test"]
