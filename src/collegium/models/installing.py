"""Put `MoE` blocks into a transformers causal LM."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers import PreTrainedModel

from collegium.balance import BalanceConfig
from collegium.errors import ConfigError, NotMoEError, UnsupportedFamilyError
from collegium.layer import link_layers, moe_layers
from collegium.models.blocks import Block, BlockMoE, decoder_blocks, family_of, moe_blocks, probe
from collegium.models.config import MoEConfig
from collegium.models.decoding import give_memory, give_mixing, give_positions, refuse_decoding
from collegium.models.wrapping import wrap_block

__all__ = ["install"]

SECTION_VERSION = 1
"""Version of the "collegium" section of a config."""


def install(
    model: PreTrainedModel,
    config: MoEConfig | None = None,
    layers: Iterable[int] | None = None,
    *,
    balance: BalanceConfig | None = None,
    group: dist.ProcessGroup | None = None,
) -> PreTrainedModel:
    """Replace feed-forward blocks of `model` by `MoE` blocks, in place.

    With a config, every chosen decoder layer gets a fresh, randomly drawn MoE in place of its FFN, be that dense or
    an MoE; weights have the standard deviation ``initializer_range`` of the model's config.

    Without one, the model's own MoE blocks are wrapped: gates, experts and shared experts keep their parameters, and
    each wrapped block is run against the original on random input before it takes its place.

    What was done is recorded in ``model.config.collegium``, which `save` writes and `load` reads.

    Args:
        model: a transformers model with decoder layers.
        config: settings of the fresh blocks, or None to wrap.
        layers: indices of the decoder layers to change; None means all that can be (from
            ``config.first_k_dense_replace`` on).
        balance: how wrapped blocks are kept busy; a fresh block's is in `config`.
        group: the processes whose tokens count together for balance, see `LoadStats`.

    Returns:
        `model`.

    Raises:
        ConfigError: settings that do not fit one another or the model; a model that has MoE blocks of ours already, or
            whose config asks for transformers' own balance loss (``output_router_logits``).
        NotMoEError: nothing to wrap, and no config was given.
        UnsupportedFamilyError: the family's blocks cannot be replaced or wrapped; the message names it and says why.
    """
    if moe_layers(model):
        raise ConfigError("this model has MoE blocks of ours already; install once, or load the base model again")
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ConfigError(
            "output_router_logits is on, but transformers' own balance loss would find no router of its own any more; "
            "turn it off in the model's config and use balance= instead"
        )
    section: dict[str, object]
    if config is not None:
        if balance is not None:
            raise ConfigError("balance= is for wrapping; a fresh MoE takes its balance from the config")
        chosen = _choose(decoder_blocks(model), layers, config.first_k_dense_replace)
        blocks = [(block, _fresh(model, block, config)) for block in chosen]
        section = {"moe": config.model_dump(mode="json")}
        balance = config.balance
    else:
        found = moe_blocks(model)
        if not found:
            _refuse_foreign_experts(model)
            raise NotMoEError(
                f"model type {family_of(model)!r} has no MoE block to wrap; pass a MoEConfig to replace its FFNs"
            )
        chosen = _choose(found, layers, 0)
        blocks = [(block, wrap_block(model, block)) for block in chosen]
        section = {"wrapped": None if balance is None else balance.model_dump(mode="json")}
    for _, moe in blocks:
        moe.set_balance(balance, group)
    _connect(model, blocks)
    # nothing can be refused from here on, so a model is changed as a whole or not at all
    for block, moe in blocks:
        block.replace(moe)
    link_layers(model)
    model.config.collegium = {"version": SECTION_VERSION, "layers": [block.layer for block in chosen], **section}
    return model


def _connect(model: PreTrainedModel, blocks: list[tuple[Block, BlockMoE]]) -> None:
    """Give routers what they need of the decoder.

    Raises:
        ConfigError, UnsupportedFamilyError: the model's attention cannot give it.
    """
    mixing = [(block, moe) for block, moe in blocks if any(part.needs_attention for part in moe.gate.parts)]
    if mixing:
        give_mixing(model, [(moe, _attention(block, model)) for block, moe in mixing])
    if any(not (part.causal or part.remembers) for _, moe in blocks for part in moe.gate.parts):
        refuse_decoding(model, [moe for _, moe in blocks])
    if any(part.uses_position for _, moe in blocks for part in moe.gate.parts):
        give_positions(model, [moe for _, moe in blocks])
    if any(part.remembers for _, moe in blocks for part in moe.gate.parts):
        give_memory(model, [moe for _, moe in blocks])


def _attention(block: Block, model: PreTrainedModel) -> nn.Module:
    """The attention module of the decoder layer that holds a block."""
    found = getattr(block.parent, "self_attn", None)
    if not isinstance(found, nn.Module):
        raise UnsupportedFamilyError(
            f"decoder layer {block.layer} of model type {family_of(model)!r} has no self_attn to average by"
        )
    return found


def _refuse_foreign_experts(model: PreTrainedModel) -> None:
    """Say of an MoE model whose experts are not transformers' fused ones what it is, instead of "no MoE block"."""
    text = model.config.get_text_config()
    if any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UnsupportedFamilyError(
            f"the experts of model type {family_of(model)!r} do not go through transformers' experts interface in "
            f"transformers {transformers.__version__}, so its MoE blocks cannot be wrapped"
        )


def _choose(blocks: list[Block], layers: Iterable[int] | None, first: int) -> list[Block]:
    """The blocks of the layers asked for."""
    there = [block.layer for block in blocks if block.layer >= first]
    wanted = there if layers is None else sorted(set(layers))
    missing = sorted(set(wanted) - set(there))
    if missing or not wanted:
        raise ConfigError(f"layers {missing or wanted} cannot be replaced; the layers that can are {there}")
    return [block for block in blocks if block.layer in wanted]


def _fresh(model: PreTrainedModel, block: Block, config: MoEConfig) -> BlockMoE:
    """A randomly drawn MoE for one block, on the block's device and in its dtype."""
    text = model.config.get_text_config()
    x, _, pair = probe(model, block)
    hidden_act = config.hidden_act or getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None)
    if hidden_act is None:
        raise ConfigError(f"model type {family_of(model)!r} does not say its activation; set hidden_act")
    with torch.device(x.device):
        moe = BlockMoE(
            text.hidden_size,
            config.moe_intermediate_size,
            config.num_experts,
            config.slots,
            shared=config.shared_width,
            shared_gate=config.shared_expert_gate,
            zero_experts=config.zero_experts,
            router=config.build_gates(text.hidden_size),
            hidden_act=hidden_act,
            layer_index=block.layer,
            iterations=config.iterations,
            inner_residual=config.inner_residual,
        ).to(x.dtype)
    moe.pair = pair
    moe.reset_parameters(getattr(text, "initializer_range", 0.02))
    return moe
