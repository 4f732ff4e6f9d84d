"""`ModelGates`: what the routers of a model say about the input of an earlier router.

Legend: T tokens of a pass, E experts of a layer, d model width.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from collegium.errors import ConfigError
from collegium.measure.predict_gate import RouterNorm, carry_over, find_norm, norm_at
from collegium.routing import Router, router_from_gate
from collegium.sites import sites

__all__ = ["ModelGates"]

_ENOUGH = 64  # rows that a norm is settled on


@dataclass(eq=False)
class _Seen:
    """What is known of the norm in front of one router."""

    norm: RouterNorm | None = None
    rows: Tensor | None = None
    checked: int = 0  # rows it was last looked for with


class ModelGates:
    """`collegium.offload.predictors.base.Gates` of a model in memory.

    The norm in front of a router is found from the inputs the router has seen so far, and looked for again as they
    become more. Until a router has seen any, its norm is taken to stand where that of the earlier router stands.

    Args:
        model: with its gates and norms loaded; its experts are not touched.

    Raises:
        NotMoEError: there are no gates.
        UnsupportedFamilyError: no router is known for one of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sites = sites(model)
        config = getattr(model, "config", None)
        self._routers = [_scoring(router_from_gate(one.gate, block=one.block, config=config)) for one in self._sites]
        self._seen = [_Seen() for _ in self._sites]

    @torch.no_grad()
    def scores(self, layer: int, gate_input: Tensor, seen_at: int) -> Tensor:
        """``[T, E]`` float32 selection scores of `layer`'s router, -inf where it may not choose.

        Args:
            layer: counted from 0.
            gate_input: ``[T, d]`` what the router of `seen_at` saw.
            seen_at: counted from 0.

        Raises:
            ConfigError: there is no such layer.
        """
        L = len(self._sites)
        if not (0 <= layer < L and 0 <= seen_at < L):
            raise ConfigError(f"layers {seen_at} and {layer} were asked for; the model's MoE layers are 0 to {L - 1}")
        x = gate_input.detach().float()
        first = self._norm(seen_at, x)
        second = self._seen[layer].norm
        if second is None and first is not None and self._seen[layer].rows is None:
            second = self._seen[layer].norm = norm_at(self._model, self._sites[layer], first)
        router = self._routers[layer]
        x = carry_over(x, first, second)
        routing = router(x.to(router.weight.device))
        assert routing.selection is not None
        return routing.selection.float()

    def _norm(self, layer: int, x: Tensor) -> RouterNorm | None:
        """The norm in front of a router that sees ``x [T, d]`` now."""
        seen = self._seen[layer]
        count = 0 if seen.rows is None else len(seen.rows)
        if count < _ENOUGH and len(x):
            fresh = x[: _ENOUGH - count].cpu()
            seen.rows = fresh if seen.rows is None else torch.cat([seen.rows, fresh])
            if len(seen.rows) >= min(2 * seen.checked, _ENOUGH):
                seen.norm = find_norm(self._model, self._sites[layer], seen.rows)
                seen.checked = len(seen.rows)
        return seen.norm


def _scoring(router: Router) -> Router:
    """The same router, keeping what its selection looked at; the one it was made from stays as it is."""
    router = copy(router)
    router.keep_logits = True
    return router
