"""`tap`: see, or change, every routing decision of a model while it runs.

    with tap(model, recorder):
        model.generate(...)

Hooks go on the modules found by path, so any experts implementation, ``generate`` and training work the same. A tap
that returns None, or the routing it was given, leaves the model's outputs bit-identical.

Legend: T tokens, E experts, d model width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn import functional as F

from collegium.errors import ConfigError
from collegium.routing import Routing
from collegium.sites.adapters.base import Handle, flat
from collegium.sites.find import sites
from collegium.sites.site import Site

__all__ = ["Order", "Tap", "tap"]


class Order(IntEnum):
    """When a tap runs. Taps that intervene have a fixed order, whoever was entered first; observers see the result."""

    MASK = 10
    OFFSET = 20
    CORE_SET = 30
    TOP_K = 40
    SWITCH = 50
    REROUTE = 60
    OBSERVE = 100


class Tap(Protocol):
    """What `tap` calls for every MoE block of every forward.

    Three attributes are read if a tap has them:

    * ``order`` (default `Order.OBSERVE`): when it runs. Equal orders run as they were entered.
    * ``view`` (default "experts"): which view of the tokens is ``x``. "experts" is what the experts compute on, "gate"
      what the gate decides on. They are one in most families, not in Gemma-4, Nemotron-H or Muse-Spark.
    * ``check(sites)``: called once on entering, to refuse settings that do not fit the model.

    Under activation checkpointing a tap is called again when the forward is recomputed.
    """

    def __call__(self, site: Site, x: Tensor, routing: Routing, /) -> Routing | None:
        """
        Args:
            x: ``[T, width]``, attached to the graph; detach what you keep.
            routing: what the experts are about to be told, after all earlier taps.

        Returns:
            What they are to be told instead (same T and E), or None for no change.
        """


@contextmanager
def tap(model: nn.Module, *taps: Tap, logits: bool = False, iterated: bool = False) -> Iterator[list[Site]]:
    """Call `taps` at every MoE block while the context is open. Contexts nest.

    Args:
        model: any model that `sites` finds blocks in.
        logits: fill ``Routing.logits`` with the gate's logits ``[T, E]``, as the gate computed them (without ZAYA's
            skip class, which is no expert).
        iterated: call `taps` once for each iteration of a block that routes several times in a forward, in order; such
            blocks are refused otherwise.

    Yields:
        The sites that are tapped.

    Raises:
        NotMoEError, UnsupportedFamilyError: see `sites`.
        ConfigError: from the model's forward, when a tap returns something that is not a routing of the same tokens and
            experts. An exception inside a tap carries a note that names the tap and the site.
    """
    found = sites(model, iterated=iterated)
    for one in taps:
        if hasattr(one, "check"):
            one.check(found)
    entered: list[tuple[_Point, list[_Entry]]] = []
    try:
        for site in found:
            point = _points.setdefault(site.experts, _Point(site))
            entries = [_Entry(next(_arrivals), one, site, logits) for one in taps]
            entered.append((point, entries))
            point.change([*point.entries, *entries])
        yield found
    finally:
        for point, entries in reversed(entered):
            point.change([entry for entry in point.entries if entry not in entries])
            if not point.entries:
                _points.pop(point.site.experts, None)


@dataclass(frozen=True, eq=False)
class _Entry:
    """One tap at one site."""

    arrival: int
    tap: Tap
    site: Site
    logits: bool

    @property
    def order(self) -> int:
        return getattr(self.tap, "order", Order.OBSERVE)

    @property
    def view(self) -> str:
        return getattr(self.tap, "view", "experts")

    @property
    def name(self) -> str:
        return getattr(self.tap, "__qualname__", type(self.tap).__qualname__)


class _Point:
    """All taps of one MoE block, and the hooks that serve them."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.entries: list[_Entry] = []
        self.handles: list[Handle] = []
        self.gate_input: Tensor | None = None
        self.gate_output: Any = None
        self.logits: Tensor | None = None

    def change(self, entries: list[_Entry]) -> None:
        """Serve `entries` from now on."""
        for handle in self.handles:
            handle.remove()
        self.gate_input = self.gate_output = self.logits = None
        self.handles = []
        self.entries = sorted(entries, key=lambda entry: (entry.order, entry.arrival))
        if self.entries:
            self._hook(any(entry.logits for entry in self.entries))

    def _hook(self, logits: bool) -> None:
        site, adapter = self.site, self.site.adapter
        self.handles += adapter.prepare(site, logits)
        if any(entry.view == "gate" for entry in self.entries):
            self.handles += [gate.register_forward_pre_hook(self._see_gate_input) for gate in site.gates]
        if (logits or adapter.needs_gate) and (module := adapter.logits_module(site)) is not None:
            self.handles.append(module.register_forward_hook(self._see_logits))
        if adapter.at == "gate":
            self.handles.append(site.gate.register_forward_hook(self._at_gate, with_kwargs=True))
            return
        if logits or adapter.needs_gate:
            self.handles += [gate.register_forward_hook(self._see_gate_output) for gate in site.gates]
        self.handles.append(site.experts.register_forward_pre_hook(self._at_experts, with_kwargs=True))

    def _see_gate_input(self, gate: nn.Module, args: tuple[Any, ...]) -> None:
        self.gate_input = flat(args[0])

    def _see_logits(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # a copy, since NLLB-MoE's gate may go on to add noise to it in place
        self.logits = flat(output.clone())

    def _see_gate_output(self, gate: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.gate_output = output
        if self.site.adapter.logits_module(self.site) is None:
            self.logits = flat(self.site.adapter.logits(output))[:, : self.site.num_experts]

    def _at_gate(self, gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self._see_gate_output(gate, args, output)
        return self._run((*args, *kwargs.values()))

    def _at_experts(self, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = self._run((*args, *kwargs.values()))
        return None if changed is None else (changed, {})

    def _run(self, call: tuple[Any, ...]) -> Any:
        """What is to replace `call` (or the gate's output), or None where no tap changed anything."""
        site, adapter = self.site, self.site.adapter
        wants_logits = any(entry.logits for entry in self.entries)
        gate_input, gate_output, logits = self.gate_input, self.gate_output, self.logits
        # not kept until the next forward: they hold the graph
        self.gate_input = self.gate_output = self.logits = None
        x, before = adapter.read(site, call, gate_output, logits)
        if gate_input is None and gate_output is None and isinstance(site.gate, nn.Linear):
            # DeepSeek-V2 before transformers 5.13 multiplies by its gate's weight in float32 without calling the gate
            gate_input = x
            logits = F.linear(x.float(), site.gate.weight.float()) if wants_logits else None
        if logits is not None and before.logits is None and wants_logits:
            before = replace(before, logits=logits)
        after = before
        for entry in self.entries:
            view = gate_input if entry.view == "gate" else x
            assert view is not None  # the gate runs before its experts
            after = _call(entry, view, after)
        return None if after is before else adapter.write(site, call, gate_output, before, after)


_points: WeakKeyDictionary[nn.Module, _Point] = WeakKeyDictionary()
_arrivals = itertools.count()


def _call(entry: _Entry, x: Tensor, routing: Routing) -> Routing:
    where = f"the tap {entry.name} at {entry.site.path} (layer {entry.site.layer})"
    try:
        result = entry.tap(entry.site, x, routing)
    except Exception as error:
        error.add_note(f"raised in {where}")
        raise
    if result is None:
        return routing
    if not isinstance(result, Routing):
        raise ConfigError(f"{where} returned a {type(result).__name__}; it must return a Routing, or None")
    if (result.num_tokens, result.num_experts) != (routing.num_tokens, routing.num_experts):
        raise ConfigError(
            f"{where} returned a routing of {result.num_tokens} tokens over {result.num_experts} experts; it was given "
            f"{routing.num_tokens} tokens over {routing.num_experts} experts"
        )
    return result
