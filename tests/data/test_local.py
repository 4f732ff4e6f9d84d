"""The local corpus: which file ends in which domain, what is left out, and that it is always the same."""

from __future__ import annotations

import pickle
import struct
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from collegium.data import Corpus, Document
from collegium.data.extract import catalogue_strings, pickled_strings, split_python
from collegium.data.local import LocalSource, installed_roots

CODE = '''"""What this module is for, told at such length that it counts as prose and not as a name."""

import os

def area(r):
    """The area of a circle of radius r, in the square of the unit that r is given in, whichever."""
    return 3.14159 * r * r

class Empty:
    """No."""
'''


def catalogue(*pairs: tuple[str, str]) -> bytes:
    """A minimal GNU .mo file."""
    strings = [text.encode() for column in zip(*pairs, strict=True) for text in column]
    count, at = len(pairs), 28 + 16 * len(pairs)
    table = b""
    for raw in strings:
        table += struct.pack("<2I", len(raw), at)
        at += len(raw) + 1
    return struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0) + table + b"\0".join(strings) + b"\0"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    licence = "Permission is granted to anybody, for any purpose, without any warranty of any kind whatsoever."
    files: dict[str, str | bytes] = {
        "pack/area.py": CODE,
        "pack/broken.py": "def (:\n" * 20,
        "pack/area.h": "#pragma once\n" + "double area(double r);\n" * 5,
        "pack/page.html": "<html><body>" + "<p>Hello there.</p>" * 5,
        "pack/app.js": "function add(a, b) { return a + b }\n" * 3,
        "pack/data.csv": "\n".join(f"{n},{n * n},{n**3}" for n in range(50)),
        "pack/names.csv": "name,colour\n" * 20,
        "pack/cases.txt": "\n".join(f"{n} {n / 7:.6f}" for n in range(50)),
        "pack/README.md": "This package computes the areas of circles, and of nothing else at all. " * 2,
        "pack/ru.txt": "Этот файл написан по-русски и поэтому относится к языкам. " * 3,
        "pack/settings.toml": '[tool]\nname = "circle"\nversion = "1.2.3"\nother = "none of your business"\n',
        "pack/ru.mo": catalogue(("", "Content-Type: text/plain"), ("Hello", "Здравствуйте " * 8)),
        "pack/binary.txt": b"\0" * 100,
        "pack/tiny.txt": "hi",
        "pack-1.0.dist-info/LICENSE": "Copyright 2020 A\n" + licence,
        "pack-1.0.dist-info/METADATA": "Name: pack\nLicense: x\n\nA long description of the package, for the index."
        * 2,
        "pack-1.0.dist-info/RECORD": "pack/area.py,sha256=0123456789,100\n" * 20,
        "other-2.0.dist-info/licenses/LICENSE.txt": "Copyright (c) 1999 B\n" + licence.replace(" ", "\n"),
        "pack/__pycache__/area.py": "x = 1  # nothing in a cache folder is a source, whatever its name may say\n",
        "site-packages/foreign.py": "x = 1  # another environment's packages below the standard library do not count\n",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path


def collect(*roots: Path, budget: int = 100_000, least: int = 1) -> LocalSource:
    return LocalSource(roots, max_bytes_per_domain=budget, min_bytes_per_domain=least)


def test_every_kind_of_file_ends_in_its_domain(tree: Path) -> None:
    source = collect(tree)
    found: dict[str, set[str]] = {}
    for document in source.documents:
        found.setdefault(document.domain, set()).add(document.name)
    one_licence = found.pop("licences")
    assert len(one_licence) == 1
    assert found == {
        "python": {"pack/area.py"},
        "prose": {"pack/area.py#docstrings", "pack/README.md", "pack-1.0.dist-info/METADATA"},
        "c": {"pack/area.h"},
        "markup": {"pack/page.html"},
        "javascript": {"pack/app.js"},
        "numbers": {"pack/data.csv", "pack/cases.txt"},
        "languages": {"pack/ru.txt", "pack/ru.mo"},
        "config": {"pack/settings.toml"},
    }
    assert source.skipped == {
        "Python that does not parse": 1,
        "not UTF-8 text": 1,
        "shorter than 64 bytes": 1,
        "repeated": 1,
    }


def test_code_and_docstrings_share_nothing() -> None:
    parts = split_python(CODE)
    assert parts is not None
    code, prose = parts
    assert '"""' not in code
    assert "return 3.14159 * r * r" in code
    assert prose.startswith("What this module")
    assert "square of the unit" in prose
    assert "No." not in prose
    compile(code.replace("class Empty:", "class Empty: pass"), "code", "exec")


@pytest.mark.parametrize(
    "source",
    [
        'def f(): """A docstring on the line of its function, which stays where it is, because of that."""\n',
        "class A:\n    x = 1; '''not the first statement, and therefore not a docstring of anything at all'''\n",
        "if True:\n    def g():\n        r'''Größe: a docstring with letters of two bytes, which stays.'''; x = 1\n",
        "def f():\n    f'''{1} not a docstring since it is formatted, whatever else it may look like to you'''\n",
    ],
)
def test_removing_docstrings_never_cuts_code(source: str) -> None:
    parts = split_python(source)
    assert parts == (source, "")


def test_half_a_surrogate_pair_in_a_docstring_is_replaced(tmp_path: Path) -> None:
    docstring = "About \\ud800 and other escapes that are legal in a string of Python but are no text at all."
    (tmp_path / "a.py").write_text(f'"""{docstring}"""\n')
    (document,) = collect(tmp_path).documents
    assert document.text.startswith("About ? and")


def test_it_is_the_same_whatever_the_order_of_roots_and_folders(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collegium.data import local

    first = collect(tree / "pack", tree)
    walk = local.os.walk

    def backwards(root: Path) -> object:
        for folder, below, files in walk(root):
            yield folder, below, files[::-1]

    monkeypatch.setattr(local.os, "walk", backwards)
    second = collect(tree, tree / "pack")
    assert first.documents == second.documents
    assert Corpus("a", first).fingerprint() == Corpus("b", second).fingerprint()


def test_budget_cuts_at_lines_and_never_exceeds(tmp_path: Path) -> None:
    for number in range(20):
        text = "".join(f"#define NUMBER_{number}_{line} {line}\n" for line in range(100))
        (tmp_path / f"{number}.h").write_text(text)
    documents = collect(tmp_path, budget=5000).documents
    sizes = [len(d.text.encode()) for d in documents]
    assert 4900 < sum(sizes) <= 5000
    assert all(d.text.endswith("\n") for d in documents)
    larger = {d.name for d in collect(tmp_path, budget=10_000).documents}
    assert {d.name for d in documents} <= larger


def test_a_thin_domain_is_left_out_and_said_so(tree: Path) -> None:
    source = collect(tree, least=200)
    assert "javascript" not in {d.domain for d in source.documents}
    assert source.skipped["in javascript, under 200 bytes in all"] == 1


def test_locale_tables_give_words_without_running_pickle(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return pytest.fail, ("a pickle was executed",)

    assert "слово" in pickled_strings(pickle.dumps(["слово", Bomb(), 3], protocol=2))
    assert pickled_strings(b"\x80\x02garbage") == []
    for number in range(20):
        words = {"shared_key": [f"слово{number}_{i}" for i in range(200)]}
        (tmp_path / f"{number}.dat").write_bytes(pickle.dumps(words, protocol=4))
    documents = collect(tmp_path).documents
    assert {d.domain for d in documents} == {"languages"}
    assert not any("shared_key" in d.text for d in documents)


def test_catalogue_strings_survive_damage() -> None:
    raw = catalogue(("", "header"), ("a", "один"), ("b\0bs", "два\0три"))
    assert catalogue_strings(raw) == ["один", "два", "три"]
    for length in range(len(raw)):
        catalogue_strings(raw[:length])
    assert catalogue_strings(raw[:4] + b"\xff" * 60) == []


def test_a_sample_of_what_is_really_installed() -> None:
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    assert stdlib in installed_roots()
    source = LocalSource([stdlib / "email", stdlib / "json", stdlib / "pydoc_data"], max_bytes_per_domain=60_000)
    size = Counter[str]()
    for document in source.documents:
        size[document.domain] += len(document.text.encode())
    assert size["python"] > 50_000
    assert size["prose"] > 50_000
    assert max(size.values()) <= 60_000
    assert all(isinstance(document, Document) and document.text for document, _ in source)
