"""How fast each method trains: steps taken in turns, so that a machine's moods hit all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from collegium.layer import after_step
from collegium.train import Recipe
from collegium.train.batches import model_inputs, routing_context
from collegium.train.build import build_model
from collegium.train.objective import Objective
from collegium.train.objectives import MicroBatch, find_objective
from collegium.train.optim import build_optimizer

__all__ = ["SPEED", "training_speed"]

SPEED = "speed.json"
_TURNS, _WARMUP = 15, 2


def training_speed(recipes: Mapping[str, Recipe]) -> dict[str, float]:
    """Trained tokens per second of each recipe: the tokens of a step over its median seconds, of 15 steps.

    A step is all micro-batches, forward, backward, optimizer and balance, on random tokens, from fresh weights, in
    this process with all of torch's threads.
    """
    steps = {name: _step(recipe) for name, recipe in recipes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(_WARMUP + _TURNS):
        for name, step in steps.items():
            began = time.perf_counter()
            step(turn)
            if turn >= _WARMUP:
                seconds[name].append(time.perf_counter() - began)
    tokens = {name: one.run.batch_size * one.data.sequence_length for name, one in recipes.items()}
    return {name: tokens[name] / statistics.median(times) for name, times in seconds.items()}


def _step(recipe: Recipe) -> Callable[[int], None]:
    """One optimizer step of the recipe's model, by its number."""
    model = build_model(recipe).train()
    optimizer = build_optimizer(model, recipe.optim)
    objective, minimised = Objective(model), find_objective(recipe.objective)
    size = recipe.run.batch_size // recipe.run.accumulate
    batch = _batch(size, recipe.data.sequence_length, model.get_input_embeddings().num_embeddings)
    predicted = recipe.run.batch_size * (recipe.data.sequence_length - 1)

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        for m in range(recipe.run.accumulate):
            context = routing_context(batch, seed=recipe.run.seed, step=number, micro_batch=m)
            inputs = model_inputs(batch, model, recipe.data.mask_documents)
            minimised.step(MicroBatch(objective, inputs, context, predicted, recipe.run.accumulate))
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip)
        optimizer.step()
        after_step(model, number)

    return step


def _batch(size: int, length: int, vocabulary: int) -> dict[str, Any]:
    """Random tokens; each sequence has a document border in its middle."""
    ids = torch.randint(vocabulary, (size, length), generator=torch.Generator().manual_seed(0))
    place = torch.arange(length).expand(size, -1)
    half = place >= length // 2
    document = 2 * torch.arange(size)[:, None] + half
    return {"input_ids": ids, "document": document, "position": place - half * (length // 2)}
