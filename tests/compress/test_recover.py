"""`recover`: a better model of the same form, or none; nothing else changes, and a kill changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from collegium.compress.recover import checkpoints, recover, run
from collegium.compress.recover.run import Recovered
from collegium.data import Corpus, Document, train_tokenizer
from collegium.errors import CheckpointError, ConfigError, DataError, NonFiniteError, UnsupportedFamilyError
from collegium.models.checkpoint import open_checkpoint
from recovering import LENGTH, corpus, model_folder, pair

SETTINGS: dict[str, Any] = {
    "tokens": 6 * 4 * LENGTH, "lr": 3e-3, "batch_size": 4, "sequence_length": LENGTH, "kd_shares": (0.5, 0.25),
    "eval_sequences": 8, "checkpoint_every": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over threads round differently for different numbers of threads; subprocesses get OMP_NUM_THREADS=1."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recovered(out: Path, student: Path | None = None, teacher: Path | None = None, **changes: Any) -> Recovered:
    first, second = pair()
    settings = SETTINGS | changes
    return recover(student or first, teacher or second, settings.pop("corpus", corpus()), out, **settings)


def test_a_better_model_of_the_same_form(tmp_path: Path) -> None:
    student, teacher = pair()
    told: list[tuple[str, int, int]] = []
    found = recovered(tmp_path / "out", progress=lambda *what: told.append(what))
    assert found.after < found.before - 0.1
    assert found.out == tmp_path / "out"
    assert (found.steps, found.tokens) == (6, 6 * 4 * LENGTH)
    assert sorted(found.domains) == ["count", "song"]
    assert all(after < before for before, after in found.domains.values())
    model, report = AutoModelForCausalLM.from_pretrained(found.out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.num_experts == 4
    assert found.trained == sum(p.numel() for p in model.parameters())
    names = {name: (info.dtype, info.shape) for name, info in open_checkpoint(student).tensors.items()}
    assert {name: (info.dtype, info.shape) for name, info in open_checkpoint(found.out).tensors.items()} == names
    same = ("config.json", "tokenizer.json", "generation_config.json")
    assert all((found.out / name).read_bytes() == (student / name).read_bytes() for name in same)
    edit = json.loads((found.out / "collegium_edit.json").read_text())
    assert edit["kind"] == "recover"
    assert edit["fingerprint"] == open_checkpoint(found.out).fingerprint
    assert edit["source"]["fingerprint"] == open_checkpoint(student).fingerprint
    assert edit["previous"] == json.loads((student / "collegium_edit.json").read_text())
    assert edit["recovery"]["teacher_fingerprint"] == open_checkpoint(teacher).fingerprint
    assert edit["recovery"]["after"]["loss"] == found.after
    card = (found.out / "README.md").read_text()
    assert card.startswith((student / "README.md").read_text().rstrip())
    assert f"from {found.before:.4f} to {found.after:.4f} nats" in card
    assert not (tmp_path / "out.partial").exists()
    assert [phase for phase, *_ in told] == ["teacher"] + ["student"] * 6
    assert all(done <= total for _, done, total in told)
    assert told[-1][1] == told[-1][2]


def test_only_the_router_is_trained(tmp_path: Path) -> None:
    found = recovered(tmp_path / "out", only="router", lr=1e-2, tokens=20 * 4 * LENGTH)
    assert found.out is not None
    before, after = (load_file(folder / "model.safetensors") for folder in (pair()[0], found.out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("mlp.gate.weight")}
    assert found.trained == sum(before[name].numel() for name in changed)
    assert "its routers only" in (found.out / "README.md").read_text()


def test_a_result_that_is_no_better_is_not_written(tmp_path: Path) -> None:
    found = recovered(tmp_path / "out", lr=1e-30)  # too small to change any weight
    assert found.out is None
    assert found.after == found.before
    assert not (tmp_path / "out").exists()
    # what the teacher said is still there for another try
    assert len(list((tmp_path / "out.partial" / "teacher").glob("part-*"))) == 1


def test_bfloat16_stays_and_is_what_is_judged(tmp_path: Path) -> None:
    student, teacher = pair("bfloat16")
    found = recovered(tmp_path / "out", student, teacher)
    assert found.out is not None
    assert {info.dtype for info in open_checkpoint(found.out).tensors.values()} == {"BF16"}
    again = recovered(tmp_path / "again", found.out, teacher, lr=1e-30)
    assert again.before == found.after


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral"])
def test_other_families(family: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", family)
    found = recovered(tmp_path / "out", folder, folder)
    assert found.out is not None
    _, report = AutoModelForCausalLM.from_pretrained(found.out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


KILL_IN_STEP = """
import os, signal
from collegium.compress.recover import {module}
def killed(*args, real={module}.{function}, calls=[]):
    real(*args)
    calls.append(1)
    if len(calls) == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
{module}.{function} = killed
from collegium.data import open_corpus
from collegium.compress.recover import recover
recover({student!r}, {teacher!r}, open_corpus({corpus!r}), {out!r}, **{settings!r})
"""


def test_killed_twice_and_resumed_is_bit_identical(tmp_path: Path) -> None:
    student, teacher = pair()
    out = tmp_path / "killed"
    places = (("run", "clip_", 4), ("checkpoints", "save_file", 2))
    for module, function, after in places:
        script = KILL_IN_STEP.format(
            module=module, function=function, after=after, student=str(student), teacher=str(teacher),
            corpus=corpus().name, out=str(out), settings=SETTINGS,
        )  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == -9, done.stderr
        assert not out.exists()
        assert [path.name for path in (tmp_path / "killed.partial" / "checkpoints").glob("step-*")] == ["step-00000002"]
    resumed, whole = recovered(out), recovered(tmp_path / "whole")
    assert (resumed.after, resumed.steps) == (whole.after, 6)
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_wish_to_stop_is_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(run.StopRequest):
        @property
        def requested(self) -> bool:
            return True

        @requested.setter
        def requested(self, value: bool) -> None:
            pass

    with monkeypatch.context() as patch:
        patch.setattr(run, "StopRequest", Impatient)
        with pytest.raises(KeyboardInterrupt):
            recovered(tmp_path / "out")
    assert (tmp_path / "out.partial" / "checkpoints" / "step-00000001").is_dir()
    assert recovered(tmp_path / "out").steps == 6


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a run that was stopped after its second checkpoint."""
    save, calls = checkpoints.save_checkpoint, []

    def stop(*args: Any) -> None:
        save(*args)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            recovered(tmp_path / "out")


