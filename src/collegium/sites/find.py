"""`sites`: every MoE block of a model, found by structure, so that renamed or rewritten classes do not hide it.

A block is a module with a child named ``experts`` beside one named ``gate`` or ``router``. Which adapter it needs is
read from the children; what structure cannot tell is in `collegium.sites.families`.
"""

from __future__ import annotations

import re
from functools import cache, partial
from typing import Any

import transformers
from torch import nn

from collegium.errors import NotMoEError, UnsupportedFamilyError
from collegium.sites.adapters import ADAPTERS
from collegium.sites.families import SINCE, UNSUPPORTED, score_of
from collegium.sites.site import Site

__all__ = ["sites"]

_SHARED = ("shared_expert", "shared_experts", "shared_mlp")


def sites(model: nn.Module, *, iterated: bool = False) -> list[Site]:
    """The MoE blocks of `model`, in the order of its modules.

    Works for transformers models (the families behind the experts interface, Llama-4, NLLB-MoE, Switch; text backbones
    and multimodal wrappers) and for any module that holds `collegium.layer.MoE`.

    Args:
        model: the model, or a part of it.
        iterated: blocks that route several times in a forward (`Site.iterations`) are understood. Most of what works
            on sites knows one routing of a layer and one row of its gate for an expert, so they are refused otherwise.

    Raises:
        NotMoEError: the model has no MoE block.
        UnsupportedFamilyError: it has one that no adapter covers, or one of several iterations without `iterated`.
    """
    _refuse_unsupported(model)
    _refuse_older_release(model)
    found = []
    for path, block in model.named_modules():
        experts = _child(block, "experts")
        gate = _child(block, "gate", "router")
        if experts is not None and gate is not None:
            found.append(_site(model, path, block, gate, experts))
    if not found:
        raise NotMoEError(
            f"{type(model).__name__} (model type {_model_type(model)!r}) has no MoE block: no module in it holds "
            "'experts' beside a 'gate' or 'router'; use a MoE checkpoint, or put MoE layers into this model with "
            "collegium.install(model, config)"
        )
    several = [] if iterated else [site for site in found if site.iterations > 1]
    if several:
        raise UnsupportedFamilyError(
            f"the MoE block {several[0].path!r} routes {several[0].iterations} times in a forward, and this reads one "
            "routing of a layer; sites() and tap() take iterated=True and then show each of them"
        )
    return found


def _site(model: nn.Module, path: str, block: nn.Module, gate: nn.Module, experts: nn.Module) -> Site:
    config = _config(model, block, experts)
    family = getattr(config, "model_type", None) or "collegium"
    adapter = next((a for a in ADAPTERS if a.matches(block, gate, experts)), None)
    if adapter is None:
        raise UnsupportedFamilyError(
            f"no adapter covers the MoE block {path!r} ({type(block).__name__}, family {family!r}): its "
            f"{type(experts).__name__} neither uses transformers' experts interface nor is a known exception"
        )
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return Site(
        layer=int(number.group(1)) if number else 0,
        path=path,
        block=block,
        gate=gate,
        experts=experts,
        shared=_shared(model, path, block),
        num_experts=adapter.num_experts(experts),
        top_k=adapter.top_k(block, gate, config),
        family=family,
        score=adapter.score(gate) or score_of(family, config),
        adapter=adapter,
        names=cache(partial(adapter.names, model, f"{path}.experts".lstrip("."), experts)),
    )


def _child(block: nn.Module, *names: str) -> nn.Module | None:
    return next((block._modules[name] for name in names if block._modules.get(name) is not None), None)


def _shared(model: nn.Module, path: str, block: nn.Module) -> tuple[nn.Module, ...]:
    found = [_child(block, name) for name in _SHARED]
    if path:
        # in the GraniteMoE families it is a neighbour of the block
        found.append(_child(model.get_submodule(path.rpartition(".")[0]), *_SHARED))
    return tuple(module for module in found if module is not None)


def _config(model: nn.Module, block: nn.Module, experts: nn.Module) -> Any:
    """The config the block was built from, as near to it as it can be had."""
    for owner in (experts, block):
        if hasattr(owner, "config"):
            return owner.config
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _refuse_unsupported(model: nn.Module) -> None:
    for module in model.modules():
        family = _model_type(module)
        if family not in UNSUPPORTED:
            continue
        # dense models of such a family exist too
        if any(re.search(r"moe|expert", type(m).__name__, re.IGNORECASE) for m in module.modules()):
            raise UnsupportedFamilyError(
                f"the experts of family {family!r} cannot be reached: {UNSUPPORTED[family]}; "
                "watch or change them with hooks of your own"
            )


def _refuse_older_release(model: nn.Module) -> None:
    family = next((found for module in model.modules() if (found := _model_type(module)) in SINCE), None)
    classes = [type(module) for module in model.modules()]
    experts = [cls for cls in classes if "Experts" in cls.__name__ and cls.__module__.startswith("transformers.")]
    # the decorator gives every class behind the interface this method
    if family and experts and not any(hasattr(cls, "_apply_gate") for cls in experts):
        raise UnsupportedFamilyError(
            f"the experts of family {family!r} are behind transformers' experts interface since release "
            f"{SINCE[family]}; this is {transformers.__version__}, so upgrade transformers"
        )
