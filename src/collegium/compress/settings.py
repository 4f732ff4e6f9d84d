"""A method and its settings: from a name and plain values, as plans and command lines hold them, to an object."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from collegium.catalog import get
from collegium.errors import ConfigError

__all__ = ["settled"]


def settled(kind: str, name: str, settings: Mapping[str, Any]) -> Any:
    """The method catalogued as `name` under `kind`, a dataclass whose fields are its settings, with these settings.

    Raises:
        ConfigError: there is no such method or setting, or a value is not allowed; the message names what there is.
    """
    found = get(kind, name)
    known = [field.name for field in dataclasses.fields(found)]
    if unknown := sorted(settings.keys() - set(known)):
        raise ConfigError(f"{kind} {name!r} has no setting {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    try:
        return TypeAdapter(found).validate_python(dict(settings))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = "".join(f"setting {part!r}: " for part in first["loc"][:1])
        raise ConfigError(f"{kind} {name!r}: {field}{first['msg'].removeprefix('Value error, ')}") from error
