"""A teacher's predictions on disk: what is read is what it predicted; what is damaged or foreign is refused."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save

from collegium.compress.recover import teacher
from collegium.compress.recover.losses import Targets
from collegium.compress.recover.teacher import TeacherStore
from collegium.errors import ConfigError, DataError, NonFiniteError
from collegium.train.batches import model_inputs
from recovering import VOCABULARY, about, packed
from tiny import tiny_model


class Teacher:
    """A tiny model, loaded when it is called; counts how often."""

    def __init__(self, **overrides: Any) -> None:
        self.calls, self.overrides = 0, {"vocab_size": VOCABULARY, "max_position_embeddings": 64} | overrides

    def __call__(self) -> Any:
        self.calls += 1
        return tiny_model("qwen3_moe", **self.overrides)


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of six sequences in three parts."""
    monkeypatch.setattr(teacher, "PART_BYTES", 2 * 4 * 64 * 31)
    folder = tmp_path / "store"
    TeacherStore(folder, about()).fill(Teacher(), packed(), [4, 1, 7, 2, 9, 3], batch_size=2)
    assert len(list(folder.glob("part-*"))) == 3
    return folder


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


def rewritten(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """The part with other arrays, and a checksum that fits them."""
    arrays = load_file(path)
    change(arrays)
    content = save(arrays)
    path.unlink()
    path.with_name(f"part-00001-{zlib.crc32(content):08x}.safetensors").write_bytes(content)


def test_what_is_read_is_what_the_teacher_predicted(filled: Path) -> None:
    store, model = TeacherStore(filled, about()), Teacher()()
    assert len(store) == 6
    wanted = [9, 1, 9]
    batch = packed().batch(wanted)
    with torch.no_grad():
        logits = model(**model_inputs(batch, model, True)).logits[:, :-1].reshape(-1, VOCABULARY)
    expected, found = Targets.of(logits, 64), store.targets(wanted)
    assert found.ids.shape == (3 * 31, 64)
    assert found.ids.equal(expected.ids)
    torch.testing.assert_close(found.probability, expected.probability, rtol=5e-3, atol=1e-6)
    torch.testing.assert_close(found.rest, expected.rest, rtol=5e-3, atol=1e-6)
    torch.testing.assert_close(found.probability.sum(1) + found.rest, torch.ones(3 * 31))


def test_only_what_is_missing_is_run_and_the_parts_stay(filled: Path) -> None:
    before = {path.name: path.read_bytes() for path in parts(filled)}
    store, again = TeacherStore(filled, about()), Teacher()
    store.fill(again, packed(), [1, 2, 3, 1], batch_size=2)
    assert again.calls == 0
    told: list[int] = []
    store.fill(again, packed(), [1, 11, 4, 12, 11, 13], batch_size=8, progress=told.append)
    assert (again.calls, told, len(store)) == (1, [2, 1], 9)
    after = {path.name: path.read_bytes() for path in parts(filled)}
    assert before.items() < after.items()
    assert TeacherStore(filled, about()).missing([13, 14, 1, 14]) == [14]


def test_a_stopped_run_keeps_its_complete_parts(tmp_path: Path, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, done = teacher.atomic_file, []

    def stopped(path: Path) -> Any:
        done.append(path)
        if len(done) == 3:
            raise KeyboardInterrupt
        return write(path)

    monkeypatch.setattr(teacher, "atomic_file", stopped)
    folder, sequences = tmp_path / "other", [4, 1, 7, 2, 9, 3]
    with pytest.raises(KeyboardInterrupt):
        TeacherStore(folder, about()).fill(Teacher(), packed(), sequences, batch_size=2)
    assert len(parts(folder)) == 1
    TeacherStore(folder, about()).fill(Teacher(), packed(), sequences, batch_size=2)
    assert [path.read_bytes() for path in parts(folder)] == [path.read_bytes() for path in parts(filled)]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:5000] + b"\x01" + path.read_bytes()[5001:]),
    "header": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_named_and_refused(damage: str, filled: Path) -> None:
    path = parts(filled)[1]
    DAMAGES[damage](path)
    with pytest.raises(DataError, match=rf"{path.name} is damaged; delete it"):
        TeacherStore(filled, about())
    path.unlink()
    assert len(TeacherStore(filled, about())) == 4


def zero(name: str, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name].flat[3] = value

    return change


NONSENSE: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]] = {
    "token beyond the vocabulary": (zero("ids", 5000), "'ids' names token 5000"),
    "probability above 1": (zero("logp", 3.0), "no probabilities in 1 places"),
    "not a number": (zero("rest", float("nan")), "no probabilities in 1 places"),
    "negative": (zero("rest", -0.5), "no probabilities in 1 places"),
    "another length": (lambda arrays: arrays.update(rest=arrays["rest"][:, :-1].copy()), "not those of 2 sequences"),
    "a tensor more": (lambda arrays: arrays.update(more=arrays["rest"]), "not those of 2 sequences"),
    "one less": (lambda arrays: arrays.pop("sequence"), "not those of 0 sequences"),
    "repeated": (lambda arrays: arrays["sequence"].fill(1), "'sequence' repeats"),
}


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense_with_a_checksum_that_fits_is_refused(nonsense: str, filled: Path) -> None:
    change, message = NONSENSE[nonsense]
    rewritten(parts(filled)[1], change)
    with pytest.raises(DataError, match=message):
        TeacherStore(filled, about())


def test_another_teacher_or_text_is_refused(filled: Path) -> None:
    with pytest.raises(ConfigError, match="fingerprint 'abc', not 'def'"):
        TeacherStore(filled, about(fingerprint="def"))
    with pytest.raises(ConfigError, match="sequence_length 32, not 64"):
        TeacherStore(filled, about(sequence_length=64))
    assert len(TeacherStore(filled, about(teacher="moved"))) == 6


def test_what_is_no_store_is_refused_and_stays(tmp_path: Path, filled: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="no store"):
        TeacherStore(tmp_path / "mine", about())
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (filled / "part-one.safetensors").write_bytes(b"?")
    with pytest.raises(DataError, match="not named like a part"):
        TeacherStore(filled, about())


@pytest.mark.parametrize(("change", "message"), [({"vocab_size": "many"}, "'vocab_size'"), ({"extra": 1}, "'extra'")])
def test_a_damaged_header_names_the_field(change: dict[str, Any], message: str, filled: Path) -> None:
    path = filled / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        TeacherStore(filled, about())


def test_a_teacher_of_another_vocabulary_or_with_nan_is_refused(tmp_path: Path) -> None:
    store = TeacherStore(tmp_path / "store", about())
    with pytest.raises(ConfigError, match="predicts 290 tokens; its config says 300"):
        store.fill(Teacher(vocab_size=290), packed(), [0], batch_size=1)

    def broken() -> Any:
        model = Teacher()()
        with torch.no_grad():
            model.model.norm.weight.fill_(torch.nan)
        return model

    with pytest.raises(NonFiniteError, match="predicts NaN"):
        store.fill(broken, packed(), [0], batch_size=1)
    assert not len(store)
