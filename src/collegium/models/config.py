"""`MoEConfig`: the MoE layers of a model as data, in transformers' names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from collegium.balance import Balance, BalanceConfig
from collegium.catalog import methods
from collegium.named import nearest
from collegium.routing import Router, build_gates, build_router, router_from
from collegium.systems import expand

__all__ = ["MoEConfig"]

_REPLACED = (
    "scoring_func", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "selection_bias", "router_bias",
)  # fmt: skip
"""Fields that say what `router` says in parts."""


class MoEConfig(BaseModel):
    """What `install` puts in place of a model's feed-forward blocks.

    Attributes:
        num_experts: E, routed experts.
        num_experts_per_tok: K.
        moe_intermediate_size: width of each routed expert.
        n_shared_experts: always-on experts of that same width; their sum is one FFN of their total width.
        shared_expert_intermediate_size: that total width given directly; one of the two at most.
        shared_expert_gate: multiply the shared output by a learnt sigmoid gate (Qwen2-MoE).
        scoring_func: logits -> probabilities, a catalogued score ("softmax", "sigmoid").
        norm_topk_prob: divide the K combine weights by their sum.
        routed_scaling_factor: multiplies every combine weight.
        n_group, topk_group: only experts of the `topk_group` best of `n_group` groups can be chosen (DeepSeek-V3).
        selection_bias: a bias that only the selection sees; None means where `balance` updates one.
        router_bias: a trained bias on the logits (gpt-oss).
        hidden_act: activation; None means that of the base model.
        zero_experts: zero-computation experts beside the `num_experts`, a catalogued name for each.
        router: a published system by its name, ``"ssr"`` or ``{"ssr": {setting: value}}``, which sets other fields
            too; or parts by their names, see `collegium.routing.router_from`, in place of the fields from
            `scoring_func` to `router_bias`.
        iterations: C, how often a layer routes in sequence with the same experts, each time with a router of its own
            and K experts a token.
        inner_residual: an iteration's input is added to its output; None does so where there are several.
        first_k_dense_replace: this many first layers keep their dense FFN.
        balance: how the experts are kept busy.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_experts: int = Field(ge=1)
    num_experts_per_tok: int = Field(ge=1)
    moe_intermediate_size: int = Field(ge=1)
    n_shared_experts: int = Field(default=0, ge=0)
    shared_expert_intermediate_size: int = Field(default=0, ge=0)
    shared_expert_gate: bool = False
    scoring_func: str = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = Field(default=1.0, gt=0)
    n_group: int | None = Field(default=None, ge=1)
    topk_group: int | None = Field(default=None, ge=1)
    selection_bias: bool | None = None
    router_bias: bool = False
    hidden_act: str | None = None
    zero_experts: tuple[str, ...] = ()
    router: dict[str, Any] | None = None
    iterations: int = Field(default=1, ge=1)
    inner_residual: bool | None = None
    first_k_dense_replace: int = Field(default=0, ge=0)
    balance: BalanceConfig = BalanceConfig()

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, data: Any) -> Any:
        return expand(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _fits(self) -> MoEConfig:
        known = [one.name for one in methods("zero_expert")] if self.zero_experts else []
        if unknown := [name for name in self.zero_experts if name not in known]:
            raise ValueError(f"no zero-computation expert is named {unknown[0]!r}; {nearest(unknown[0], known)}")
        every = self.num_experts + len(self.zero_experts)
        if self.num_experts_per_tok > every:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} of num_experts = {every}; it is 1 to {every}"
            )
        if self.router is not None:
            fields = type(self).model_fields
            if given := [name for name in _REPLACED if getattr(self, name) != fields[name].default]:
                raise ValueError(f"router names the parts itself; leave out {', '.join(given)}")
        self._build_once(every)
        if self.n_shared_experts and self.shared_expert_intermediate_size:
            raise ValueError("set n_shared_experts or shared_expert_intermediate_size, not both")
        if self.shared_expert_gate and not self.shared_width:
            raise ValueError("shared_expert_gate needs shared experts")
        if self.selection_bias is False and self.balance.bias_update_rate:
            raise ValueError("balance.bias_update_rate needs the selection bias that selection_bias = false forbids")
        return self

    def _build_once(self, every: int) -> None:
        """Refuse parts that do not fit one another or the layer, before any data are read."""
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # who builds the layer is warned
            self.build_gates(8)
        Balance(self.balance, every)

    @property
    def shared_width(self) -> int:
        """Total width of the shared experts; 0 for none."""
        return self.shared_expert_intermediate_size or self.n_shared_experts * self.moe_intermediate_size

    @property
    def has_selection_bias(self) -> bool:
        """`selection_bias`, or whether `balance` needs one."""
        return self.balance.bias_update_rate > 0 if self.selection_bias is None else self.selection_bias

    @property
    def slots(self) -> int:
        """K: experts of a token, zero-computation ones included; ``router.select`` may say it."""
        return self.num_experts_per_tok if self.router is None else self.build_router(8).top_k

    def build_router(self, hidden_size: int) -> Router:
        """The router of a layer of this width.

        Raises:
            ConfigError: parts that do not fit one another or the layer.
        """
        every = self.num_experts + len(self.zero_experts)
        if self.router is None:
            settings = self._settings()
            return build_router(hidden_size, every, self.num_experts_per_tok, num_true=self.num_experts, **settings)
        return router_from(self.router, hidden_size, every, self.num_experts_per_tok, num_true=self.num_experts)

    def build_gates(self, hidden_size: int) -> list[Router]:
        """The routers of all iterations of a layer of this width.

        Raises:
            ConfigError: parts that do not fit one another or the layer.
        """
        gates = [self.build_router(hidden_size) for _ in range(self.iterations)]
        every = self.num_experts + len(self.zero_experts)
        return build_gates(gates, self.iterations, hidden_size, every, gates[0].top_k)

    def _settings(self) -> dict[str, Any]:
        """The settings of `build_router`."""
        return {
            "score": self.scoring_func,
            "norm_topk_prob": self.norm_topk_prob,
            "routed_scaling_factor": self.routed_scaling_factor,
            "n_group": self.n_group,
            "topk_group": self.topk_group,
            "selection_bias": self.has_selection_bias,
            "bias": self.router_bias,
        }
