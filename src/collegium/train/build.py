"""From a recipe to a model: build or load the dense model, install the MoE layers, count parameters, find the twin.

Legend: E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from collegium import models
from collegium.errors import ConfigError
from collegium.layer import moe_layers
from collegium.rng import seed_of
from collegium.train.recipe import Recipe

__all__ = ["Parameters", "build_model", "compile_around_experts", "count_parameters", "dense_twin"]


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None) -> Any:
    """The model a run starts from, in float32; equal recipes give equal weights.

    Args:
        recipe: its model and moe sections and the seed are used.
        tokenizer: gives the vocabulary size and the special tokens; None takes ``data.vocab_size``.

    Raises:
        ConfigError: the family or a setting of it does not exist, or the tokenizer does not fit a loaded model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(recipe.run.seed, "init"))
        if recipe.model.checkpoint is not None:
            model = models.load(recipe.model.checkpoint, dtype=torch.float32)
            size = model.get_input_embeddings().num_embeddings
            if tokenizer is not None and len(tokenizer) > size:
                raise ConfigError(f"the tokenizer has {len(tokenizer)} tokens, {recipe.model.checkpoint} has {size}")
        else:
            model = AutoModelForCausalLM.from_config(
                _config(recipe, tokenizer), dtype=torch.float32, attn_implementation="sdpa"
            )
        if recipe.moe is not None:
            model = models.install(model, recipe.moe)
    return model.train()


def _config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    spec = recipe.model
    settings = {
        "vocab_size": recipe.data.vocab_size,
        "max_position_embeddings": recipe.data.sequence_length,
        "tie_word_embeddings": True,
    }
    if tokenizer is not None:
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        settings |= {"vocab_size": len(tokenizer), **ids}
    settings |= spec.settings()
    try:
        config = AutoConfig.for_model(spec.family, **settings)
    except ValueError as error:
        raise ConfigError(f"model.family: transformers cannot configure {spec.family!r}: {error}") from error
    except Exception as error:  # config classes check their settings with exceptions of their own
        raise ConfigError(f"model: {spec.family} refuses these settings: {error}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"model.family: transformers has no causal language model of family {spec.family!r}")
    known = type(config)().to_dict()
    if unknown := [name for name in spec.settings() if name not in known]:
        raise ConfigError(f"model.{unknown[0]}: {type(config).__name__} has no such setting")
    return config


def compile_around_experts(model: Any) -> None:
    """Compile attention, norms and dense FFNs of every decoder layer in place.

    MoE blocks stay as they are: their shapes follow the routing, and their back ends are fused already.

    Raises:
        ConfigError: the model has no list of decoder layers.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(f"run.compile: {type(model).__name__} has no list of decoder layers; leave it out")
    for layer in layers:
        for part in layer.children():
            if not moe_layers(part):
                part.compile()


@dataclass(frozen=True)
class Parameters:
    """`total` parameters, tied ones once, and how many of them one token uses (`active`)."""

    total: int
    active: int


def count_parameters(model: nn.Module) -> Parameters:
    """Count. A token uses everything but the experts it is not routed to: routers and embeddings count as active. In a
    layer of C iterations these are C times K experts, so that what is active stands for what is computed."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for layer in moe_layers(model):
        E = layer.gate.num_experts
        K = min(sum(gate.top_k for gate in layer.gates), E)
        idle += sum(p.numel() for p in layer.experts.parameters()) * (E - K) // E
    return Parameters(total, total - idle)


def dense_twin(recipe: Recipe, multiple: int = 8) -> Recipe:
    """The same recipe without MoE, as wide as makes its parameters equal to those the MoE model uses for a token.

    The router counts as active, so the twin gets its parameters too, as FFN width. The width is rounded up to a
    multiple of `multiple`: the twin is never the smaller of the two.

    Raises:
        ConfigError: the recipe is dense already, or starts from a checkpoint, whose width is what it is.
    """
    if recipe.moe is None or recipe.model.checkpoint is not None:
        reason = "starts from a checkpoint" if recipe.model.checkpoint else "is dense already"
        raise ConfigError(f"there is no dense twin: the recipe {reason}")

    def dense(width: int) -> Recipe:
        return recipe.model_copy(
            update={"moe": None, "model": recipe.model.model_copy(update={"intermediate_size": width})}
        )

    with torch.device("meta"):
        active = count_parameters(build_model(recipe)).active
        at_8, at_16 = (count_parameters(build_model(dense(width))).total for width in (8, 16))
    per_width = (at_16 - at_8) / 8
    width = (active - at_8) / per_width + 8
    if width <= 0:
        raise ConfigError("there is no dense twin: without any FFN the dense model has more active parameters already")
    return dense(-int(-width // multiple) * multiple)
