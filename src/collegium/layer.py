"""`MoE`: router, experts, shared experts and balance as one torch module, for transformers models and anybody's own.

Legend: T tokens, E experts, K experts per token, C iterations, d model width, f expert hidden width, fs shared.

    y = sum_k weight_k * expert_k(x)  [+ shared(x), or sigmoid(x w) * shared(x)]

Zero-computation experts are experts, too, for the router; their ids follow those of the E that compute.

A layer can do this C times in sequence, with the same experts and a router for each time (Chain-of-Experts, 2025).

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collegium.balance import Balance, BalanceConfig, sync_all
from collegium.catalog import method
from collegium.errors import ConfigError, NonFiniteError
from collegium.experts.modules import Experts
from collegium.experts.shared import SharedExperts
from collegium.experts.zero import ZeroComputeExperts
from collegium.routing.record import Routing, RoutingContext
from collegium.routing.router import Router, build_gates

__all__ = ["MoE", "SharedExperts", "after_step", "balance_losses", "link_layers", "moe_layers", "use_context"]


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
        router: the gate, for E and Z experts (of each iteration, a list), or settings for `build_router`.
        zero_experts: zero-computation experts, a catalogued name for each; their ids follow those of the E others, and
            K may count them in.
        balance: how the experts are kept busy; None counts nothing and has no losses.
        group: the processes whose tokens count together, see `LoadStats`.
        hidden_act: activation of routed and shared experts, by transformers' name.
        layer_index: which decoder layer this is, for random keys and messages.
        iterations: C; each takes K experts of a token, and the shared ones.
        inner_residual: add an iteration's input to its output; None does so where there are several. A residual around
            the layer is its caller's: transformers' decoder layers have one, the Chain-of-Experts paper's none.

    Attributes:
        gate, experts, shared_experts, shared_expert_gate, zero_experts: the parts; the last three may be None.
        later_gates: the routers of the second iteration and those after it.
        balance: the `Balance` or None; set it with `set_balance`.
        routings: the `Routing` of each iteration of the latest training forward; empty before one.
        context: the `RoutingContext` used where `forward` is given none, see `use_context`.

    Raises:
        ConfigError: K > E, or parts that do not fit one another.
    """

    gate: Router
    experts: Any
    passes_on = False  # the next block reads `passed`
    inner_residual = False
    routings: tuple[Routing, ...]
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
        zero_experts: Sequence[str] = (),
        router: Router | Sequence[Router] | Mapping[str, Any] | None = None,
        balance: BalanceConfig | None = None,
        group: dist.ProcessGroup | None = None,
        hidden_act: str = "silu",
        layer_index: int = 0,
        iterations: int = 1,
        inner_residual: bool | None = None,
    ) -> None:
        every = num_experts + len(zero_experts)
        if not 1 <= num_experts_per_tok <= every:
            raise ConfigError(f"num_experts_per_tok is {num_experts_per_tok}, it must be from 1 to {every} experts")
        if shared_gate and not shared:
            raise ConfigError("shared_gate needs shared experts: set shared to their width")
        gates = build_gates(router, iterations, hidden_size, every, num_experts_per_tok, num_true=num_experts)
        self._assemble(
            gates,
            Experts(hidden_size, intermediate_size, num_experts, hidden_act=hidden_act),
            SharedExperts(hidden_size, shared, hidden_act) if shared else None,
            nn.Linear(hidden_size, 1, bias=False) if shared_gate else None,
            layer_index,
            ZeroComputeExperts(zero_experts, hidden_size) if zero_experts else None,
        )
        self.inner_residual = iterations > 1 if inner_residual is None else inner_residual
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
        block._assemble([gate], experts, shared_experts, shared_expert_gate, layer_index)
        return block

    def _assemble(
        self,
        gates: Sequence[Router],
        experts: nn.Module,
        shared_experts: nn.Module | None,
        shared_expert_gate: nn.Module | None,
        layer_index: int,
        zero_experts: ZeroComputeExperts | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.zero_experts = zero_experts
        self.before: tuple[MoE, ...] = ()  # in a tuple, which hides it from torch
        self.passed: Routing | None = None
        self.memory: dict[str, Tensor] | None = None  # of the cache that a decoder runs with
        self.position: Tensor | None = None  # of the tokens, where a decoder tells it
        self.mixing: Callable[[Tensor], Tensor] | None = None
        self.gate, self.later_gates = gates[0], nn.ModuleList(gates[1:])
        self.experts = experts
        self.shared_experts = shared_experts
        self.shared_expert_gate = shared_expert_gate
        self.layer_index = layer_index
        self.balance: Balance | None = None
        self.context, self.routings = None, ()
        self._sequence: Tensor | None = None
        self._key, self._reached = (0, 0, layer_index), True

    @property
    def gates(self) -> tuple[Router, ...]:
        """The routers of all iterations, in order."""
        return (self.gate, *self.later_gates)

    @property
    def last(self) -> Routing | None:
        """The first, as a rule the only, one of `routings`, or None."""
        return self.routings[0] if self.routings else None

    def set_balance(self, config: BalanceConfig | None, group: dist.ProcessGroup | None = None) -> None:
        """Replace `balance`; counts start at zero.

        Raises:
            ConfigError: `config` has a bias controller, but the router has no selection bias.
        """
        if config and config.bias_update_rate and any(one.e_score_correction_bias is None for one in self.gates):
            raise ConfigError(
                "bias_update_rate needs a router with a selection bias (selection_bias=True), "
                f"which the router of layer {self.layer_index} lacks"
            )
        self.balance = None if config is None else Balance(config, self.gate.num_experts, group)
        self._keep()

    def _keep(self) -> None:
        """Let the routers keep their logits where a loss, the next iteration or the next layer wants them."""
        wanted = self.balance is not None and self.balance.needs_logits
        for gate in self.gates:
            gate.keep_logits = wanted or self.passes_on or (self.looks_back and bool(self.later_gates))

    @property
    def looks_back(self) -> bool:
        """Whether its routers want the routing before theirs: of the block or of the iteration before."""
        return any(part.needs_previous_layer for part in self.gate.parts)

    def link(self, before: MoE | None) -> None:
        """Tell the block which one of the model comes before it, if its router wants to know. `link_layers` does it for
        all blocks of a model."""
        self.before = (before,) if self.looks_back and before is not None else ()
        for one in self.before:
            one.passes_on = True
            one._keep()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw all weights from a normal distribution with this standard deviation; biases become zero."""
        for gate in self.gates:
            gate.weight.normal_(std=std)
            for bias in (gate.bias, gate.e_score_correction_bias):
                if bias is not None:
                    bias.zero_()
            for own in gate.own.values():
                own.reset_parameters()  # type: ignore[operator]
        self.experts.reset_parameters(std)
        if self.zero_experts is not None:
            self.zero_experts.reset_parameters(std)
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
        if self.before:
            context = replace(context, previous=self.before[0].passed)
        if x.dim() == 3 and context.shape is None:
            context = replace(context, shape=(x.shape[0], x.shape[1]))
        for name, told in (("memory", self.memory), ("position", self.position), ("mix", self.mixing)):
            if told is not None and getattr(context, name) is None:
                context = replace(context, **{name: told})  # type: ignore[arg-type]
        for name in ("valid", "document"):
            field = getattr(context, name)
            if field is not None and field.shape != x_Td.shape[:1]:
                raise ConfigError(f"context.{name} is {tuple(field.shape)}, but there are {x_Td.shape[0]} tokens")
        y_Td, routings = x_Td, list[Routing]()
        for iteration, gate in enumerate(self.gates):
            if iteration:
                context = replace(context, iteration=iteration, previous=routings[-1] if self.looks_back else None)
            routing = gate(y_Td, context)
            self._check(routing)
            routings.append(routing)
            given_Td = self._experts(y_Td, routing)
            y_Td = y_Td + given_Td if self.inner_residual else given_Td
        self.passed = routings[-1] if self.passes_on else None
        if self.training and not _recomputing():
            self._record(routings, context, x)
        return y_Td.reshape(x.shape)

    def _experts(self, x_Td: Tensor, routing: Routing) -> Tensor:
        """``[T, d]``: what the experts of all kinds give for one routing."""
        y_Td = self.experts(x_Td, routing.only_true())
        if self.zero_experts is not None:
            y_Td = y_Td + self.zero_experts(x_Td, routing)
        if self.shared_experts is not None:
            s_Td = self.shared_experts(x_Td)
            if self.shared_expert_gate is not None:
                s_Td = torch.sigmoid(self.shared_expert_gate(x_Td)) * s_Td
            y_Td = y_Td + s_Td
        return y_Td

    def _check(self, routing: Routing) -> None:
        # on a device that runs behind, looking would make it wait; there the training loop looks at the loss
        if routing.weight.device.type == "cpu" and not bool(torch.isfinite(routing.weight).all()):
            raise NonFiniteError(f"layer {self.layer_index}: router gives NaN or infinity; see its weights and input")

    def _record(self, routings: Sequence[Routing], context: RoutingContext, x: Tensor) -> None:
        self.routings, self._sequence = tuple(routings), context.document
        self._key, self._reached = (context.seed, context.step, self.layer_index), torch.is_grad_enabled()
        if self._sequence is None and x.dim() > 2:
            rows = torch.arange(x.shape[0], device=x.device)
            self._sequence = rows.repeat_interleave(routings[0].num_tokens // max(x.shape[0], 1))
        if self.balance is not None:
            for routing in routings:
                self.balance.record(routing)

    def losses(self) -> dict[str, Tensor]:
        """The weighted balance losses of the latest training forward, by name, means over its iterations; empty without
        `balance`.

        Raises:
            ConfigError: no training forward has run, or it ran where no gradient can reach the router.
        """
        if self.balance is None:
            return {}
        if not self.routings:
            raise ConfigError(f"layer {self.layer_index} has no balance loss before its first forward in training mode")
        if torch.is_grad_enabled() and self.gate.weight.requires_grad and not self._reached:
            raise ConfigError(
                f"the balance loss of layer {self.layer_index} would train nothing: its forward ran without gradient. "
                "If gradient checkpointing is on, choose use_reentrant=False"
            )
        found = []
        for iteration, (gate, routing) in enumerate(zip(self.gates, self.routings, strict=True)):
            key: tuple[int, ...] = (*self._key, iteration) if iteration else self._key
            found.append(self.balance.losses(routing, self._sequence, gate, self.experts, key))
        return {name: torch.stack([one[name] for one in found]).mean() for name in found[0]}

    def __getstate__(self) -> dict[str, Any]:
        # the latest routing belongs to an autograd graph, which neither deepcopy nor pickle can follow
        return self.__dict__ | {"routings": ()} | dict.fromkeys(("passed", "_sequence", "context", "memory"))

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"layer_index={self.layer_index}"


def _recomputing() -> bool:
    """Whether this forward runs inside a backward pass, that is, recomputes activations."""
    return torch._C._current_graph_task_id() != -1


def moe_layers(model: nn.Module) -> list[MoE]:
    """The `MoE` blocks of `model`, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def link_layers(model: nn.Module) -> None:
    """Tell every `MoE` block of `model` which one comes before it. To be called again after blocks were replaced."""
    layers = moe_layers(model)
    for layer in layers:
        layer.passes_on = False
    for before, layer in zip([None, *layers], layers, strict=False):
        layer.link(before)
        layer._keep()


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
            for gate in layer.gates:
                assert gate.e_score_correction_bias is not None
                layer.balance.controller.update(gate.e_score_correction_bias, layer.balance.stats.sync(), step)
        layer.balance.stats.reset()
