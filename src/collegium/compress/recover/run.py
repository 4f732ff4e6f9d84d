"""`recover`: train a shrunk model for a while on text and on what the model it was made of predicts for it.

Legend: B sequences of a step, S positions of a sequence.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from collegium.catalog import method
from collegium.compress.recover.checkpoints import open_work, restore, save_checkpoint
from collegium.compress.recover.losses import Distiller
from collegium.compress.recover.pair import Pair, load_model
from collegium.compress.recover.result import write_result
from collegium.compress.recover.teacher import CANDIDATES, About, TeacherStore
from collegium.data import Corpus, pack
from collegium.data.tokenize import tokenizer_fingerprint
from collegium.errors import ConfigError, NonFiniteError
from collegium.layer import use_context
from collegium.rng import seed_of
from collegium.sites import sites
from collegium.train.batches import Order, model_inputs, routing_context
from collegium.train.evaluate import Evaluation, evaluate
from collegium.train.optim import build_optimizer, clip_, first_non_finite, gradient_norm
from collegium.train.ranks import Ranks
from collegium.train.recipe import OptimSpec
from collegium.train.schedule import Cosine
from collegium.train.stop import StopRequest

__all__ = ["Only", "Progress", "Recovered", "recover"]

Only = Literal["all", "router"]
"""What is trained: every weight, or nothing but the routers."""
Progress = Callable[[str, int, int], None]
"""Called with what is done ("teacher" or "student"), the tokens it has had, and those it will have had."""

LR: dict[Only, float] = {"all": 4e-4, "router": 1e-3}
"""Peak learning rates where none is given: that of SlimQwen, and ours."""


@dataclass(frozen=True)
class Recovered:
    """What came of it.

    Attributes:
        before, after: nats per token on held-out text; `domains` are by domain, (before, after).
        out: where the model is; None if the held-out loss did not fall, and nothing was written.
        steps, tokens: of training.
        trained: parameters that were trained.
        seconds: of training, evaluation and the teacher's run left out.
    """

    before: float
    after: float
    domains: dict[str, tuple[float, float]]
    out: Path | None
    steps: int
    tokens: int
    trained: int
    seconds: float


@dataclass(frozen=True)
class _Settings:
    """What decides the result, beside models and text."""

    tokens: int
    lr: float
    batch_size: int
    sequence_length: int
    only: Only
    kd_shares: tuple[float, float]
    seed: int

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.batch_size < 1 or not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(
                f"tokens {self.tokens} and batch_size {self.batch_size} must be at least 1, lr {self.lr} above 0"
            )
        if self.only not in LR:
            raise ConfigError(f"only {self.only!r} is none of {', '.join(LR)}")
        if not all(0 <= share <= 1 for share in self.kd_shares):
            raise ConfigError(
                f"kd_shares {self.kd_shares} must be between 0 (the text alone) and 1 (the teacher alone)"
            )

    @property
    def steps(self) -> int:
        return -(-self.tokens // (self.batch_size * self.sequence_length))

    @property
    def needs_teacher(self) -> bool:
        return any(self.kd_shares)

    def kd_share(self, step: int) -> float:
        first, last = self.kd_shares
        return first + (last - first) * step / max(self.steps - 1, 1)


@method("lm_kl", kind="recovery", paper="SlimQwen (2026)", arxiv="2605.08738")
def recover(
    student: str | Path,
    teacher: str | Path | None,
    corpus: Corpus,
    out: str | Path,
    *,
    tokens: int,
    lr: float | None = None,
    batch_size: int = 8,
    sequence_length: int = 256,
    only: Only = "all",
    kd_shares: tuple[float, float] = (1.0, 0.75),
    seed: int = 0,
    eval_sequences: int | None = 64,
    checkpoint_every: int = 50,
    store: str | Path | None = None,
    teacher_dtype: torch.dtype | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> Recovered:
    """Train `student` on the training split of `corpus` and, if that lowers its loss on the held-out split, write it.

    First the teacher runs once over the text and its predictions go to disk; it is then let go, and the student is
    trained by AdamW in float32. The result is stored in the student's dtypes, and judged as it is stored. Attention is
    confined to documents where all layers have full attention. Balance losses take no part. A result that is no better
    than the student on held-out text is not written: `Recovered.out` is then None.

    Training takes 16 bytes of memory a parameter of the student (4 where only routers are trained), and what
    activations take. A kill loses at most `checkpoint_every` steps or one part of the teacher's predictions; with the
    same number of threads the same call then ends with the same bits. Until it is done, ``<out>.partial`` holds what
    that takes.

    Args:
        student: folder of a shrunk model with its tokenizer, or of any causal LM with MoE layers.
        teacher: folder of the model it was made of; None where both `kd_shares` are 0.
        corpus: with a training and a "valid" split.
        out: a folder that does not exist, or is empty.
        tokens: to train on, rounded up to whole steps; more than there are go round again.
        lr: the highest learning rate, after a warm-up of 5 % of the run and before a cosine; None takes `LR`.
        batch_size, sequence_length: B and S.
        only: "router" trains the routers (weights and biases) and leaves every other weight bit-identical.
        kd_shares: l of the loss (see `losses`) in the first and the last step: (1, 1) is the teacher alone, (0, 0) the
            text alone.
        seed: of the order of the text and of what is random in the model.
        eval_sequences: held-out sequences of each domain, at most; None takes all.
        checkpoint_every: steps.
        store: folder of the teacher's predictions, which several recoveries may share; None keeps them with the run.
        teacher_dtype: None runs the teacher in the dtype it is stored in.
        resume: go on with an unfinished run of the same settings; False starts over, but keeps the predictions.
        progress: see `Progress`.

    Raises:
        ConfigError: a setting is out of range; the models have different vocabularies or tokenizers; `out` holds
            something; or what is unfinished is of another run.
        UnsupportedFamilyError: the student is quantised, or no decoder-only language model.
        DataError: there is too little text, or a stored prediction is damaged.
        NonFiniteError: the loss or a gradient became NaN or infinite; names the step.
        StorageError: something could not be written; earlier checkpoints are intact.
        KeyboardInterrupt: SIGINT or SIGTERM asked to stop; the step was finished and a checkpoint written.
    """
    shares = (float(kd_shares[0]), float(kd_shares[1]))
    settings = _Settings(
        tokens, LR.get(only, 1.0) if lr is None else lr, batch_size, sequence_length, only, shares, seed
    )
    if checkpoint_every < 1 or (eval_sequences is not None and eval_sequences < 1):
        raise ConfigError(f"checkpoint_every {checkpoint_every} and eval_sequences {eval_sequences} must be at least 1")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists; choose a folder that does not, or remove it first")
    pair = Pair.open(Path(student), None if teacher is None else Path(teacher), sequence_length)
    if pair.teacher is None and settings.needs_teacher:
        raise ConfigError(f"kd_shares are {shares}, so there must be a teacher; (0, 0) needs none")
    work = out.with_name(f"{out.name}.partial")
    with torch.random.fork_rng(devices=[]):
        run = _Run(pair, settings, corpus, work, resume=resume, eval_sequences=eval_sequences, progress=progress)
        run.learn_from_teacher(Path(store) if store is not None else work / "teacher", teacher_dtype)
        result = run.train(checkpoint_every)
    kept = result.after < result.before
    if kept:
        write_result(run.model, pair.student, out, run.record(result))
        shutil.rmtree(work, ignore_errors=True)
    return replace(result, out=out if kept else None)


class _Run:
    """One recovery."""

    model: Any

    def __init__(
        self,
        pair: Pair,
        settings: _Settings,
        corpus: Corpus,
        work: Path,
        *,
        resume: bool,
        eval_sequences: int | None,
        progress: Progress | None,
    ) -> None:
        self.pair, self.settings, self.corpus, self.work = pair, settings, corpus, work
        self.eval_sequences, self.progress = eval_sequences, progress
        run = {
            "student": pair.student.fingerprint,
            "teacher": pair.teacher.fingerprint if pair.teacher else None,
            "corpus": corpus.fingerprint(),
            "tokenizer": tokenizer_fingerprint(pair.tokenizer),
            "eval_sequences": eval_sequences,
            **vars(settings),
        }
        open_work(work, run, resume=resume)
        S = settings.sequence_length
        self.packed = pack(corpus, pair.tokenizer, "train", S, work / "packed")
        self.held_out = pack(corpus, pair.tokenizer, "valid", S, work / "packed", by_domain=True)
        self.order = Order(self.packed, settings.seed)
        self.store: TeacherStore | None = None

    def learn_from_teacher(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Make sure that the teacher's predictions for the whole run are on disk."""
        pair, settings = self.pair, self.settings
        if pair.teacher is None or not settings.needs_teacher:
            return
        about = About(
            teacher=pair.teacher.folder.name,
            fingerprint=pair.teacher.fingerprint,
            dtype="as stored" if dtype is None else str(dtype).removeprefix("torch."),
            corpus=self.packed.meta["corpus"],
            tokenizer=self.packed.meta["tokenizer"],
            split="train",
            sequence_length=settings.sequence_length,
            mask_documents=pair.mask_documents,
            vocab_size=pair.vocab_size,
            candidates=min(CANDIDATES, pair.vocab_size - 1),
        )
        self.store = TeacherStore(folder, about)
        needed = self.order(0, settings.steps * settings.batch_size).tolist()
        S, total = settings.sequence_length, len(set(needed))
        done = total - len(self.store.missing(needed))

        def progress(sequences: int) -> None:
            nonlocal done
            done += sequences
            if self.progress is not None:
                self.progress("teacher", done * S, total * S)

        teacher = pair.teacher.folder
        self.store.fill(
            lambda: load_model(teacher, dtype), self.packed, needed, batch_size=settings.batch_size, progress=progress
        )

    def train(self, checkpoint_every: int) -> Recovered:
        """All steps that are left; leaves the model in the dtypes of the student."""
        settings = self.settings
        self.model = load_model(self.pair.student.folder, None)
        dtypes = [tensor.dtype for tensor in _tensors(self.model)]
        self.model.float()
        trained = _choose(self.model, settings.only)
        self.distiller = Distiller(self.model)
        before = self._evaluate()
        optimizer = build_optimizer(self.model, OptimSpec(lr=settings.lr, weight_decay=0.0))
        at = restore(self.work, self.model, optimizer)
        began = time.monotonic() - at.seconds
        self.model.train()
        with StopRequest() as stop:
            while at.step < settings.steps:
                self._step(at.step, trained, optimizer)
                B, S = settings.batch_size, settings.sequence_length
                at = replace(at, step=at.step + 1, tokens=at.tokens + B * S, seconds=time.monotonic() - began)
                last = at.step == settings.steps
                if stop.requested or last or at.step % checkpoint_every == 0:
                    save_checkpoint(self.work, at, self.model, optimizer)
                if self.progress is not None:
                    self.progress("student", at.tokens, settings.steps * B * S)
                if stop.requested and not last:
                    raise KeyboardInterrupt
        del optimizer
        self.model.eval()
        _round(self.model, dtypes)
        after = self._evaluate()
        for tensor, dtype in zip(_tensors(self.model), dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)
        return _result(before, after, at.step, at.tokens, sum(p.numel() for p in trained), at.seconds)

    def _step(self, step: int, trained: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """One optimizer step."""
        settings, model = self.settings, self.model
        # what draws from the global generator (dropout) replays after a resume
        torch.manual_seed(seed_of(settings.seed, step, "recover"))
        rate = settings.lr * Cosine(warmup=0.05)(step, settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        rows = self.order(step * settings.batch_size, settings.batch_size)
        batch = self.packed.batch(rows)
        share = settings.kd_share(step)
        targets = self.store.targets(rows.tolist()) if self.store is not None and share else None
        # the backward pass may recompute the forward, which must then see the same context
        with use_context(model, routing_context(batch, seed=settings.seed, step=step)):
            loss, _ = self.distiller.loss(model_inputs(batch, model, self.pair.mask_documents), targets, share)
            loss.backward()
        Ranks().sum_gradients_(trained)
        nats, norm = loss.item(), float(gradient_norm(trained))
        if not (math.isfinite(nats) and math.isfinite(norm)):
            culprit = first_non_finite(model) or "no single tensor, the norm of all gradients overflows"
            raise NonFiniteError(
                f"step {step + 1}: the loss is {nats} and the gradient norm {norm}; first that is not finite: "
                f"{culprit}. Nothing was written; start again with --fresh and a lower learning rate"
            )
        clip_(trained, norm, 1.0)
        optimizer.step()

    def _evaluate(self) -> Evaluation:
        return evaluate(
            self.model,
            self.held_out,
            # nats per token are asked for, which exist for tokenizers that lose bytes, too
            np.ones(self.pair.vocab_size, np.int64),
            self.settings.batch_size,
            sequences_per_domain=self.eval_sequences,
            mask_documents=self.pair.mask_documents,
            objective=self.distiller,
        )

    def record(self, result: Recovered) -> dict[str, Any]:
        """What goes into the result's own record."""
        teacher = self.pair.teacher
        settings = {**vars(self.settings), "tokens": result.tokens, "kd_shares": list(self.settings.kd_shares)}
        return {
            **settings,
            "steps": result.steps,
            "trained": result.trained,
            "teacher": teacher.folder.name if teacher else None,
            "teacher_fingerprint": teacher.fingerprint if teacher else None,
            "data": self.corpus.name,
            "corpus": self.packed.meta["corpus"],
            "candidates": self.store.about.candidates if self.store is not None else None,
            "before": {"loss": result.before, "domains": {name: one for name, (one, _) in result.domains.items()}},
            "after": {"loss": result.after, "domains": {name: one for name, (_, one) in result.domains.items()}},
        }


def _tensors(model: torch.nn.Module) -> list[Tensor]:
    """Parameters, tied ones once, and buffers."""
    return [*model.parameters(), *model.buffers()]


def _choose(model: torch.nn.Module, only: Only) -> list[torch.nn.Parameter]:
    """Let nothing but what is to be trained have gradients."""
    if only == "router":
        routers = {id(p) for site in sites(model) for p in site.gate.parameters()}
        for p in model.parameters():
            p.requires_grad_(id(p) in routers)
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def _round(model: torch.nn.Module, dtypes: list[torch.dtype]) -> None:
    """Give every weight the value it will be stored with; it stays in float32."""
    for tensor, dtype in zip(_tensors(model), dtypes, strict=True):
        tensor.copy_(tensor.to(dtype))


def _result(before: Evaluation, after: Evaluation, steps: int, tokens: int, trained: int, seconds: float) -> Recovered:
    one, other = ({name: found.nats[name] / found.tokens[name] for name in found.nats} for found in (before, after))
    domains = {name: (one[name], other[name]) for name in one}
    return Recovered(before.loss, after.loss, domains, None, steps, tokens, trained, seconds)
