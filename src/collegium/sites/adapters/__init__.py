"""One adapter for each way of calling gate and experts. The first that recognises a block is used."""

from __future__ import annotations

from collegium.sites.adapters.base import Adapter
from collegium.sites.adapters.llama4 import Llama4
from collegium.sites.adapters.loose import Loose
from collegium.sites.adapters.nllb import NllbMoe
from collegium.sites.adapters.own import Own
from collegium.sites.adapters.seam import Seam
from collegium.sites.adapters.switch import Switch

__all__ = ["ADAPTERS", "Adapter"]

ADAPTERS: tuple[Adapter, ...] = (Own(), Loose(), Seam(), Llama4(), Switch(), NllbMoe())
