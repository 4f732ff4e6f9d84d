"""The key of a text: what the first router of a model makes of it, found without running any expert.

Legend: S tokens of a text, E1 experts of the first MoE layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from collegium.compress.collectors import RouterSums
from collegium.compress.profiles_meta import ProfilesMeta
from collegium.errors import ModelError
from collegium.measure.site_batch import SiteBatch
from collegium.routing import Routing
from collegium.sites import Site, tap

__all__ = ["text_key"]


def text_key(model: nn.Module, meta: ProfilesMeta, ids: Tensor) -> Tensor:
    """``[E1]`` float32: the key of a text, made as those of the profiles were.

    Args:
        model: the one the profiles are of; it runs up to the router of its first MoE layer.
        ids: ``[S]`` int64.

    Raises:
        ModelError: it is another model.
    """
    probe = _Probe(meta.layers[0].layer, RouterSums(slots=meta.slots, share=meta.share))
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), tap(model, probe, logits=True) as found:
            theirs = sorted((site.layer, site.num_experts) for site in found)
            mine = [(one.layer, one.num_experts) for one in meta.layers]
            if mine != theirs:
                raise ModelError(
                    f"the profiles are of {meta.model}, whose MoE layers and numbers of experts are {mine}; this model "
                    f"has {theirs}"
                )
            model(input_ids=ids[None].to(device), use_cache=False)
    except _FarEnough:
        pass
    finally:
        model.train(training)
    if probe.key is None:
        raise ModelError(f"layer {meta.layers[0].layer} of {type(model).__name__} did not run")
    return probe.key


class _FarEnough(Exception):
    """The forward has gone far enough."""


class _Probe:
    """A tap that takes the key at the first MoE layer, and ends the forward there."""

    def __init__(self, layer: int, sums: RouterSums) -> None:
        self.layer, self.sums = layer, sums
        self.key: Tensor | None = None

    def __call__(self, site: Site, x: Tensor, routing: Routing) -> None:
        if site.layer != self.layer:
            return
        T = routing.num_tokens
        zeros = torch.zeros(T, dtype=torch.long, device=x.device)
        valid = torch.ones(T, dtype=torch.bool, device=x.device)
        batch = SiteBatch(site, x, routing, document=zeros, domain=zeros, position=zeros, valid=valid)
        state = self.sums.start(site)
        self.sums.update(state, batch)
        self.key = (state["z_topk_sum"] / T).float()
        raise _FarEnough
