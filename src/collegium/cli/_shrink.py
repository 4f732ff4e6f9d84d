"""The stages of ``collegium shrink``. Each leaves its result in the work folder, and is skipped where that is there."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import typer

from collegium.assets import model_folder
from collegium.cli._data import open_data
from collegium.cli._judge import judge_folders, usual_length
from collegium.cli._model import byte_progress, layer_progress, open_folder, open_tokenizer, token_progress
from collegium.cli._shrink_settings import Settings, check_budget, check_data, check_ways
from collegium.compress.collectors import collectors_for
from collegium.compress.grouping import find_grouping
from collegium.compress.judge_memory import available_bytes, check_memory, needed_bytes
from collegium.compress.judge_result import Judgement
from collegium.compress.judge_sides import why_no_mask
from collegium.compress.neurons import plan_neurons
from collegium.compress.own_write import save_own
from collegium.compress.plan import Plan, RouterEdit
from collegium.compress.planners import make_plan
from collegium.compress.recover import recover
from collegium.compress.rewrite import apply_plan
from collegium.compress.rewrite_config import EDIT
from collegium.compress.stream import calibrate
from collegium.compress.target import Target
from collegium.data import document_batches
from collegium.errors import ConfigError
from collegium.files import atomic_dir, atomic_file
from collegium.measure.statistics import META, Statistics
from collegium.measure.super_experts import super_experts
from collegium.models.checkpoint import Checkpoint, open_checkpoint
from collegium.models.summary import summarize
from collegium.report.shrink import Shrunk, write_shrink_page

__all__ = ["Result", "shrink"]

T = TypeVar("T")

REQUEST, STATISTICS, PLAN = "request.json", "statistics", "plan.json"
PREDICTION, EVALUATION, RECOVERED, PAGE = "prediction.json", "evaluation.json", "recovered.json", "page.html"
SHRUNK = "shrunk"
"""Where the model waits that is to be trained further."""
RECOVER_LENGTH = 256
"""Tokens in a sequence of training, at most."""


@dataclass(frozen=True)
class Result:
    """What came of it. Attributes: `seconds` by stage, of those that ran now."""

    shrunk: Shrunk
    out: Path
    work: Path
    page: Path
    seconds: dict[str, float] = field(default_factory=dict)


def shrink(model: Path, data: str, out: Path, work: Path, settings: Settings, *, resume: bool) -> Result:
    """All stages, from the first that has not been done.

    Raises:
        ConfigError: `out` exists, the work folder holds something else, or a setting cannot be met.
        DataError: the data lack a split.
        CollegiumError: whatever the stages raise.
    """
    return _Run(model, data, out, work, settings, resume).all()


class _Run:
    def __init__(self, model: Path, data: str, out: Path, work: Path, settings: Settings, resume: bool) -> None:
        self.out, self.work, self.settings, self.name = out, work, settings, str(model)
        self.checkpoint = open_folder(model_folder(model), trust_remote_code=False)
        self.target = Target.of(self.checkpoint)
        settings.needs()  # names that there are not
        check_ways(settings)
        check_budget(settings, self.target)
        _check_free(out, work, resume)
        self.tokenizer = open_tokenizer(self.checkpoint.folder, trust_remote_code=False)
        self.corpus = open_data(data)
        check_data(self.corpus, settings)
        self.length = settings.sequence_length or usual_length(self.checkpoint)
        self._claim(resume)
        # what is trained further is not the result yet
        self.made = work / SHRUNK if settings.recover else out
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}

    def _claim(self, resume: bool) -> None:
        """Make the work folder this run's, or find out that it is."""
        request = {
            "model": self.checkpoint.fingerprint,
            "data": self.corpus.fingerprint(),
            "length": self.length,
            "planner_name": self.settings.planner.name,
            **asdict(self.settings),
        }
        request = json.loads(json.dumps(request))
        file = self.work / REQUEST
        if not resume and file.exists():
            shutil.rmtree(self.work)
        if file.exists():
            try:
                saved = dict(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise ConfigError(f"{file} is damaged: {error}; start again with --fresh") from error
            odd = [key for key in request if saved.get(key) != request[key]]
            if odd:
                raise ConfigError(
                    f"{self.work} holds work for another request: {odd[0]} was {saved.get(odd[0])!r} and is "
                    f"{request[odd[0]]!r}; start again with --fresh, or choose another folder with --work"
                )
            return
        with atomic_file(file) as partial:
            partial.write_text(json.dumps(request, indent=1) + "\n", encoding="utf-8")

    def all(self) -> Result:
        statistics = self._timed("calibrate", self._calibrate)
        plan = self._timed("plan", lambda: self._plan(statistics))
        predicted = self._timed("predict", lambda: self._predict(plan))
        self._timed("apply", lambda: self._apply(plan, statistics))
        measured = self._timed("evaluate", lambda: self._evaluate(self.made, EVALUATION))
        recovered = None
        if self.settings.recover:
            self._timed("recover", self._recover)
            if _is_recovered(self.out):
                recovered = self._timed("evaluate again", lambda: self._evaluate(self.out, RECOVERED))
        shrunk = Shrunk(
            plan=plan,
            before=summarize(self.checkpoint),
            after=summarize(open_checkpoint(self.out)),
            predicted=predicted,
            measured=measured,
            recovered=recovered,
            supers=_supers(statistics),
            notes=tuple(self.notes),
        )
        page = self.work / PAGE
        self._timed("page", lambda: write_shrink_page(shrunk, page))
        if self.settings.recover:
            shutil.rmtree(self.made, ignore_errors=True)  # as large as the result
        return Result(shrunk, self.out, self.work, page, self.seconds)

    def _timed(self, stage: str, run: Callable[[], T]) -> T:
        typer.echo(f"{stage} ...", err=True)
        start = time.perf_counter()
        found = run()
        self.seconds[stage] = round(time.perf_counter() - start, 1)
        return found

    def _calibrate(self) -> Statistics:
        folder, settings = self.work / STATISTICS, self.settings
        if (folder / META).is_file():
            return Statistics.load(folder)
        batches = document_batches(
            self.corpus,
            self.tokenizer,
            "train",
            sequence_length=self.length,
            batch_size=settings.batch_size,
            max_tokens=settings.tokens,
        )
        with layer_progress() as bar:
            task = bar.add_task("reading", total=None)

            def progress(done: int, steps: int, share: float) -> None:
                bar.update(task, description=f"step {done + 1} of {steps}", completed=done + share, total=steps)

            return calibrate(
                self.checkpoint,
                batches,
                collectors_for(statistics=settings.needs()),
                folder,
                name=self.name,
                data=f"{self.corpus.name} ({self.corpus.fingerprint()}), split train, "
                f"{settings.batch_size} x {self.length}",
                domains=self.corpus.domains,
                dtype=settings.dtype or "auto",
                max_tokens=settings.tokens,
                progress=progress,
            )

    def _plan(self, statistics: Statistics) -> Plan:
        file, settings = self.work / PLAN, self.settings
        if file.exists():
            plan = Plan.load(file)
            plan.check(self.target)
            return plan
        plan = (
            self._slim(statistics)
            if settings.neurons is not None
            else make_plan(
                statistics,
                self.target,
                settings.planner,
                importance=settings.method,
                settings=settings.settings["score"],
                domains=settings.domains,
                combine=settings.combine,
                pins=settings.pins,
                protect_super_experts=settings.protect,
                mtp=settings.mtp,
                grouping=None
                if settings.grouping is None
                else find_grouping(settings.grouping, settings.settings["grouping"]),
                operator=settings.operator(),
                router=RouterEdit(mode=settings.router, settings=dict(settings.settings["router"])),
            )
        )
        if not plan.portable and not settings.own:
            raise ConfigError(
                "plain transformers cannot hold what this leaves: layers or experts that differ in size; write it in "
                "collegium's own format with --own"
            )
        plan.save(file)
        return plan

    def _slim(self, statistics: Statistics) -> Plan:
        """A plan that keeps every expert, with fewer neurons."""
        settings = self.settings
        assert settings.neurons is not None
        return plan_neurons(
            statistics,
            self.target,
            score=settings.method,
            share=settings.neurons,
            mode=settings.widths,
            settings=settings.settings["score"],
            pins=settings.pins,
            protect_super_experts=settings.protect,
            mtp=settings.mtp,
        )

    def _predict(self, plan: Plan) -> Judgement | None:
        file = self.work / PREDICTION
        if file.exists():
            return Judgement.load(file)
        why = why_no_mask(plan) or self._too_large([self.checkpoint])
        if why is not None:
            self._leave_out(f"the loss was not predicted: {why}")
            return None
        found = judge_folders(
            self.checkpoint, self.corpus, plan=plan, names=(f"{self.name}, masked", self.name), **self._judged()
        )
        found.save(file)
        return found

    def _apply(self, plan: Plan, statistics: Statistics) -> None:
        for there in (self.made, self.out):
            if there.is_dir() and any(there.iterdir()):
                if not _made_of(there, plan):
                    raise ConfigError(f"{there} exists and is not what {self.work / PLAN} makes; remove one of them")
                return
        with byte_progress() as progress:
            bar = progress.add_task("writing", total=None)
            write = apply_plan if plan.portable else save_own
            write(
                plan,
                self.checkpoint,
                self.made,
                statistics=statistics,
                progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )

    def _evaluate(self, folder: Path, name: str) -> Judgement | None:
        """Judge a checkpoint that was written, and keep that in the work folder as `name`."""
        file = self.work / name
        if file.exists():
            return Judgement.load(file)
        if not folder.exists():
            self._leave_out("the model before recovery is gone, so it was not measured")
            return None
        small = open_folder(folder, trust_remote_code=False)
        against: Checkpoint | None = self.checkpoint
        if (why := self._too_large([small, self.checkpoint])) is not None:
            self._leave_out(f"the result was not compared with the original token by token: {why}")
            against = None
        if against is None and (why := self._too_large([small])) is not None:
            self._leave_out(f"the result was not measured: {why}")
            return None
        found = judge_folders(small, self.corpus, against=against, names=(self.out.name, self.name), **self._judged())
        if against is not None:  # with more memory, the next run can do it
            found.save(file)
        return found

    def _recover(self) -> None:
        """Train the model that was made, and put the result, or that model if training did not help, at `out`."""
        if self.out.is_dir() and any(self.out.iterdir()):
            return
        student = open_checkpoint(self.made)
        need = max(16 * summarize(student).parameters, needed_bytes([self.checkpoint], self.settings.dtype))
        found, have = None, available_bytes()
        if have is not None and need > have:
            self._leave_out(
                f"the result was not trained: that needs about {need / 1e9:.1f} GB of memory, and {have / 1e9:.1f} GB "
                "are free"
            )
        else:
            with token_progress() as bars:
                tasks: dict[str, Any] = {}

                def progress(phase: str, done: int, total: int) -> None:
                    if phase not in tasks:
                        tasks[phase] = bars.add_task(phase)
                    bars.update(tasks[phase], completed=done, total=total)

                found = recover(
                    self.made,
                    self.checkpoint.folder,
                    self.corpus,
                    self.out,
                    tokens=self.settings.recover,
                    sequence_length=min(self.length, RECOVER_LENGTH),
                    progress=progress,
                ).out
            if found is None:
                self._leave_out("training did not lower the loss on held-out text, so the result is not trained")
        if found is None:
            with atomic_dir(self.out) as partial:
                shutil.copytree(self.made, partial, dirs_exist_ok=True)

    def _judged(self) -> dict[str, Any]:
        """On what models are judged; prediction and measurement must be of the same tokens."""
        settings = self.settings
        return {
            "split": "test",
            "tokens": settings.eval_tokens,
            "batch_size": settings.batch_size,
            "sequence_length": self.length,
            "dtype": settings.dtype,
        }

    def _too_large(self, models: list[Checkpoint]) -> str | None:
        try:
            check_memory(models, self.settings.dtype)
        except ConfigError as error:
            return str(error)
        return None

    def _leave_out(self, note: str) -> None:
        typer.echo(f"warning: {note}", err=True)
        self.notes.append(note)


def _check_free(out: Path, work: Path, resume: bool) -> None:
    """Raise ConfigError if `out` holds something that this work folder does not know of."""
    taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    known = resume and (work / PLAN).is_file() and out.is_dir() and _made_of(out, Plan.load(work / PLAN))
    if taken and not known:
        raise ConfigError(f"{out} exists; choose a folder that does not, or remove it first")
    if work.exists() and not (work / REQUEST).is_file() and (not work.is_dir() or any(work.iterdir())):
        raise ConfigError(f"{work} exists and holds no work of this command; choose another folder with --work")


def _made_of(out: Path, plan: Plan) -> bool:
    """Whether the checkpoint in `out` is what `plan` made."""
    try:
        edit = json.loads((out / EDIT).read_text(encoding="utf-8"))
        edit = edit["previous"] if edit["kind"] == "recover" else edit
        return bool(edit["plan"] == plan.model_dump(mode="json"))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_recovered(out: Path) -> bool:
    return bool(json.loads((out / EDIT).read_text(encoding="utf-8"))["kind"] == "recover")


def _supers(statistics: Statistics) -> dict[int, tuple[int, ...]]:
    """Layer -> its super experts, where the statistics can tell."""
    if not any(entry.name == "down_max" for entry in statistics.meta.statistics):
        return {}
    found: dict[int, tuple[int, ...]] = {}
    for one in super_experts(statistics).found:
        found[one.layer] = tuple(sorted({*found.get(one.layer, ()), one.expert}))
    return found
