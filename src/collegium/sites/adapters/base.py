"""`Adapter`: how one kind of MoE block says who speaks, and how it is told otherwise.

Legend: T tokens, E experts, K slots per token, d model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from collegium.routing import Routing
from collegium.sites.names import Names

if TYPE_CHECKING:
    from collegium.sites.site import Site

__all__ = ["Adapter", "Call", "Handle", "flat"]

Call = tuple[Any, ...]
"""Positional arguments of a module's forward."""


class Handle(Protocol):
    """What undoes something: torch's hook handles, and ours."""

    def remove(self) -> None: ...


def flat(x: Tensor) -> Tensor:
    """``[..., n] -> [T, n]``."""
    return x.reshape(-1, x.shape[-1])


class Adapter(ABC):
    """Reads and writes the decision of one kind of block, at the one call where it is complete.

    Attributes:
        at: "experts": the arguments of the experts call hold the decision. "gate": the gate's output does.
        needs_gate: reading needs the gate's output and logits even if no tap asks for logits.
        scales_input: the combine weight multiplies the expert's input, not its output.
    """

    at: ClassVar[Literal["experts", "gate"]] = "experts"
    needs_gate: ClassVar[bool] = False
    scales_input: ClassVar[bool] = False

    @abstractmethod
    def matches(self, block: nn.Module, gate: nn.Module, experts: nn.Module) -> bool:
        """Whether this adapter's calls are what `block` does."""

    @abstractmethod
    def num_experts(self, experts: Any) -> int:
        """E."""

    @abstractmethod
    def top_k(self, block: Any, gate: Any, config: Any) -> int:
        """K."""

    def gates(self, block: Any, gate: nn.Module) -> tuple[nn.Module, ...]:
        """All gates that decide in a forward of `block`, in order: several where its experts are run several times."""
        return (gate,)

    def score(self, gate: Any) -> str | None:
        """What makes probabilities of the logits, where the gate itself says so."""
        return None

    def prepare(self, site: Site, logits: bool) -> list[Handle]:
        """What must be set while the site is tapped, besides hooks. Each handle's ``remove()`` undoes it."""
        return []

    def logits_module(self, site: Site) -> nn.Module | None:
        """The module whose output is the logits, or None where they are in the gate's output."""
        return None

    def logits(self, gate_output: Any) -> Tensor:
        """The logits ``[..., E]`` in the gate's output."""
        return gate_output[0]

    @abstractmethod
    def read(self, site: Site, call: Call, gate_output: Any, logits: Tensor | None) -> tuple[Tensor, Routing]:
        """``(x [T, d], routing)``.

        Args:
            call: arguments of the call that `at` names.
            gate_output: the gate's output where `at` or `needs_gate` ask for it, else None.
            logits: ``[T, E]`` where `needs_gate`, else None.
        """

    @abstractmethod
    def write(self, site: Site, call: Call, gate_output: Any, before: Routing, after: Routing) -> Any:
        """`after` in place of `before`: the new arguments of the experts call, or the new output of the gate."""

    @abstractmethod
    def names(self, model: nn.Module, path: str, experts: nn.Module) -> Names:
        """Tensor names on disk of the experts module at `path`."""
