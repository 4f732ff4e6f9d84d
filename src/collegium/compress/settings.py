"""A method and its settings: from a name and plain values, as plans and command lines hold them, to an object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collegium import named
from collegium.catalog import get
from collegium.errors import ConfigError

__all__ = ["settled"]


def settled(kind: str, name: str, settings: Mapping[str, Any]) -> Any:
    """The method catalogued as `name` under `kind`, a dataclass whose fields are its settings, with these settings.

    Raises:
        ConfigError: there is no such method or setting, or a value is not allowed; the message names what there is.
    """
    found = get(kind, name)
    try:
        return named.settled(found, settings)
    except ConfigError as error:
        raise ConfigError(f"{kind} {name!r}: {error}") from error
