"""Every method of the project: its name, its kind, its paper, where it lives, and whether its claim holds.

A method announces itself with one line above its class or function,

    @method("moge", kind="selection", paper="Pangu Pro MoGE (2025)", arxiv="2505.21411")

and is found from there by the command line, the contract tests of its kind, and the docs. Nothing else is edited
to add it. Claim results come from ``claims.json``, which ``make claims`` writes after running the claim tests.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any, TypeVar

from collegium.errors import ConfigError

__all__ = ["KINDS", "Method", "claims", "get", "method", "methods"]

KINDS = {
    "score": "logits -> probabilities",
    "transform": "changes what the selection looks at",
    "selection": "selection scores -> the experts of each token",
    "weigh": "the combine weight of each chosen expert",
    "capacity": "which assignments an expert has room for",
    "expert": "what one expert computes",
    "zero_expert": "what an expert without a computation gives",
    "compute": "a back end that runs experts",
    "balance": "a loss that keeps the experts busy",
    "routing_loss": "another loss on the routing of a layer",
    "weight_loss": "a loss on the weights of a layer",
    "system": "a published way to route, as settings of the parts",
    "controller": "an after-step update that keeps the experts busy",
    "layer": "how a whole MoE block is put together",
    "objective": "what a training step minimises",
    "schedule": "a learning-rate schedule",
    "metric": "a number or figure read from a trace or a model",
    "importance": "statistics -> what each expert is worth",
    "planner": "scores -> a plan",
    "grouping": "statistics -> which experts become one",
    "merge": "the experts of a group -> one expert",
    "neurons": "statistics -> what each neuron of an expert is worth",
    "factor": "the matrices of an expert -> products of smaller ones",
    "router_edit": "router rows -> the rows of fewer experts",
    "compaction": "the auxiliary experts of a token -> something smaller",
    "recovery": "training that gives a smaller model back what it lost",
    "retrieval": "a prompt -> the experts that its task needs",
    "cache": "which experts stay in a memory that cannot hold all",
    "predictor": "what is known so far -> the experts a coming layer will need",
    "precision": "how exact the copy of an expert is that a token gets",
    "scheduler": "in which order, and where, the experts of a layer are loaded and computed",
}
"""Every kind of method and what its members do. A later room adds its kind here."""

T = TypeVar("T")


@dataclass(frozen=True)
class Method:
    """One catalogued method. `obj` is the class or function; `claim` is its entry in ``claims.json`` or None."""

    name: str
    kind: str
    paper: str
    arxiv: str | None
    module: str
    obj: Any
    claim: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """The method as plain data, for ``--json`` and the docs table."""
        fields = asdict(self)
        fields["obj"] = self.obj.__qualname__
        fields["status"] = self.claim["status"] if self.claim else None
        return fields


_registry: dict[tuple[str, str], Method] = {}


def method(name: str, *, kind: str, paper: str, arxiv: str | None = None) -> Callable[[T], T]:
    """Catalogue a class or function under `kind` and `name`.

    Raises:
        ConfigError: at import, when the kind is unknown or the name is taken by another object.
    """
    if kind not in KINDS:
        raise ConfigError(f"method {name!r}: unknown kind {kind!r}; the kinds are {', '.join(KINDS)}")

    def catalogue(obj: T) -> T:
        module, qualname = obj.__module__, getattr(obj, "__qualname__", "")
        taken = _registry.get((kind, name))
        if taken and (taken.module, taken.obj.__qualname__) != (module, qualname):
            raise ConfigError(f"two methods of kind {kind!r} are named {name!r}: {taken.module} and {module}")
        _registry[kind, name] = Method(name, kind, paper, arxiv, module, obj, claims().get(f"{kind}/{name}"))
        return obj

    return catalogue


@cache
def claims() -> dict[str, dict[str, Any]]:
    """``"kind/name" -> {"status": "holds" | "not reproduced", "numbers": ...}`` from the last ``make claims``."""
    file = resources.files("collegium") / "claims.json"
    return json.loads(file.read_text(encoding="utf-8"))


@cache
def _import_rooms() -> None:
    import torch  # the rooms import it, too

    package = importlib.import_module("collegium")
    # a module that is imported where a meta device is set computes its constants nowhere
    with torch.device("cpu"):
        for module in pkgutil.walk_packages(package.__path__, "collegium."):
            if not module.name.startswith("collegium.cli"):
                importlib.import_module(module.name)


def methods(kind: str | None = None) -> list[Method]:
    """All methods, or those of one kind, sorted by kind and name. Imports every room.

    Raises:
        ConfigError: `kind` is not a kind; the message lists them.
    """
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r}; the kinds are {', '.join(KINDS)}")
    _import_rooms()
    return sorted((m for m in _registry.values() if kind in (None, m.kind)), key=lambda m: (m.kind, m.name))


def get(kind: str, name: str) -> Any:
    """The class or function catalogued as `name` under `kind`.

    Raises:
        ConfigError: there is none; the message lists the names of that kind.
    """
    if (kind, name) not in _registry:
        known = [m.name for m in methods(kind)]
        if (kind, name) not in _registry:
            raise ConfigError(f"no {kind} is named {name!r}; there are {', '.join(known) or 'none'}")
    return _registry[kind, name].obj
