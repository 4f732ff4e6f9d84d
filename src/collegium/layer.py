"""`MoE`: router, experts, shared experts and balance as one torch module, for transformers models and anybody's own.

Legend: T tokens, E experts, K experts per token, d model width, f expert hidden width, fs shared width.

    y = sum_k weight_k * expert_k(x)  [+ shared(x), or sigmoid(x w) * shared(x)]

A training loop needs three lines beside its own::

    >>> import torch
    >>> from collegium.balance import BalanceConfig
    >>> from collegium.layer import MoE, after_step, balance_losses
    >>> _ = torch.manual_seed(0)
    >>> balance = BalanceConfig(load_balancing=0.01)
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), MoE(16, 32, 4, 2, balance=balance), torch.nn.Linear(16, 1))
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> x, y = torch.randn(3, 5, 8), torch.randn(3, 5, 1)
    >>> loss = torch.nn.functional.mse_loss(model(x), y)
    >>> (loss + sum(balance_losses(model).values())).backward()
    >>> optimizer.step()
    >>> model[1].balance.stats.sync().sum().item()  # 15 tokens to 2 experts each
    30
    >>> after_step(model, step=0)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.activations import ACT2FN

from collegium.balance import Balance, BalanceConfig, sync_all
from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.experts.modules import Experts
from collegium.routing.record import Routing, RoutingContext
from collegium.routing.router import Router, build_router

__all__ = ["MoE", "SharedExperts", "after_step", "balance_losses", "moe_layers", "use_context"]


class SharedExperts(nn.Module):
    """A gated FFN that every token passes through: ``down(act(gate(x)) * up(x))``, without biases.

    S shared experts of width f are one such FFN of width ``fs = S * f``, since their outputs are added.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str = "silu") -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d] -> [..., d]``."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@method("shared_experts", kind="layer", paper="DeepSeekMoE (2024)", arxiv="2401.06066")
class MoE(nn.Module):
    """A mixture-of-experts feed-forward block.

    Every training forward (outside recomputation for gradient checkpointing) adds its assignment counts to
    ``balance.stats`` and leaves its routing in `last`.

    Args:
        hidden_size: d.
        intermediate_size: f of each routed expert.
        num_experts: E, routed experts only.
        num_experts_per_tok: K.
        shared: fs, the width of the shared experts; 0 for none.
        shared_gate: multiply the shared output by a learnt sigmoid gate, as Qwen2-MoE does.
        router: the gate, or settings for `build_router` (``{"score": "sigmoid", "norm_topk_prob": True}``).
        balance: how the experts are kept busy; None counts nothing and has no losses.
        group: the processes whose tokens count together, see `LoadStats`.
        hidden_act: activation of routed and shared experts, by transformers' name.
        layer_index: which decoder layer this is, for random keys and messages.

    Attributes:
        gate, experts, shared_experts, shared_expert_gate: the parts; the last two may be None.
        balance: the `Balance` or None; set it with `set_balance`.
        last: the `Routing` of the latest training forward, or None.
        context: the `RoutingContext` used where `forward` is given none, see `use_context`.

    Raises:
        ConfigError: K > E, or parts that do not fit one another.
    """

    gate: Router
    experts: Any
    last: Routing | None
    context: RoutingContext | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        shared: int = 0,
        shared_gate: bool = False,
        router: Router | Mapping[str, Any] | None = None,
        balance: BalanceConfig | None = None,
        group: dist.ProcessGroup | None = None,
        hidden_act: str = "silu",
        layer_index: int = 0,
    ) -> None:
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ConfigError(
                f"num_experts_per_tok is {num_experts_per_tok}, it must be from 1 to num_experts = {num_experts}"
            )
        if shared_gate and not shared:
            raise ConfigError("shared_gate needs shared experts: set shared to their width")
        if not isinstance(router, Router):
            router = build_router(hidden_size, num_experts, num_experts_per_tok, **(router or {}))
        shared_experts = SharedExperts(hidden_size, shared, hidden_act) if shared else None
        self._assemble(
            router,
            Experts(hidden_size, intermediate_size, num_experts, hidden_act=hidden_act),
            shared_experts,
            nn.Linear(hidden_size, 1, bias=False) if shared_gate else None,
            layer_index,
        )
        if (router.hidden_size, router.num_experts, router.top_k) != (hidden_size, num_experts, num_experts_per_tok):
            raise ConfigError(
                f"the router is for width {router.hidden_size} and {router.top_k} of {router.num_experts} experts, "
                f"the layer for width {hidden_size} and {num_experts_per_tok} of {num_experts}"
            )
        self.set_balance(balance, group)

    @classmethod
    def from_parts(
        cls,
        gate: Router,
        experts: nn.Module,
        shared_experts: nn.Module | None = None,
        shared_expert_gate: nn.Module | None = None,
        layer_index: int = 0,
    ) -> Self:
        """A block from modules that exist already; `experts` is called as ``experts(x [T, d], routing)``."""
        block = cls.__new__(cls)
        block._assemble(gate, experts, shared_experts, shared_expert_gate, layer_index)
        return block

    def _assemble(
        self,
        gate: Router,
        experts: nn.Module,
        shared_experts: nn.Module | None,
        shared_expert_gate: nn.Module | None,
        layer_index: int,
    ) -> None:
        nn.Module.__init__(self)
        self.gate = gate
        self.experts = experts
        self.shared_experts = shared_experts
        self.shared_expert_gate = shared_expert_gate
        self.layer_index = layer_index
        self.balance: Balance | None = None
        self.context = None
        self.last = None
        self._sequence: Tensor | None = None

    def set_balance(self, config: BalanceConfig | None, group: dist.ProcessGroup | None = None) -> None:
        """Replace `balance`; counts start at zero.

        Raises:
            ConfigError: `config` has a bias controller, but the router has no selection bias.
        """
        if config is not None and config.bias_update_rate and self.gate.e_score_correction_bias is None:
            raise ConfigError(
                "bias_update_rate needs a router with a selection bias (selection_bias=True), "
                f"which the router of layer {self.layer_index} lacks"
            )
        self.balance = None if config is None else Balance(config, self.gate.num_experts, group)
        self.gate.keep_logits = self.balance is not None and self.balance.needs_logits

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw all weights from a normal distribution with this standard deviation; biases become zero."""
        self.gate.weight.normal_(std=std)
        for bias in (self.gate.bias, self.gate.e_score_correction_bias):
            if bias is not None:
                bias.zero_()
        self.experts.reset_parameters(std)
        for part in (self.shared_experts, self.shared_expert_gate):
            for weight in part.parameters() if part is not None else ():
                weight.normal_(std=std)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        """``[..., d] -> [..., d]``; all leading dimensions are tokens, the first one sequences.

        Args:
            x: the block's input.
            context: per-token fields are ``[T]``, T being the product of the leading dimensions; None means the
                one set by `use_context`. Its `layer` and `training` are filled in here.

        Raises:
            ConfigError: the context is for another number of tokens.
        """
        x_Td = x.reshape(-1, x.shape[-1])
        context = replace(context or self.context or RoutingContext(), layer=self.layer_index, training=self.training)
        for name in ("valid", "document"):
            field = getattr(context, name)
            if field is not None and field.shape != x_Td.shape[:1]:
                raise ConfigError(f"context.{name} is {tuple(field.shape)}, but there are {x_Td.shape[0]} tokens")
        routing = self.gate(x_Td, context)
        y_Td = self.experts(x_Td, routing)
        if self.shared_experts is not None:
            s_Td = self.shared_experts(x_Td)
            if self.shared_expert_gate is not None:
                s_Td = torch.sigmoid(self.shared_expert_gate(x_Td)) * s_Td
            y_Td = y_Td + s_Td
        if self.training and not _recomputing():
            self._record(routing, context, x)
        return y_Td.reshape(x.shape)

    def _record(self, routing: Routing, context: RoutingContext, x: Tensor) -> None:
        self.last, self._sequence = routing, context.document
        if self._sequence is None and x.dim() > 2:
            rows = torch.arange(x.shape[0], device=x.device)
            self._sequence = rows.repeat_interleave(routing.num_tokens // max(x.shape[0], 1))
        if self.balance is not None:
            self.balance.record(routing)

    def losses(self) -> dict[str, Tensor]:
        """The weighted balance losses of the latest training forward, by name; empty without `balance`.

        Raises:
            ConfigError: no training forward has run, or it ran where no gradient can reach the router.
        """
        if self.balance is None:
            return {}
        if self.last is None:
            raise ConfigError(f"layer {self.layer_index} has no balance loss before its first forward in training mode")
        probs = self.last.probs
        if torch.is_grad_enabled() and self.gate.weight.requires_grad and probs is not None and not probs.requires_grad:
            raise ConfigError(
                f"the balance loss of layer {self.layer_index} would train nothing: its forward ran without gradient. "
                "If gradient checkpointing is on, choose use_reentrant=False"
            )
        return self.balance.losses(self.last, self._sequence)

    def __getstate__(self) -> dict[str, Any]:
        # the latest routing belongs to an autograd graph, which neither deepcopy nor pickle can follow
        return self.__dict__ | {"last": None, "_sequence": None, "context": None}

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"layer_index={self.layer_index}"


def _recomputing() -> bool:
    """Whether this forward runs inside a backward pass, that is, recomputes activations."""
    return torch._C._current_graph_task_id() != -1


def moe_layers(model: nn.Module) -> list[MoE]:
    """The `MoE` blocks of `model`, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, MoE)]


