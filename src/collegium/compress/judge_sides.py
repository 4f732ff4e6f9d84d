"""One of the models that are judged: its hidden states and logits, and what its MoE blocks chose and computed.

Legend: B sequences, S positions, T = B * S, N rows, d model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from collegium.compress.mask import apply_mask
from collegium.compress.plan import Plan
from collegium.errors import NotMoEError, PlanError, UnsupportedFamilyError
from collegium.routing import Routing
from collegium.sites import Order, Site, sites, tap
from collegium.train.objective import Objective

__all__ = ["Seen", "Side", "why_no_mask"]


@dataclass(eq=False)
class Seen:
    """What one forward showed.

    Attributes:
        hidden: ``[B, S, d]`` last hidden states, or ``[B, S, V]`` logits where these are not a plain product of those.
        routing: layer -> what its experts were told.
        output: layer -> what came out of the MoE block, ``[T, d]``.
    """

    hidden: Tensor
    routing: dict[int, Routing] = field(default_factory=dict)
    output: dict[int, Tensor] = field(default_factory=dict)


def why_no_mask(plan: Plan) -> str | None:
    """Why a mask is not what `plan` makes of a model; None if it is, to rounding."""
    computed = sorted({one.op for one in plan.layers} - {"prune", "identity"})
    if computed:
        return f"its experts are computed ({', '.join(computed)}), which no mask can do"
    if plan.router.mode != "rows":
        return f"its routers are edited ({plan.router.mode}), which no mask can do"
    return None


class Side:
    """A causal language model, with a plan as a mask on it or without.

    Args:
        model: with `plan` None it may be dense.

    Raises:
        NotMoEError, PlanError, UnsupportedFamilyError: the plan cannot be a mask on this model; or the model is no
            causal one.
    """

    def __init__(self, model: Any, plan: Plan | None = None) -> None:
        self.model, self.plan = model, plan
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedFamilyError(f"{type(model).__name__} has an encoder; only causal models can be judged")
        if plan is not None and (why := why_no_mask(plan)) is not None:
            raise PlanError(
                f"the plan for {plan.model} cannot be tried as a mask: {why}; apply it and judge the result"
            )
        self.notes: list[str] = []
        with self.masked():
            self.weight = Objective(model).weight
        self.sites = self._sites()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @contextmanager
    def masked(self) -> Iterator[None]:
        """Within the context the model is without the experts that the plan drops."""
        with ExitStack() as stack:
            if self.plan is not None:
                stack.enter_context(apply_mask(self.model, self.plan))
            yield

    def run(self, inputs: dict[str, Tensor]) -> Seen:
        """One forward; `inputs` as for the model, without labels."""
        seen = Seen(torch.empty(0))
        with ExitStack() as stack:
            stack.enter_context(self.masked())
            if self.sites:
                stack.enter_context(tap(self.model, _Watch(seen)))
                for layer, site in self.sites.items():
                    stack.callback(site.block.register_forward_hook(_keep(seen, layer)).remove)
            if self.weight is None:
                seen.hidden = self.model(**inputs, use_cache=False).logits
            else:
                seen.hidden = self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        return seen

    def logits(self, rows: Tensor) -> Tensor:
        """``[N, V]`` float32 logits of rows of `Seen.hidden`."""
        return (rows if self.weight is None else rows @ self.weight.to(rows.dtype).T).float()

    @property
    def vocabulary(self) -> int:
        """V."""
        head = self.model.get_output_embeddings()
        return int(head.weight.shape[0])

    def _sites(self) -> dict[int, Site]:
        try:
            found = sites(self.model)
        except NotMoEError:
            return {}
        except UnsupportedFamilyError as error:
            self.notes.append(f"its MoE layers were not looked at: {error}")
            return {}
        by_layer = {site.layer: site for site in found}
        if len(by_layer) != len(found):
            self.notes.append("its MoE layers were not looked at: there are several with one number")
            return {}
        return by_layer


class _Watch:
    """Keeps what the experts are told."""

    order = Order.OBSERVE

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def __call__(self, site: Site, x: Tensor, routing: Routing) -> None:
        self.seen.routing[site.layer] = routing


def _keep(seen: Seen, layer: int) -> Any:
    def hook(block: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        seen.output[layer] = first.detach().reshape(-1, first.shape[-1])

    return hook
