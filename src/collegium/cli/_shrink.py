"""The stages of ``collegium shrink``. Each leaves its result in the work folder, and is skipped where that is there."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import typer

from collegium.assets import model_folder
from collegium.cli._data import open_data
from collegium.cli._judge import judge_folders, usual_length
from collegium.cli._model import byte_progress, layer_progress, open_folder, open_tokenizer, token_progress
from collegium.cli._shrink_settings import Settings, check_budget, check_data, check_stages, check_ways, make_asked
from collegium.cli._shrink_work import (
    EVALUATION,
    PAGE,
    PLAN,
    PREDICTION,
    RECOVER_LENGTH,
    RECOVERED,
    REQUEST,
    SHRUNK,
    STAGES,
    STATISTICS,
    check_free,
    is_recovered,
    known_supers,
    made_of,
)  # fmt: skip
from collegium.compress.collectors import collectors_for
from collegium.compress.judge_memory import available_bytes, check_memory, needed_bytes
from collegium.compress.judge_result import Judgement
from collegium.compress.judge_sides import why_no_mask
from collegium.compress.own_write import save_own
from collegium.compress.plan import Plan
from collegium.compress.planners import Uniform
from collegium.compress.recover import recover, shrink_in_stages
from collegium.compress.rewrite import apply_plan
from collegium.compress.stream import calibrate
from collegium.compress.target import Target
from collegium.data import document_batches
from collegium.data.tokenize import tokenizer_fingerprint
from collegium.errors import ConfigError
from collegium.files import atomic_dir, atomic_file
from collegium.measure.statistics import META, Statistics
from collegium.models.checkpoint import Checkpoint, open_checkpoint
from collegium.models.summary import summarize
from collegium.report.shrink import Shrunk, write_shrink_page

__all__ = ["Result", "shrink"]

T = TypeVar("T")


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
    run = _Run(model, data, out, work, settings, resume)
    return run.all() if settings.stages == 1 else run.in_stages()


class _Run:
    def __init__(self, model: Path, data: str, out: Path, work: Path, settings: Settings, resume: bool) -> None:
        self.out, self.work, self.settings, self.name, self.data = out, work, settings, str(model), data
        self.checkpoint = open_folder(model_folder(model), trust_remote_code=False)
        self.target = Target.of(self.checkpoint)
        settings.needs()  # names that there are not
        check_ways(settings)
        check_stages(settings)
        check_budget(settings, self.target)
        check_free(out, work, resume)
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

    def make(self) -> tuple[Statistics, Plan]:
        """Calibrate, plan, and write what the plan makes."""
        statistics = self._timed("calibrate", self._calibrate)
        plan = self._timed("plan", lambda: self._plan(statistics))
        self._timed("apply", lambda: self._apply(plan, statistics))
        return statistics, plan

    def all(self) -> Result:
        statistics = self._timed("calibrate", self._calibrate)
        plan = self._timed("plan", lambda: self._plan(statistics))
        predicted = self._timed("predict", lambda: self._predict(plan))
        self._timed("apply", lambda: self._apply(plan, statistics))
        measured = self._timed("evaluate", lambda: self._evaluate(self.made, EVALUATION))
        recovered = None
        if self.settings.recover:
            self._timed("recover", self._recover)
            if is_recovered(self.out):
                recovered = self._timed("evaluate again", lambda: self._evaluate(self.out, RECOVERED))
        found = self._finish(plan, predicted, measured, recovered, known_supers(statistics))
        if self.settings.recover:
            shutil.rmtree(self.made, ignore_errors=True)  # as large as the result
        return found

    def in_stages(self) -> Result:
        """Shrink and train in turn, a part of the way each time; then judge the result."""
        settings, root = self.settings, self.work / STAGES
        planner = settings.planner
        assert isinstance(planner, Uniform)

        def make(source: Path, share: float, target: Path) -> None:
            step = replace(settings, planner=Uniform(share), recover=0, stages=1)
            _Run(source, self.data, target, root / f"{target.name}.work", step, resume=True).make()

        def train(source: Path, tokens: int, target: Path) -> Path:
            return self._timed(f"recover {source.name}", lambda: self._train(source, tokens, target)) or source

        found = shrink_in_stages(
            self.checkpoint.folder,
            planner.keep,
            root,
            shrink=make,
            recover=train,
            tokens=settings.recover,
            count=settings.stages,
        )
        last, work = found[-1], root / f"{found[-1].shrunk.name}.work"
        self._place(last.recovered)
        measured = self._timed("evaluate", lambda: self._evaluate(last.shrunk, EVALUATION))
        recovered = None
        if last.recovered != last.shrunk:
            recovered = self._timed("evaluate again", lambda: self._evaluate(self.out, RECOVERED))
        self.notes.append(
            f"shrunk in {settings.stages} stages ({', '.join(f'{stage.keep:.0%}' for stage in found)} of the experts), "
            "each trained further; the plan shown is that of the last one, for the model before it"
        )
        result = self._finish(
            Plan.load(work / PLAN), None, measured, recovered, known_supers(Statistics.load(work / STATISTICS))
        )
        shutil.rmtree(root, ignore_errors=True)
        return result

    def _finish(
        self,
        plan: Plan,
        predicted: Judgement | None,
        measured: Judgement | None,
        recovered: Judgement | None,
        supers: dict[int, tuple[int, ...]],
    ) -> Result:
        """Write the page."""
        shrunk = Shrunk(
            plan=plan,
            before=summarize(self.checkpoint),
            after=summarize(open_checkpoint(self.out)),
            predicted=predicted,
            measured=measured,
            recovered=recovered,
            supers=supers,
            notes=tuple(self.notes),
        )
        page = self.work / PAGE
        self._timed("page", lambda: write_shrink_page(shrunk, page))
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
                tokenizer=tokenizer_fingerprint(self.tokenizer),
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
        plan = make_asked(settings, statistics, self.target)
        if not plan.portable and not settings.own:
            raise ConfigError(
                "plain transformers cannot hold what this leaves: layers or experts that differ in size; write it in "
                "collegium's own format with --own"
            )
        plan.save(file)
        return plan

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
                if not made_of(there, plan):
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
        if self._train(self.made, self.settings.recover, self.out) is None:
            self._place(self.made)

    def _train(self, student: Path, tokens: int, out: Path) -> Path | None:
        """`out`: `student`, trained to be like the original. None, and a note, if that cannot be or did not help."""
        summary = summarize(open_checkpoint(student))
        need = max(16 * summary.parameters, needed_bytes([self.checkpoint], self.settings.dtype))
        have = available_bytes()
        if have is not None and need > have:
            self._leave_out(
                f"the result was not trained: that needs about {need / 1e9:.1f} GB of memory, and {have / 1e9:.1f} GB "
                "are free"
            )
            return None
        with token_progress() as bars:
            tasks: dict[str, Any] = {}

            def progress(phase: str, done: int, total: int) -> None:
                if phase not in tasks:
                    tasks[phase] = bars.add_task(phase)
                bars.update(tasks[phase], completed=done, total=total)

            found = recover(
                student,
                self.checkpoint.folder,
                self.corpus,
                out,
                tokens=tokens,
                sequence_length=min(self.length, RECOVER_LENGTH),
                progress=progress,
            ).out
        if found is None:
            self._leave_out("training did not lower the loss on held-out text, so the result is not trained")
        return found

    def _place(self, made: Path) -> None:
        """Put a copy of a model at `out`, if none is there."""
        if not (self.out.is_dir() and any(self.out.iterdir())):
            with atomic_dir(self.out) as partial:
                shutil.copytree(made, partial, dirs_exist_ok=True)

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
