"""The sides of the `train` benchmark, each in a process of its own that takes turns with the other.

A side runs its loop from the first step to the last and stops before every piece of steps until it is told to go on, so
that everything between two steps is in the time of a piece: reading the next batch, logging, the schedule.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from collegium.process import peak_memory
from collegium.train.batches import Order
from collegium.train.loop import _Trainer
from collegium.train.prepare import prepare
from collegium.train.ranks import Ranks, open_ranks
from collegium.train.recipe import Recipe
from collegium.train.schedule import build_schedule

__all__ = ["Pace", "main", "sequences"]


class Pace:
    """Stops a loop before every piece of steps.

    Args:
        steps: of a piece.
        told, tells: where "go" comes from, line by line, and where the seconds and losses of each piece go to.
        end: called where nobody says "go" any more.
    """

    def __init__(self, steps: int, told: TextIO, tells: TextIO, end: Callable[[], None]) -> None:
        self.steps, self.told, self.tells, self.end = steps, told, tells, end
        self._done, self._began = 0, 0.0
        self._losses: list[Tensor | float] = []

    def begin(self) -> None:
        """A step is about to begin."""
        if self._done % self.steps == 0:
            seconds = time.perf_counter() - self._began if self._done else None
            self._say({"seconds": seconds, "losses": [float(loss) for loss in self._losses]})
            self._losses.clear()
            if self.told.readline().strip() != "go":
                self._say({"bytes": peak_memory()})
                self.end()
            self._began = time.perf_counter()
        self._done += 1

    def loss(self, value: Tensor | float) -> None:
        """The text's loss in the step that has begun, nats per predicted token."""
        self._losses.append(value)

    def _say(self, line: dict[str, Any]) -> None:
        self.tells.write(json.dumps(line) + "\n")
        self.tells.flush()


def main(side: str, recipe: str, folder: str, steps: int, experts: str = "") -> None:
    """Run a side as a process: "ours", or "transformers" with an implementation of `experts`.

    Args:
        recipe: file of it.
        folder: holds ``peer``, the model that both begin from; a run may write beside it.
        steps: of a piece.
    """
    tells = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr  # whatever a library prints
    read, pace = Recipe.load(recipe), Pace(steps, sys.stdin, tells, lambda: os._exit(0))
    if side == "ours":
        _ours(read, Path(folder) / "run", pace)
    else:
        _transformers(read, Path(folder), pace, experts)
    raise RuntimeError("the run ended before the benchmark did: it has too few steps")


# ---- ours ------------------------------------------------------------------------------------------------------------


class _Paced(_Trainer):
    """The loop of ``collegium train``."""

    pace: Pace

    def _step(self, stop: bool, measure: bool) -> tuple[bool, dict[str, Any]]:
        self.pace.begin()
        found = super()._step(stop, measure)
        self.pace.loss(found[1]["loss"])
        return found


def _ours(recipe: Recipe, out: Path, pace: Pace) -> None:
    with open_ranks() as ranks:
        trainer = _Paced(recipe, out, ranks, resume=False)
        trainer.pace = pace
        trainer.run()


# ---- transformers ----------------------------------------------------------------------------------------------------


def sequences(recipe: Recipe) -> Tensor:
    """``[N, S]`` the token ids of a run of ours, in its order."""
    packed = prepare(recipe, Ranks()).train
    rows = Order(packed, recipe.run.seed)(0, recipe.steps * recipe.run.batch_size)
    return packed.batch(rows)["input_ids"]


def _transformers(recipe: Recipe, folder: Path, pace: Pace, experts: str) -> None:
    from transformers import PrinterCallback, Qwen3MoeForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Paced(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pace.begin()

    class Watched(Trainer):
        """Reads the sequences in order and tells the text's loss, which the model's holds together with the balance."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(train_dataset)

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            pace.loss(outputs.loss.detach() - model.router_aux_loss_coef * outputs.aux_loss.detach())
            return (loss, outputs) if return_outputs else loss

    model = Qwen3MoeForCausalLM.from_pretrained(folder / "peer", dtype=torch.float32, attn_implementation="sdpa")
    model.set_experts_implementation(experts)
    model.config.output_router_logits, model.config.use_cache = True, False
    settings = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=recipe.run.batch_size,
        max_steps=recipe.steps,
        max_grad_norm=recipe.optim.clip,
        logging_steps=recipe.run.log_every,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=recipe.run.seed,
    )
    rows = [{"input_ids": row, "labels": row} for row in sequences(recipe)]
    optimizers = _optimizer(model, recipe)
    trainer = Watched(model, settings, train_dataset=rows, optimizers=optimizers, callbacks=[Paced()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _optimizer(model: nn.Module, recipe: Recipe) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with the groups and the schedule of ours, whose routers are not decayed."""
    spec, schedule = recipe.optim, build_schedule(recipe.schedule)
    decayed = [p for name, p in model.named_parameters() if p.dim() > 1 and not name.endswith(".gate.weight")]
    there = {id(p) for p in decayed}
    plain = [p for p in model.parameters() if id(p) not in there]
    groups = [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, recipe.steps))
