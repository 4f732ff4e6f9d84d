"""Every method of the project: its name, its kind, its paper, where it lives, and whether its claim holds.

A method announces itself with one line above its class or function,

    @method("moge", kind="selection", paper="Pangu Pro MoGE (2025)", arxiv="2505.21411")

and is found from there by the command line, the contract tests of its kind, and the docs. Nothing else is edited
to add it. Claim results come from ``claims.json``, which ``make claims`` writes after running the claim tests. What a
method does, its formula, its cost, and when to use it are read from its docstring, see `SECTIONS`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal, TypeVar, get_args, get_origin

from collegium.errors import ConfigError

__all__ = ["DOCUMENTED", "KINDS", "SECTIONS", "Method", "Setting", "claims", "get", "method", "methods", "sections_of"]

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

SECTIONS = ("Formula", "Cost", "Use it", "Not")
"""What a docstring says in sections of these names, each a line ``Name:`` with indented text below it."""

DOCUMENTED = (
    "system", "score", "transform", "selection", "weigh", "capacity", "zero_expert", "balance", "routing_loss",
    "weight_loss", "controller", "objective",
)  # fmt: skip
"""Kinds whose members have all `SECTIONS` and say what each setting means."""

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """One setting of a method.

    Attributes:
        name: of the dataclass field or the argument.
        type: as the source writes it; of a choice, the words there are.
        default: as the source writes it; None where a value must be given.
        meaning: what the docstring says of it, "" for nothing.
    """

    name: str
    type: str
    default: str | None
    meaning: str


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

    @property
    def text(self) -> str:
        """The docstring without its sections; of a module that is about this method alone, that of the module, too."""
        said, _ = sections_of(self.obj.__doc__ or "")
        alone = not any(one.module == self.module and one.obj is not self.obj for one in _registry.values())
        if self.kind in DOCUMENTED or not alone:
            return said
        return f"{said}\n\n{sections_of(sys.modules[self.module].__doc__ or '')[0]}"

    @property
    def sections(self) -> dict[str, str]:
        """Those of `SECTIONS` that the docstring has, in that order."""
        _, found = sections_of(self.obj.__doc__ or "")
        return {name: found[name] for name in SECTIONS if name in found}

    @property
    def settings(self) -> list[Setting]:
        """The fields of a dataclass, with what it or a base says under "Attributes"; of another class the arguments,
        and of a function those with a default, that have an entry under "Args"."""
        if isinstance(self.obj, type) and dataclasses.is_dataclass(self.obj):
            bases = reversed(self.obj.__mro__)
            said = {name: text for base in bases for name, text in _entries(base, "Attributes").items()}
            return [Setting(name, kind, default, said.get(name, "")) for name, kind, default in _fields(self.obj)]
        said = _entries(self.obj, "Args")
        function = not isinstance(self.obj, type)
        return [
            Setting(name, _written_type(one.annotation, self.obj), default, said[name])
            for name, one in inspect.signature(self.obj).parameters.items()
            for default in [None if one.default is one.empty else _written(one.default)]
            if name in said and not (function and default is None)
        ]

    def missing(self) -> list[str]:
        """What a method of a `DOCUMENTED` kind has to say in its docstring, and this one does not."""
        unsaid = [f"what {one.name} means" for one in self.settings if not one.meaning]
        return [f"{name}:" for name in SECTIONS if not self.sections.get(name)] + unsaid

    def record(self) -> dict[str, Any]:
        """The method as plain data, for ``--json``."""
        return {
            **{name: getattr(self, name) for name in ("name", "kind", "paper", "arxiv", "module", "claim")},
            "obj": self.obj.__qualname__,
            "status": self.claim["status"] if self.claim else None,
            **{name: getattr(self, name) for name in ("text", "sections")},
            "settings": [dataclasses.asdict(one) for one in self.settings],
        }


_HEAD = re.compile(rf"({'|'.join(SECTIONS)}|Args|Attributes|Returns|Yields|Raises):")
_ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")
_CHOICE = re.compile(r"Literal\[([^\]]*)\]")


def sections_of(docstring: str) -> tuple[str, dict[str, str]]:
    """What a docstring says outside of sections, and its sections by name, without their indentation."""
    prose: list[str] = []
    sections: dict[str, list[str]] = {}
    lines = prose
    for line in inspect.cleandoc(docstring).splitlines():
        if head := _HEAD.fullmatch(line):
            lines = sections.setdefault(head[1], [])
            continue
        if line and not line.startswith(" "):
            lines = prose
        lines.append(line)
    return "\n".join(prose).strip(), {
        name: textwrap.dedent("\n".join(lines)).strip("\n") for name, lines in sections.items()
    }


def _entries(obj: Any, section: str) -> dict[str, str]:
    """``name: meaning`` of each entry of a section of a docstring; ``a, b: meaning`` is one of each."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in sections_of(vars(obj).get("__doc__") or obj.__doc__ or "")[1].get(section, "").splitlines():
        if entry := _ENTRY.fullmatch(line):
            names = entry[1].split(", ")
            found.update(dict.fromkeys(names, entry[2]))
        else:
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return found


def _fields(cls: type) -> Iterator[tuple[str, str, str | None]]:
    """Name, type and default of each field of a dataclass."""
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        # an alias in an annotation is one of the module of the class that has it
        owner = next(base for base in cls.__mro__ if field.name in vars(base).get("__annotations__", {}))
        default = None if default is dataclasses.MISSING else _written(default)
        yield field.name, _written_type(field.type, owner), default


def _written(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _written_type(said: Any, obj: Any) -> str:
    """An annotation as text; where it is a choice of words, or an alias of one, the words."""
    text = said if isinstance(said, str) else getattr(said, "__name__", str(said))
    alias = getattr(sys.modules[obj.__module__], text, None)
    if get_origin(alias) is Literal:
        return " or ".join(map(_written, get_args(alias)))
    return _CHOICE.sub(lambda found: found[1].replace("'", '"').replace(", ", " or "), text).replace(" | ", " or ")


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
