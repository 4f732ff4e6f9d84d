"""NLLB-MoE: top-2 with a capacity; ``experts(x [T, d], first [T, E] one-hot, weight [T, E])``.

The gate's dense weights are the decision after all drops: zero for an expert that a token does not reach.

transformers (5.10 to 5.23 at least) reads the one-hot matrix as expert ids, so expert 1 computes every token's first
choice and expert 0 its second, whatever the gate decided. Records and interventions are about the gate's decision,
which is what a checkpoint was trained with; a warning says so as long as the installed release is like that.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import NllbMoeConfig

from collegium.routing import Routing
from collegium.sites.adapters.base import Adapter, Call, Handle
from collegium.sites.names import Names, module_names

if TYPE_CHECKING:
    from collegium.sites.site import Site

__all__ = ["NllbMoe"]


class NllbMoe(Adapter):
    """Hooked at the experts call; what a token wanted is read from the gate's logits.

    An assignment that did not reach its expert (capacity, the gate's random second choice, padding) is in the record
    with ``kept`` False and weight 0.
    """

    needs_gate: ClassVar[bool] = True

    def matches(self, block: nn.Module, gate: nn.Module, experts: nn.Module) -> bool:
        return isinstance(experts, nn.ModuleDict) and hasattr(gate, "second_expert_policy")

    def num_experts(self, experts: Any) -> int:
        return experts.num_experts

    def top_k(self, block: Any, gate: Any, config: Any) -> int:
        return 2

    def prepare(self, site: Site, logits: bool) -> list[Handle]:
        experts_class: Any = type(site.experts)
        if not _follows_gate(experts_class):
            warnings.warn(
                "this release of transformers runs NLLB-MoE's experts 0 and 1 whatever the gate decides; records and "
                "interventions are about the gate's decision",
                stacklevel=2,
            )
        return []

    def logits_module(self, site: Site) -> nn.Module | None:
        # the gate may add its sampling noise to its own logits in place; these are from before that
        return site.gate.get_submodule("classifier")

    def read(self, site: Site, call: Call, gate_output: Any, logits: Tensor | None) -> tuple[Tensor, Routing]:
        x, _, weight_TE = call[:3]
        assert logits is not None
        index = _choices(site.gate, logits, gate_output[2], x.dtype)
        weight = weight_TE.gather(1, index)
        kept = (weight != 0).reshape(-1)
        everyone = bool(kept.all())
        routing = Routing(
            index.reshape(-1), weight.reshape(-1), x.shape[0], site.num_experts, 2, kept=None if everyone else kept
        )
        return x, routing

    def write(self, site: Site, call: Call, gate_output: Any, before: Routing, after: Routing) -> Any:
        x, first, weight = call[:3]
        live = slice(None) if after.kept is None else after.kept
        token, expert = after.token[live], after.expert[live]
        new_weight = weight.new_zeros(weight.shape).index_put((token, expert), after.weight[live].to(weight.dtype))
        # all but the gate's second choice count as first choices
        is_first = expert != before.index_TK[:, 1][token]
        new_first = first.new_zeros(first.shape).index_put((token, expert), is_first.to(first.dtype))
        return (x, new_first, new_weight, *call[3:])

    def names(self, model: nn.Module, path: str, experts: nn.Module) -> Names:
        return module_names(path, experts)


def _choices(gate: Any, logits: Tensor, noisy_logits: Tensor, dtype: torch.dtype) -> Tensor:
    """``[T, 2]``: the gate's first and second choice, by its own expressions."""
    first = F.softmax(logits, dim=-1, dtype=gate.dtype).to(dtype).argmax(-1, keepdim=True)
    second = noisy_logits.scatter(1, first, -torch.inf).argmax(-1, keepdim=True)
    return torch.cat([first, second], dim=1)


@cache
def _follows_gate(experts_class: Any) -> bool:
    """Whether an experts module of this class runs the expert that the one-hot matrix names."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        experts = experts_class(NllbMoeConfig(d_model=2, num_experts=3, moe_token_dropout=0.0), 2)
        x, last = torch.ones(1, 2), F.one_hot(torch.tensor([2]), 3)
        return torch.equal(experts(x, last, last.float()), experts["expert_2"](x))