def test_another_run_is_not_continued_but_may_use_the_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"differs in lr, seed.*--fresh"):
        recovered(tmp_path / "out", lr=1e-3, seed=3)
    loaded: list[Path] = []
    load = run.load_model
    monkeypatch.setattr(run, "load_model", lambda folder, dtype: loaded.append(folder) or load(folder, dtype))
    found = recovered(tmp_path / "out", lr=1e-3, resume=False)
    assert found.steps == 6
    assert loaded == [pair()[0]]


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path, monkeypatch)
    path = tmp_path / "out.partial" / "checkpoints" / "step-00000004" / "parameters.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert recovered(tmp_path / "out").out is not None
    interrupted(tmp_path / "other", monkeypatch)
    path = tmp_path / "other" / "out.partial" / "checkpoints" / "step-00000004" / "parameters.safetensors"
    tensors = load_file(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(next(iter(tensors)).encode(), b"x" * len(next(iter(tensors))), 1))
    with pytest.raises(CheckpointError, match="--fresh"):
        recovered(tmp_path / "other" / "out")


def test_one_store_serves_several_students_and_text_alone_needs_no_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, (student, teacher) = tmp_path / "store", pair()
    recovered(tmp_path / "a", store=store)
    loaded: list[Path] = []
    load = run.load_model
    monkeypatch.setattr(run, "load_model", lambda folder, dtype: loaded.append(folder) or load(folder, dtype))
    recovered(tmp_path / "b", teacher, store=store)
    assert loaded == [teacher]  # as the student it is, this time
    found = recover(student, None, corpus(), tmp_path / "c", **{**SETTINGS, "kd_shares": (0, 0)})
    assert found.out is not None
    assert "the text alone" in (found.out / "README.md").read_text()
    with pytest.raises(ConfigError, match="must be a teacher"):
        recover(student, None, corpus(), tmp_path / "d", **SETTINGS)


def test_models_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    student, teacher = pair()
    other = model_folder(tmp_path / "other", vocab_size=310)
    with pytest.raises(ConfigError, match=r"vocabulary of 300 tokens, .* of 310"):
        recovered(tmp_path / "out", student, other)
    shutil.copytree(teacher, tmp_path / "renamed")
    train_tokenizer(Corpus("x", [(Document("zz zz yy yy zz yy " * 400, "d", "n"), "train")]), 260, tmp_path / "tok")
    shutil.copy(tmp_path / "tok" / "tokenizer.json", tmp_path / "renamed" / "tokenizer.json")
    with pytest.raises(ConfigError, match="tokenizers of"):
        recovered(tmp_path / "out", student, tmp_path / "renamed")
    shutil.copytree(student, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.json"))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        recovered(tmp_path / "out", tmp_path / "bare")
    shutil.copytree(student, tmp_path / "quantised")
    path = tmp_path / "quantised" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedFamilyError, match="quantised"):
        recovered(tmp_path / "out", tmp_path / "quantised")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens 0"),
        ({"lr": -1.0}, "lr -1.0"),
        ({"only": "experts"}, "only 'experts' is none of all, router"),
        ({"kd_shares": (1.0, 1.5)}, "between 0"),
        ({"sequence_length": 65}, "has 64 positions"),
        ({"checkpoint_every": 0}, "at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        recovered(tmp_path / "out", **changes)


def test_targets_that_hold_something_are_refused(tmp_path: Path) -> None:
    for name in ("out", "other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="exists"):
        recovered(tmp_path / "out")
    with pytest.raises(ConfigError, match="not an unfinished recovery"):
        recovered(tmp_path / "other")
    assert (tmp_path / "other.partial" / "thesis.txt").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step [2-6]: the loss is .*lower learning rate"):
        recovered(tmp_path / "out", lr=1e25)
    assert not (tmp_path / "out").exists()


def test_text_without_held_out_documents_is_refused(tmp_path: Path) -> None:
    text = " ".join(str(n) for n in range(2000))
    alone = Corpus("alone", [(Document(text, "count", "n"), "train")])
    with pytest.raises(DataError, match="valid"):
        recovered(tmp_path / "out", corpus=alone)
