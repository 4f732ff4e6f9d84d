"""`MoEConfig`: the MoE layers of a model as data, in transformers' names."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from collegium.balance import BalanceConfig

__all__ = ["MoEConfig"]


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
    first_k_dense_replace: int = Field(default=0, ge=0)
    balance: BalanceConfig = BalanceConfig()

    @model_validator(mode="after")
    def _fits(self) -> MoEConfig:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok = {self.num_experts_per_tok} of num_experts = {self.num_experts}")
        if self.n_shared_experts and self.shared_expert_intermediate_size:
            raise ValueError("set n_shared_experts or shared_expert_intermediate_size, not both")
        if self.shared_expert_gate and not self.shared_width:
            raise ValueError("shared_expert_gate needs shared experts")
        if self.selection_bias is False and self.balance.bias_update_rate:
            raise ValueError("balance.bias_update_rate needs the selection bias that selection_bias = false forbids")
        return self

    @property
    def shared_width(self) -> int:
        """Total width of the shared experts; 0 for none."""
        return self.shared_expert_intermediate_size or self.n_shared_experts * self.moe_intermediate_size

    @property
    def has_selection_bias(self) -> bool:
        """`selection_bias`, or whether `balance` needs one."""
        return self.balance.bias_update_rate > 0 if self.selection_bias is None else self.selection_bias

    @property
    def router_settings(self) -> dict[str, Any]:
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
