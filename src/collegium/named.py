"""From what a command line says, ``"name:key=value,key=value"``, to the settings of a catalogued method."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from collegium.catalog import get, methods
from collegium.errors import ConfigError

__all__ = ["find_named", "nearest", "one_named", "parse_settings", "settled", "snake"]


def find_named(kind: str, text: str, package: str | None = None) -> Any:
    """The method of `kind` that `text` names, a dataclass, with the settings that follow its name.

    Args:
        package: whose modules announce the methods of that kind. Without it the catalogue may import every room, and
            torch with them, to find the name.

    Raises:
        ConfigError: there is no such method or setting, or a value is not allowed; the message names what there is.
    """
    if package is not None:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")
    name, _, rest = text.partition(":")
    cls = get(kind, name.strip())
    try:
        return settled(cls, parse_settings(rest))
    except ConfigError as error:
        raise ConfigError(f"{kind} {text!r}: {error}") from error


def one_named(kind: str, said: Any, where: str) -> Any:
    """The method of `kind` that plain data names: ``"name"``, ``{"name": {setting: value}}``, or ``{"name": value}`` of
    its first setting.

    Args:
        where: begins messages, such as "router.select".

    Raises:
        ConfigError: it is none of these, or there is no such method or setting; the message names the nearest.
    """
    settings: Any = {}
    if isinstance(said, str):
        name = said
    elif isinstance(said, Mapping) and len(said) == 1:
        [(name, settings)] = said.items()
    else:
        raise ConfigError(f"{where}: write a name, or one name with its settings, not {said!r}")
    known = [one.name for one in methods(kind)]
    if name not in known:
        raise ConfigError(f"{where}: no {kind} is named {name!r}; {nearest(str(name), known)}")
    cls = get(kind, name)
    names = [one.name for one in dataclasses.fields(cls)]
    if settings is None:
        settings = {}
    if not isinstance(settings, Mapping):
        if not names:
            raise ConfigError(f"{where}: {name} has no settings, but is given {settings!r}")
        settings = {names[0]: settings}
    try:
        return settled(cls, settings)
    except ConfigError as error:
        raise ConfigError(f"{where}.{name}: {error}") from error


def nearest(name: str, known: Sequence[str]) -> str:
    """For a message: what was meant, or all there is."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {found[0]!r}? There are " + ", ".join(known) if found else f"there are {', '.join(known)}"


def parse_settings(text: str) -> dict[str, str]:
    """``"key=value,key=value"`` as a dict; raises ConfigError where it is not that, or a key comes twice."""
    settings: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or key in settings:
            raise ConfigError(f"write settings as key=value,key=value, each key once; not {part!r}")
        settings[key] = value
    return settings


def settled(cls: type[Any], settings: Mapping[str, Any]) -> Any:
    """A dataclass with these values in its fields, text read as what a field holds.

    Raises:
        ConfigError: there is no such field, or a value is not allowed.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(settings.keys() - set(known)):
        hint = nearest(unknown[0], known) if known else "it has none"
        raise ConfigError(f"there is no setting {unknown[0]!r}; {hint}")
    try:
        return TypeAdapter(cls).validate_python(dict(settings))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = "".join(f"setting {part!r}: " for part in first["loc"][:1])
        raise ConfigError(f"{field}{first['msg'].removeprefix('Value error, ')}") from error


def snake(one: Any) -> str:
    """The class name of an object in lower case with underscores: its catalogued name, as a rule."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(one).__name__).lower()
