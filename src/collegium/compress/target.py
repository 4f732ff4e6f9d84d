"""`Target`: what a planner must know of the model it plans for, read from the checkpoint's config and headers.

Legend: E experts of a layer, K experts a token chooses, G routing groups, d model width, f expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from collegium.errors import NotMoEError, UnsupportedFamilyError
from collegium.models.checkpoint import Checkpoint
from collegium.models.families import lookup
from collegium.models.summary import LayerSummary, Summary, summarize

__all__ = ["Target", "TargetLayer", "fewest_kept"]


def fewest_kept(num_experts: int, top_k: int, groups: int, top_groups: int) -> int:
    """The fewest experts of a layer with which its router still finds K, as many of each group.

    A group-limited router ranks groups by their two best experts, so a group that had two must keep two.
    """
    if groups == 1:
        return top_k
    each = max(-(-top_k // top_groups), min(2, num_experts // groups))
    return groups * each


@dataclass(frozen=True)
class TargetLayer:
    """One MoE layer: its E, the stored bytes and the parameters of one expert with its row of the router, f, and the
    stored bytes and the parameters of one neuron of one expert (None and 0 where f is not known)."""

    layer: int
    num_experts: int
    expert_nbytes: int
    expert_parameters: int
    intermediate_size: int | None = None
    neuron_nbytes: int = 0
    neuron_parameters: int = 0


@dataclass(frozen=True)
class Target:
    """A model to be made smaller.

    Attributes:
        model: its name.
        fingerprint: identity of the checkpoint; None if it was not one, or its weights are not there.
        family: model_type.
        top_k: K.
        groups, top_groups: routing groups, and how many of them a token may use; 1 and 1 without groups.
        layers: its MoE layers, ascending.
        nbytes, parameters: of the whole model, multi-token prediction left out.
        mtp: it has multi-token-prediction layers.
    """

    model: str
    fingerprint: str | None
    family: str
    top_k: int
    layers: tuple[TargetLayer, ...]
    nbytes: int
    parameters: int
    groups: int = 1
    top_groups: int = 1
    mtp: bool = False

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Target:
        """Read it from a checkpoint; of the weights only the headers and what the fingerprint takes.

        Raises:
            NotMoEError: it has no routed experts.
            UnsupportedFamilyError: it cannot be planned for: several MoE blocks in a layer, K differs by layer, or E
                or K are not to be found.
        """
        summary = summarize(checkpoint)
        name = checkpoint.folder.name or str(checkpoint.folder)
        if not summary.moe_layers:
            raise NotMoEError(f"{checkpoint.folder} (family {summary.family!r}) has no routed experts to prune")
        layers = sorted(summary.moe_layers, key=lambda one: one.layer)
        if len({one.layer for one in layers}) != len(layers):
            raise UnsupportedFamilyError(
                f"{name} (family {summary.family!r}) has MoE layers in several stacks: "
                f"{', '.join(sorted({one.stack for one in layers}))}; a plan has one MoE block a layer"
            )
        K = {one.top_k for one in layers}
        if len(K) != 1 or None in K or any(one.num_experts is None for one in layers):
            raise UnsupportedFamilyError(
                f"{name} (family {summary.family!r}): a plan needs the number of experts of every layer and one top-k "
                f"for all; found E {[one.num_experts for one in layers]} and K {sorted(map(str, K))}"
            )
        groups, top_groups = _groups(checkpoint.config)
        return cls(
            model=name,
            fingerprint=None if checkpoint.missing or not checkpoint.tensors else checkpoint.fingerprint,
            family=summary.family,
            top_k=layers[0].top_k or 1,
            layers=_layers(layers, summary, lookup(checkpoint.config, "hidden_size")),
            nbytes=summary.nbytes,
            parameters=summary.parameters,
            groups=groups,
            top_groups=top_groups,
            mtp=summary.extra_parameters > 0,
        )


def _layers(layers: list[LayerSummary], summary: Summary, d: Any) -> tuple[TargetLayer, ...]:
    """Routers are linear: each expert has an equal part of them, its row and its biases."""
    experts = sum(one.num_experts or 0 for one in layers)
    parameters, nbytes = (total // experts for total in summary.parts["router"])
    return tuple(
        TargetLayer(
            one.layer,
            one.num_experts or 0,
            one.expert_nbytes + nbytes,
            one.expert_parameters + parameters,
            *_neuron(one, summary.expert_width, d),
        )
        for one in layers
    )


def _neuron(layer: LayerSummary, f: int | None, d: Any) -> tuple[int | None, int, int]:
    """``(f, bytes, parameters)`` of one neuron: its rows and column, and its entries of the biases."""
    whole = layer.expert_parameters
    if f is None or not isinstance(d, int) or not whole:
        return None, 0, 0
    # what an expert holds beside its neurons is the bias of its output
    parameters = whole // f if whole % (d * f) == 0 else (whole - d) // f
    return f, layer.expert_nbytes * parameters // whole, parameters


def _groups(config: dict[str, Any]) -> tuple[int, int]:
    """``(groups, groups a token may use)`` of the router."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    text = config.get("text_config")
    family = (text.get("model_type") if isinstance(text, dict) else None) or config.get("model_type")

    def fact(name: str) -> Any:
        # a hand-written config may leave out what is its class's default
        found = lookup(config, name)
        return lookup(CONFIG_MAPPING[family]().to_dict(), name) if found is None and family in CONFIG_MAPPING else found

    groups, top_groups = fact("groups"), fact("top_groups")
    if fact("group_method") == "greedy" or not isinstance(groups, int) or groups < 2:
        return 1, 1
    return groups, top_groups if isinstance(top_groups, int) and 1 <= top_groups <= groups else groups
