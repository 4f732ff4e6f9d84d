"""Numbers from traces."""

from __future__ import annotations

from collegium.measure.load import Load, load
from collegium.measure.specialisation import DomainInformation, domain_information

__all__ = ["DomainInformation", "Load", "domain_information", "load"]
