"""`Site`: one MoE block of a model, and what is needed to work on it.

Legend: T tokens, E experts, K slots per token, d model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collegium.sites.adapters import Adapter

__all__ = ["Site"]


@dataclass(frozen=True, eq=False)
class Site:
    """One MoE block. Blocks of one model may differ in everything, E and K included.

    Attributes:
        layer: number of the decoder layer, as in `path`. It repeats where a model has several stacks (encoder and
            decoder) or several blocks in a layer (text and vision experts); `path` never does.
        path: module path of the block in the model that was searched.
        block: the module around gate and experts (in Gemma-4 the whole decoder layer).
        gate: the module that decides; the first of `gates`.
        experts: the module that computes.
        shared: modules that see every token beside the experts.
        num_experts: E, the experts a token chooses from.
        top_k: K, the slots of a token.
        family: ``model_type`` of the config the block was built from.
        score: what makes probabilities of logits ("softmax", "sigmoid", "sqrtsoftplus"), or "unknown".
        scales_input: the combine weight multiplies the expert's input (Llama-4), not its output.
        adapter, names: how taps reach the block, and where `checkpoint_names` come from.
    """

    layer: int
    path: str
    block: nn.Module
    gate: nn.Module
    experts: nn.Module
    shared: tuple[nn.Module, ...]
    num_experts: int
    top_k: int
    family: str
    score: str
    adapter: Adapter = field(repr=False)
    names: Callable[[], list[dict[str, str]]] = field(repr=False)

    @property
    def gates(self) -> tuple[nn.Module, ...]:
        """Every module that decides in a forward, in order; several where a layer routes several times in sequence."""
        return self.adapter.gates(self.block, self.gate)

    @property
    def iterations(self) -> int:
        """How many routings a forward has here."""
        return len(self.gates)

    @property
    def scales_input(self) -> bool:
        return self.adapter.scales_input

    def checkpoint_names(self, expert: int) -> dict[str, str]:
        """Tensor names of one expert's matrices as ``save_pretrained`` writes them.

        Keys are ``gate_proj``, ``up_proj``, ``down_proj`` where the matrices are stored apart, and ``gate_up_proj``
        where gate and up are one tensor (names differ in families with their own modules, such as ``wi``, ``wo``).
        A family that stores all experts of a layer in one tensor gives the same name for each of them; its first
        axis is then the expert.

        Raises:
            IndexError: there is no such expert.
        """
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"{self.path} has experts 0 to {self.num_experts - 1}, not {expert}")
        return self.names()[expert]
