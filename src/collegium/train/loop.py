"""The training loop. A step: micro-batches forward and backward, gradients summed over processes, clip, AdamW, balance.

Legend: B sequences per optimizer step over all processes, S positions, R processes, M micro-batches per process.

Every loss is divided by global counts before backward, and gradients are only ever summed. So R and M change the
result by rounding only, with two exceptions. The load-balancing loss of scope "global" sees the counts of the step *so
far*, which with M > 1 are partial in all but the last micro-batch (and in all but the last pass of one). And what looks
at a micro-batch as a whole (a capacity, a plan, random choices, the scopes "micro_batch" and, for documents that go on
in another sequence, "sequence") depends on R x M, but not on which of them is larger.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import collegium
from collegium import models
from collegium.errors import ConfigError, DataError, NonFiniteError
from collegium.files import atomic_file
from collegium.layer import after_step, moe_layers
from collegium.process import peak_memory
from collegium.rng import seed_of
from collegium.train.batches import Order, model_inputs, routing_context
from collegium.train.build import build_model, compile_around_experts, count_parameters
from collegium.train.evaluate import Evaluation, evaluate
from collegium.train.fused import fuse_around_experts
from collegium.train.journal import Journal
from collegium.train.objective import Objective
from collegium.train.objectives import MicroBatch, find_objective
from collegium.train.optim import build_optimizer, clip_, first_non_finite, gradient_norm
from collegium.train.prepare import prepare
from collegium.train.progress import ProgressLine
from collegium.train.ranks import Ranks, open_ranks
from collegium.train.recipe import Recipe
from collegium.train.schedule import build_schedule
from collegium.train.state import Progress, latest, load_optimizer, read_recipe, save_state
from collegium.train.stop import StopRequest

__all__ = ["train"]

_AFRESH = "start afresh (--fresh, or resume=False)"
_SLOWER = "Go on from the latest checkpoint with a lower optim.lr or a smaller optim.clip"


def train(recipe: Recipe, out: str | Path, *, resume: bool = True) -> dict[str, Any]:
    """Run a recipe to its end, or on from its latest checkpoint.

    Writes ``out/model`` (the final model with its tokenizer), ``recipe.yaml``, ``metrics.jsonl``, ``summary.json`` and
    ``checkpoints/``. SIGINT or SIGTERM finishes the step, writes a checkpoint and returns. On the same machine, with
    the same number of threads and processes, a resumed run ends with the same bits as one that was never stopped.

    Args:
        recipe: what to do.
        out: the run's folder.
        resume: go on where the newest complete checkpoint in `out` ends (a finished run only gives its summary); False
            removes what an earlier run left there.

    Returns:
        what ``summary.json`` holds, or where the run stopped (``"interrupted": True``).

    Raises:
        ConfigError: settings do not fit one another, or not the checkpoint that is to be resumed.
        DataError: there is too little text, or other text than the checkpoint was trained on.
        NonFiniteError: the loss or a gradient became NaN or infinite; names the step and the first such tensor.
        StorageError: something could not be written; earlier checkpoints are intact.
    """
    out = Path(out)
    with open_ranks() as ranks:
        if resume and (finished := _finished(recipe, out)) is not None:
            ProgressLine(recipe.steps, quiet=not ranks.first).say(f"{out} holds this very run, finished")
            return finished
        return _Trainer(recipe, out, ranks, resume).run()


class _Trainer:
    """The state of one run in one process."""

    def __init__(self, recipe: Recipe, out: Path, ranks: Ranks, resume: bool) -> None:
        self.recipe, self.out, self.ranks = recipe, out, ranks
        self.micro_batches = ranks.world * recipe.run.accumulate
        if recipe.run.batch_size % self.micro_batches:
            raise ConfigError(
                f"run.batch_size {recipe.run.batch_size} is not divisible by {ranks.world} processes x "
                f"{recipe.run.accumulate} micro-batches (run.accumulate)"
            )
        if not resume and ranks.first:
            _remove_run(out)
        ranks.barrier()
        found = latest(out / "checkpoints")
        if found is not None:
            self._check_resumable(*found)
        elif (out / "summary.json").exists():
            different = Recipe.load(out / "recipe.yaml").differences(recipe)
            raise ConfigError(
                f"{out} holds a finished run of another recipe (its value != the one given): "
                f"{'; '.join(different) or 'its length, or what is written about it'}; there is no checkpoint to go on "
                f"from, so use another folder, or {_AFRESH}"
            )
        self.data = prepare(recipe, ranks)
        if found is not None and found[1].data != self.data.fingerprint:
            raise DataError(f"{found[0]} was trained on other text than {recipe.data.corpus} now holds; {_AFRESH}")
        self.model: Any = build_model(recipe, self.data.tokenizer) if found is None else _load(found[0])
        self.model.to(ranks.device).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.model, recipe.optim)
        self.progress = Progress(data=self.data.fingerprint)
        if found is not None:
            load_optimizer(found[0], self.model, self.optimizer)
            self.progress = found[1]
        self.objective = Objective(self.model)
        self.minimised = find_objective(recipe.objective)
        if recipe.run.compile:
            compile_around_experts(self.model)
        elif recipe.run.fuse:
            fuse_around_experts(self.model)
        self.schedule = build_schedule(recipe.schedule)
        self.order = Order(self.data.train, recipe.run.seed)
        self.precision = torch.bfloat16 if recipe.run.precision == "bfloat16" else torch.float32

    def _check_resumable(self, path: Path, progress: Progress) -> None:
        if different := read_recipe(path).differences(self.recipe):
            raise ConfigError(
                f"{path} was made with another recipe (its value != the one given): {'; '.join(different)}; "
                f"use the same recipe or another output folder, or {_AFRESH}"
            )
        if progress.step > self.recipe.steps:
            raise ConfigError(f"{path} is at step {progress.step}, beyond the {self.recipe.steps} steps of this run")

    def run(self) -> dict[str, Any]:
        """All steps that are left, and what comes after them."""
        every, steps = self.recipe.run, self.recipe.steps
        with StopRequest() as stop, Journal(self.recipe, self.out, self.progress, active=self.ranks.first) as journal:
            if self.ranks.first:
                # a summary and the recipe beside it always belong together
                (self.out / "summary.json").unlink(missing_ok=True)
                with atomic_file(self.out / "recipe.yaml") as partial:
                    partial.write_text(self.recipe.dump(), encoding="utf-8")
            if self.progress.step:
                journal.line.say(f"resuming after step {self.progress.step}")
            while (step := self.progress.step) < steps:
                due = _due(step + 1, every.log_every) or step == 0
                with journal.stepping(every.batch_size * self.recipe.data.sequence_length):
                    stopping, numbers = self._step(stop.requested, measure=due)
                step += 1
                self.progress = replace(self.progress, seconds=journal.seconds)
                journal.line.advance(step)
                if due:
                    journal.step(self.progress, numbers)
                if _due(step, every.eval_every) and step < steps:
                    journal.evaluation(self.progress, self._evaluate(every.eval_sequences))
                if stopping or _due(step, every.checkpoint_every) or (step == steps and every.checkpoint_every):
                    self._checkpoint(journal)
                if stopping and step < steps:
                    journal.line.say(f"stopped after step {step}; the same command goes on from there")
                    return {"interrupted": True, "step": step}
            return self._finish(journal)

    def _step(self, stop: bool, measure: bool) -> tuple[bool, dict[str, Any]]:
        """One optimizer step.

        Returns:
            whether any process was asked to stop, and the step's numbers (those of the balance only if `measure`).
        """
        step, recipe = self.progress.step, self.recipe
        # what draws from the global generator (dropout) replays after a resume
        torch.manual_seed(seed_of(recipe.run.seed, step, self.ranks.rank, "step"))
        lr = recipe.optim.lr * self.schedule(step, recipe.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        try:
            parts = [self._micro_batch(step, m) for m in range(recipe.run.accumulate)]
        except NonFiniteError as error:
            raise NonFiniteError(f"step {step + 1}: {error}. {_SLOWER}") from error
        sums = [torch.stack([part[name] for part in parts]).double().sum() for name in parts[0]]
        shared = torch.stack([*sums, torch.tensor(float(stop), dtype=torch.float64, device=self.ranks.device)])
        *losses, stops = self.ranks.sum_(shared).tolist()
        self.ranks.sum_gradients_(self.parameters)
        norm = float(gradient_norm(self.parameters))
        self._check_finite(step, losses[0], norm)
        clip_(self.parameters, norm, recipe.optim.clip)
        self.optimizer.step()
        numbers: dict[str, Any] = {**dict(zip(parts[0], losses, strict=True)), "lr": lr, "grad_norm": norm}
        if measure:
            numbers |= self._balance_numbers()
        after_step(self.model, step)
        tokens = recipe.run.batch_size * recipe.data.sequence_length
        self.progress = replace(self.progress, step=step + 1, tokens=self.progress.tokens + tokens)
        return stops > 0, numbers

    def _micro_batch(self, step: int, m: int) -> dict[str, Tensor]:
        """Forward and backward of this process's m-th micro-batch; its share of each loss, detached."""
        recipe = self.recipe
        size = recipe.run.batch_size // self.micro_batches
        number = self.ranks.rank * recipe.run.accumulate + m
        rows = self.order(step * recipe.run.batch_size + number * size, size)
        batch = {k: v.to(self.ranks.device) for k, v in self.data.train.batch(rows).items()}
        one = MicroBatch(
            self.objective,
            model_inputs(batch, self.model, recipe.data.mask_documents),
            routing_context(batch, seed=recipe.run.seed, step=step, micro_batch=number),
            predicted=recipe.run.batch_size * (recipe.data.sequence_length - 1),
            micro_batches=self.micro_batches,
            precision=self.precision,
        )
        return self.minimised.step(one)

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        culprit = first_non_finite(self.model) or "no single tensor, the norm of all gradients overflows"
        raise NonFiniteError(
            f"step {step + 1}: the loss is {loss} and the gradient norm {norm}; first that is not finite: {culprit}. "
            f"{_SLOWER}"
        )

    @torch.no_grad()
    def _balance_numbers(self) -> dict[str, Any]:
        """What `collegium.train.metrics` lists for MoE models, from the counts of this step; empty if dense."""
        violations: list[float] = []
        entropies: list[float] = []
        loads: list[list[float]] = []
        dead = 0
        for layer in moe_layers(self.model):
            if layer.balance is not None:
                counts = layer.balance.stats.sync()
            else:
                counts = self.ranks.sum_(torch.stack([one.counts() for one in layer.routings]).sum(0))
            share = counts.double() / counts.sum().clamp(min=1)
            violations.append(float(counts.max() / counts.double().mean() - 1))
            entropies.append(-float(torch.special.xlogy(share, share).sum()) / math.log(2))
            loads.append([round(value, 4) for value in share.tolist()])
            dead += int((counts == 0).sum())
        if not loads:
            return {}
        return {
            "max_violation": sum(violations) / len(violations),
            "dead_experts": dead,
            "entropy": sum(entropies) / len(entropies),
            "loads": loads,
        }

    def _evaluate(self, sequences_per_domain: int | None = None) -> Evaluation:
        return evaluate(
            self.model,
            self.data.valid,
            self.data.token_bytes,
            self.recipe.run.batch_size // self.micro_batches,
            sequences_per_domain=sequences_per_domain,
            mask_documents=self.recipe.data.mask_documents,
            ranks=self.ranks,
            precision=self.precision,
            objective=self.objective,
        )

    def _checkpoint(self, journal: Journal) -> None:
        if self.ranks.first:
            at = replace(self.progress, metrics_bytes=journal.sync())
            keep = self.recipe.run.keep_checkpoints
            save_state(self.out / "checkpoints", self.recipe, at, self.model, self.optimizer, keep)
        # no process runs ahead of a checkpoint that could still fail
        self.ranks.barrier()

    def _finish(self, journal: Journal) -> dict[str, Any]:
        """Round to the dtype the model is saved in, evaluate on all held-out text, write the model and the summary."""
        dtype = torch.bfloat16 if self.recipe.run.save_dtype == "bfloat16" else torch.float32
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(p.to(dtype))
        found = self._evaluate()
        journal.evaluation(self.progress, found)
        size = count_parameters(self.model)
        at = replace(self.progress, seconds=journal.seconds)
        summary = {
            "interrupted": False,
            "steps": at.step,
            "tokens": at.tokens,
            "seconds": round(at.seconds, 1),
            "tokens_per_second": round(at.tokens / at.seconds, 1),
            "parameters": {"total": size.total, "active": size.active},
            "loss": found.loss,
            "bits_per_byte": found.overall,
            "domains": found.bits_per_byte,
            "processes": self.ranks.world,
            "peak_memory_bytes": peak_memory(),
            "versions": {"collegium": collegium.__version__, "torch": torch.__version__},
        }
        if self.ranks.first:
            for p in self.model.parameters():
                p.data = p.data.to(dtype)
            models.save(self.model, self.out / "model", self.data.tokenizer)
            with atomic_file(self.out / "summary.json") as file:
                file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        self.ranks.barrier()
        return summary


def _load(path: Path) -> Any:
    return models.load(path / "model", dtype=torch.float32)


def _finished(recipe: Recipe, out: Path) -> dict[str, Any] | None:
    """The summary in `out` if it is that of a finished run of `recipe`."""
    if not (out / "summary.json").is_file() or Recipe.load(out / "recipe.yaml") != recipe:
        return None
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _remove_run(out: Path) -> None:
    """Remove what a run writes, and nothing else."""
    for name in ("checkpoints", "model"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("metrics.jsonl", "summary.json", "recipe.yaml"):
        (out / name).unlink(missing_ok=True)
