"""The package as a whole: light to import, its catalogue consistent, its command line quick to answer."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import collegium
from collegium import catalog
from collegium.cli.main import app
from collegium.errors import ConfigError

HEAVY = ("torch", "transformers", "polars", "pyarrow", "numba", "matplotlib", "tokenizers", "rich.table")


def loaded_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return set(output.split())


@pytest.mark.parametrize("code", ["import collegium", "import collegium.cli.main"])
def test_import_is_light(code: str) -> None:
    assert not loaded_after(code) & set(HEAVY)


def test_public_names_resolve_to_what_they_say() -> None:
    for name in collegium.__all__:
        assert getattr(collegium, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        collegium.nonsense  # noqa: B018


def test_version_and_unknown_verb() -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).output.strip() == f"collegium {collegium.__version__}"
    assert runner.invoke(app, ["nonsense"]).exit_code == 2


def test_a_users_error_is_one_line_and_status_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "collegium", "methods", "--kind", "nonsense"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "selection" in done.stderr


def test_every_method_is_complete_and_found_by_name() -> None:
    found = catalog.methods()
    assert {m.kind for m in found} <= set(catalog.KINDS)
    for m in found:
        assert m.paper, m.name
        assert m.obj.__doc__, f"{m.module}.{m.name} has no docstring"
        assert catalog.get(m.kind, m.name) is m.obj


def test_methods_verb_speaks_json() -> None:
    result = CliRunner().invoke(app, ["methods", "--kind", "selection", "--json"])
    rows = json.loads(result.output)
    assert {"top_k"} <= {row["name"] for row in rows}
    assert {row["kind"] for row in rows} == {"selection"}


def test_catalogue_refuses_unknown_kinds_and_names() -> None:
    with pytest.raises(ConfigError, match="unknown kind"):
        catalog.method("x", kind="nonsense", paper="none")
    with pytest.raises(ConfigError, match="top_k"):
        catalog.get("selection", "nonsense")


def test_claims_name_catalogued_methods() -> None:
    known = {f"{m.kind}/{m.name}" for m in catalog.methods()}
    claims = catalog.claims()
    assert set(claims) <= known
    for name, claim in claims.items():
        assert claim["status"] in ("holds", "not reproduced"), name
        assert claim["numbers"], name