@contextlib.contextmanager
def use_context(model: nn.Module, context: RoutingContext) -> Iterator[None]:
    """Give `context` to every `MoE` block that is called without one, as blocks inside transformers models are.

    Keep the backward pass inside, because recomputation needs the same context::

        with use_context(model, RoutingContext(document=document.flatten(), step=step)):
            model(input_ids).loss.backward()
    """
    layers = moe_layers(model)
    before = [layer.context for layer in layers]
    try:
        for layer in layers:
            layer.context = context
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.context = old


def balance_losses(model: nn.Module) -> dict[str, Tensor]:
    """Weighted balance losses by name, each the mean over the layers that have it; add them to the task loss.

    A collective call where a layer's scope is "global": one all-reduce for all layers.

    Raises:
        ConfigError: see `MoE.losses`.
    """
    layers = [layer for layer in moe_layers(model) if layer.balance is not None]
    sync_all([layer.balance.stats for layer in layers if layer.balance and layer.balance.config.scope == "global"])
    by_name: dict[str, list[Tensor]] = {}
    for layer in layers:
        for name, loss in layer.losses().items():
            by_name.setdefault(name, []).append(loss)
    return {name: torch.stack(losses).mean() for name, losses in by_name.items()}


def after_step(model: nn.Module, step: int) -> None:
    """Once per optimizer step, on all processes: controllers act on the step's pooled counts, which then start anew.

    Args:
        model: holds the `MoE` blocks.
        step: optimizer step, from 0.
    """
    layers = [layer for layer in moe_layers(model) if layer.balance is not None]
    sync_all([layer.balance.stats for layer in layers if layer.balance])
    for layer in layers:
        assert layer.balance is not None
        if layer.balance.controller is not None:
            assert layer.gate.e_score_correction_bias is not None
            layer.balance.controller.update(layer.gate.e_score_correction_bias, layer.balance.stats.sync(), step)
        layer.balance.stats.reset()
