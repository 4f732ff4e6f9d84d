"""From what a command line says, ``"name:key=value,key=value"``, to the settings of a catalogued method."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from collegium.catalog import get
from collegium.errors import ConfigError

__all__ = ["find_named", "parse_settings", "settled"]


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
        raise ConfigError(f"there is no setting {unknown[0]!r}; there are {', '.join(known) or 'none'}")
    try:
        return TypeAdapter(cls).validate_python(dict(settings))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = "".join(f"setting {part!r}: " for part in first["loc"][:1])
        raise ConfigError(f"{field}{first['msg'].removeprefix('Value error, ')}") from error
